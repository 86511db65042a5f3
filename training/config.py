"""Model and training configurations and the presets that are known to work.

Every number of a run stands in one of two frozen pydantic models, which check it, print it as JSON into the run's
folder and read it back. Letters used for shapes everywhere in this package:

    B images in a batch     H, W height and width of the input     M tokens       N latents
    C channels (``dim``)      T channels of a token (``token_dim``)  K classes
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sharing = Literal["all", "all_but_first_cross", "all_but_first", "none"]
NetworkKind = Literal["perceiver", "residual"]
Precision = Literal["auto", "float32", "bfloat16"]


# Fields of the architecture that a residual network has.
OF_RESIDUAL_NETWORK = {"network", "num_classes", "input_size", "image_size", "dim", "num_blocks", "test_time_flip"}

MIN_RESIDUAL_SIZE = 5


class ModelConfig(BaseModel):
    """The architecture: everything that decides the shape of the weights and the function they compute."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: NetworkKind = Field(
        "perceiver",
        description="residual: a wide residual network, to teach a Perceiver; its first stage has `dim` channels, and "
        "each of three has `num_blocks` blocks",
    )
    num_classes: int = Field(100, ge=2, description="classes to tell apart")
    input_size: int = Field(32, ge=1, description="height and width of the input image, pixels")
    image_size: int = Field(32, ge=1, description="size the image is resized to before the patches are cut, pixels")
    patch_size: int = Field(4, ge=1, description="distance between patches, pixels")
    patch_overlap: int = Field(0, ge=0, description="pixels that a patch reaches into its neighbours on each side")

    dim: int = Field(128, ge=1, description="channels of a latent")
    token_dim: int = Field(128, ge=1, description="channels of a token")
    num_latents: int = Field(32, ge=1, description="latents")
    num_iterations: int = Field(2, ge=1, description="cross-attention followed by the blocks, so many times")
    num_blocks: int = Field(4, ge=0, description="self-attention blocks in an iteration")
    sharing: Sharing = Field(
        "all",
        description="weights that iterations share: all; all but the first cross-attention (as in the paper's ImageNet "
        "model); all but the whole first iteration; none",
    )

    position: Literal["learned", "fourier", "both"] = Field("learned", description="position of a token")
    fourier_bands: int = Field(8, ge=1, description="frequencies per axis of the Fourier position features")
    latent_init: Literal["normal", "grid"] = Field(
        "normal",
        description="normal: random latents; grid: each latent starts with its attention on one region of the image",
    )
    latent_std: float = Field(0.05, gt=0, description="standard deviation of the initial latents")

    cross_heads: int = Field(1, ge=1, description="heads of the cross-attention")
    cross_head_dim: int = Field(128, ge=1, description="channels of a cross-attention head")
    cross_scale: Literal["learned", "sqrt"] = Field(
        "sqrt", description="scores are multiplied by a learned scalar that starts at 1, or by 1/sqrt(head size)"
    )
    cross_output: bool = Field(True, description="project the heads' values back to `dim`")
    cross_position_bias: bool = Field(
        False, description="add to the scores one learned number for each latent, token and head"
    )
    residual: Literal["normalised", "plain"] = Field(
        "plain",
        description="what the two residuals of the cross-attention module add: its layer-normalised input, as the "
        "Keras example does, or the input itself",
    )
    self_heads: int = Field(4, ge=1, description="heads of the self-attention")
    self_head_dim: int = Field(32, ge=1, description="channels of a self-attention head")
    attention_fans: Literal["matrix", "kernel"] = Field(
        "matrix",
        description="fans of the self-attention's initial values (Glorot uniform): matrix: those of dense layers; "
        "kernel: those of kernels [dim, heads, size] and [heads, size, dim] taken for convolutions, as Keras had it",
    )
    ffn_ratio: float = Field(4.0, gt=0, description="hidden channels of a feed-forward layer over `dim`")
    bias: bool = Field(True, description="biases in the attention projections")
    head_hidden: bool = Field(True, description="a hidden layer of `dim` channels with GELU before the logits")
    head_norm: bool = Field(False, description="layer norm of the latents before their mean")

    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention weights")
    ffn_dropout: float = Field(0.0, ge=0, lt=1, description="dropout after a feed-forward layer")
    logits_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the logits, as the Keras example has it")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth: rate of the last block, rising from 0")
    latent_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the latents that a training step leaves out, drawn anew at each, for each process; "
        "evaluation and export have all",
    )
    test_time_flip: bool = Field(
        False,
        description="evaluation and export answer with the mean of two logits, of the image and of its mirror image: "
        "twice the cost; training has one",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.network == "residual":
            self._check_residual()
            return self
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}: "
                "patches must tile the image"
            )
        if round(self.ffn_ratio * self.dim) < 1:
            raise ValueError(f"ffn_ratio {self.ffn_ratio} of dim {self.dim} is no hidden channel: it needs one")
        if not self.cross_output and self.cross_heads * self.cross_head_dim != self.dim:
            raise ValueError(
                f"without cross_output the heads' channels are the latents': cross_heads * cross_head_dim "
                f"({self.cross_heads} * {self.cross_head_dim}) must equal dim ({self.dim})"
            )
        if self.latent_init == "grid" and not self.cross_position_bias:
            raise ValueError("latent_init grid sets the initial cross_position_bias: set cross_position_bias as well")
        side = math.isqrt(self.num_latents)
        if self.latent_init == "grid" and side**2 != self.num_latents:
            raise ValueError(
                f"latent_init grid needs a square number of latents, not {self.num_latents}: try num_latents {side**2}"
            )
        if self.latent_dropout and self.kept_latents == self.num_latents:
            raise ValueError(f"latent_dropout {self.latent_dropout} leaves out none of num_latents {self.num_latents}")
        return self

    def _check_residual(self) -> None:
        unused = (name for name in type(self).model_fields if name not in OF_RESIDUAL_NETWORK)
        changed = [name for name in unused if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"a residual network has no {', '.join(changed)}: leave it out, or take preset teacher")
        if self.num_blocks < 1:
            raise ValueError("a residual network needs one block in each stage: set num_blocks 1, or more")
        # Its norms take mean and variance over more than one number, of a batch of one image, too.
        if self.image_size < MIN_RESIDUAL_SIZE:
            raise ValueError(
                f"a residual network halves images twice, and of {self.image_size} pixels one is left: set "
                f"image_size {MIN_RESIDUAL_SIZE}, or more"
            )

    @property
    def kept_latents(self) -> int:
        """Latents that a training step keeps: one at least."""
        return max(1, round(self.num_latents * (1 - self.latent_dropout)))

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def kernel(self) -> int:
        """Pixels that a patch reaches over, along one side."""
        return self.patch_size + 2 * self.patch_overlap

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, M."""
        return self.grid**2


class TrainConfig(BaseModel):
    """The recipe: data order, augmentation, optimiser, schedule, and what the machine may use."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(
        50, ge=0, description="passes over the training images, at most; 0: report what --init begins with"
    )
    batch_size: int = Field(64, ge=1, description="images a step, over all processes")
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of weights, order and augmentation (with --init: of the checkpoint as well)",
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training images that validates, where the data has no val/"
    )
    skip_unreadable: bool = Field(False, description="leave out images of a folder that cannot be read")

    optimizer: Literal["lamb", "adamw", "muon"] = Field("lamb", description="muon: matrices by Muon, the rest by AdamW")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate (for muon: of the matrices)")
    adamw_learning_rate: float = Field(2e-3, gt=0, description="with muon: peak learning rate of what AdamW trains")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    decay_all: bool = Field(
        True, description="decay every parameter; otherwise matrices only, no biases, norms, embeddings"
    )
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0: no clipping")

    schedule: Literal["plateau", "cosine", "linear"] = Field(
        "plateau", description="plateau: divide by 5 when validation loss rests; cosine and linear: warm up, then to 0"
    )
    warmup_epochs: float = Field(
        0.0, ge=0, description="epochs of linear warm-up (cosine and linear), at most half of them"
    )
    plateau_factor: float = Field(0.2, gt=0, lt=1, description="what the plateau schedule multiplies with")
    plateau_patience: int = Field(3, ge=1, description="epochs without improvement before it does")
    plateau_threshold: float = Field(1e-4, ge=0, description="least fall of the validation loss that counts")
    early_stop_patience: int = Field(15, ge=0, description="stop after so many epochs without improvement; 0: never")

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    flip: bool = Field(True, description="mirror left and right with probability 0.5")
    zoom: float = Field(0.0, ge=0, lt=1, description="zoom height and width independently by up to this share")
    random_crop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="random crops that keep this share of the image at least, of ratio 3:4 to 4:3, enlarged to it; "
        "0: off",
    )
    crop_padding: int = Field(0, ge=0, description="random shift by up to so many pixels, edges reflected")
    trivial_augment: float = Field(
        0.0,
        ge=0,
        le=1,
        description="strength of TrivialAugment, one operation an image; 1: the paper's; 0: off. What moves in is the "
        "image mirrored at its edge, whatever --flip says",
    )
    corruption: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the images that are made grey, compressed as JPEG, made noisy or blurred, a quarter each",
    )
    mixup: float = Field(0.0, ge=0, description="alpha of mixup's Beta distribution; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix's Beta distribution; 0: off")
    mix_probability: float = Field(0.5, ge=0, le=1, description="share of the batches that mixup or CutMix changes")
    distillation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the targets that the model of --teacher or --init answers (knowledge distillation); "
        "0: off",
    )
    distillation_temperature: float = Field(
        2.0, gt=0, description="what divides both logits where the answers are compared"
    )
    teachers_per_image: Literal["all", "one"] = Field(
        "all",
        description="who answers of an image: all teachers, in the mean, or one, by the image's place in the batch, "
        "which costs as much as their mean does",
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that is evaluated; 0: off")
    best_by: Literal["top1", "loss"] = Field(
        "top1", description="validation figure that chooses the best checkpoint; of equal top1 the lower loss"
    )

    precision: Precision = Field(
        "float32",
        description="autocast type of the forward pass; auto: bfloat16 where the processor computes in it (AVX512-BF16 "
        "or AMX; CUDA from compute capability 8.0), float32 elsewhere",
    )
    compile: bool = Field(False, description="torch.compile the training step")


class Preset(BaseModel):
    """A model and the recipe that trains it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.crop_padding >= self.model.input_size:
            raise ValueError(
                f"crop_padding {self.train.crop_padding} moves images of {self.model.input_size} pixels out of "
                f"sight: at most {self.model.input_size - 1}"
            )
        return self


PRESETS: dict[str, Preset] = {
    # The published Keras example (K. Salama 2021), point by point: 9,697,637 parameters at 100 classes.
    "reference": Preset(
        model=ModelConfig(
            image_size=64,
            patch_size=2,
            dim=256,
            token_dim=256,
            num_latents=256,
            num_iterations=2,
            num_blocks=4,
            cross_heads=1,
            cross_head_dim=256,
            cross_scale="learned",
            cross_output=False,
            residual="normalised",
            self_heads=8,
            self_head_dim=256,
            attention_fans="kernel",
            ffn_ratio=1.0,
            attention_dropout=0.1,
            ffn_dropout=0.2,
            logits_dropout=0.2,
        ),
        train=TrainConfig(zoom=0.2, best_by="loss"),
    ),
    # Small enough for two CPU cores: 8x8 patches every 4 pixels, 64 latents that start on a grid of regions.
    "compact": Preset(
        model=ModelConfig(
            patch_overlap=2,
            num_latents=64,
            num_blocks=2,
            ffn_ratio=2.0,
            sharing="none",
            cross_heads=4,
            cross_head_dim=32,
            cross_position_bias=True,
            latent_init="grid",
            head_hidden=False,
            head_norm=True,
        ),
        train=TrainConfig(
            epochs=40,
            batch_size=256,
            optimizer="muon",
            learning_rate=0.025,
            adamw_learning_rate=0.003,
            weight_decay=0.02,
            decay_all=False,
            clip_norm=1.0,
            schedule="linear",
            warmup_epochs=1,
            early_stop_patience=0,
            label_smoothing=0.1,
            crop_padding=4,
            cutmix=1.0,
            precision="auto",
        ),
    ),
    # A convolutional teacher for `compact`: 2,800,036 parameters at 100 classes.
    "teacher": Preset(
        model=ModelConfig(network="residual", dim=64, num_blocks=2),
        train=TrainConfig(
            epochs=16,
            batch_size=256,
            optimizer="muon",
            learning_rate=0.05,
            adamw_learning_rate=0.006,
            weight_decay=0.02,
            decay_all=False,
            clip_norm=1.0,
            schedule="linear",
            warmup_epochs=0.5,
            early_stop_patience=0,
            crop_padding=4,
            trivial_augment=0.5,
            cutmix=1.0,
            precision="auto",
        ),
    ),
    # For photographs: many tokens, whose number costs little, are read by few latents.
    "photo": Preset(
        model=ModelConfig(
            input_size=224,
            image_size=224,
            patch_overlap=2,
            dim=256,
            num_latents=64,
            num_blocks=4,
            ffn_ratio=2.0,
            sharing="all_but_first_cross",
            position="fourier",
            fourier_bands=32,
            cross_heads=4,
            cross_head_dim=32,
            self_heads=8,
            head_hidden=False,
            head_norm=True,
            drop_path=0.1,
        ),
        train=TrainConfig(
            epochs=100,
            batch_size=128,
            optimizer="muon",
            learning_rate=0.02,
            adamw_learning_rate=0.002,
            weight_decay=0.02,
            decay_all=False,
            clip_norm=1.0,
            schedule="linear",
            warmup_epochs=2,
            early_stop_patience=0,
            label_smoothing=0.1,
            random_crop=0.25,
            trivial_augment=0.5,
            cutmix=1.0,
            precision="auto",
        ),
    ),
    # For a GPU: four untied iterations of 144 latents over 256 overlapping patches, and all augmentation there is.
    # Chosen by reasoning; nobody has trained it to its end yet (docs/experiments/reference-and-accurate.md).
    "accurate": Preset(
        model=ModelConfig(
            patch_size=2,
            patch_overlap=2,
            dim=256,
            token_dim=256,
            num_latents=144,
            num_iterations=4,
            num_blocks=2,
            ffn_ratio=3.0,
            sharing="none",
            cross_heads=8,
            cross_head_dim=32,
            cross_position_bias=True,
            latent_init="grid",
            self_heads=8,
            head_hidden=False,
            head_norm=True,
            drop_path=0.1,
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=256,
            optimizer="muon",
            learning_rate=0.02,
            adamw_learning_rate=0.002,
            weight_decay=0.02,
            decay_all=False,
            clip_norm=1.0,
            schedule="linear",
            warmup_epochs=5,
            early_stop_patience=0,
            label_smoothing=0.1,
            crop_padding=4,
            trivial_augment=0.5,
            mixup=0.8,
            cutmix=1.0,
            mix_probability=0.8,
            ema_decay=0.999,
            precision="auto",
            compile=True,
        ),
    ),
}


def exportable_presets() -> list[str]:
    """Names of the presets whose model can be served: a residual network teaches."""
    return [name for name, preset in PRESETS.items() if preset.model.network == "perceiver"]
