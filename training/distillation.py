"""Knowledge distillation: what a model that has been trained says of an image becomes part of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import checkpoint
from training.build_model import build_model
from training.checkpoint import CheckpointError, Origin, RunConfig
from training.cli import format_flag
from training.preprocessing import Preprocess
from training.transfer import load_origin


class Teacher(nn.Module):
    """A model that is asked and never trained, with its own preprocessing. It begins with random weights.

    It answers of the pixels as they are, as its student does in training: with ``test_time_flip`` it would be asked
    twice, and a run on two cores take a quarter longer, though its images come mirrored at random anyway.

    Args:
        origin: tells its architecture.
    """

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self.origin = origin
        self.model = build_model(origin.run.model.model_copy(update={"test_time_flip": False}))
        self.preprocess = Preprocess(origin.run.model.image_size)
        self.requires_grad_(False).eval()

    def load_weights(self, path: Path) -> None:
        """Take the weights of the checkpoint that the origin tells of.

        Raises:
            CheckpointError: it can't be read, or is another one by now.
        """
        tensors, _ = load_origin(path, self.origin)
        checkpoint.load_into(self.model, checkpoint.strip_prefix("model", tensors), path)
        checkpoint.load_into(self.preprocess, checkpoint.strip_prefix("preprocess", tensors), path)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels that ``preprocess`` has normalised, float [B, 3, H, W] -> logits, float32 [B, K]."""
        logits: Tensor = self.model(pixels)
        return logits.float()


def mean_answer(logits: Sequence[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the softmaxes of several teachers' logits, float [B, K] each."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.log_softmax(dim=1) for each in logits]).logsumexp(dim=0)


def check_teachers(run: RunConfig) -> None:
    """Raise CheckpointError unless the teachers of a run, where it has some, can be asked about the run's images."""
    for origin in run.taught_by:
        _check_teacher(run, origin.run)


def _check_teacher(run: RunConfig, theirs: RunConfig) -> None:
    flag = "--teacher" if run.teachers else "--init"
    if theirs.labels != run.labels:
        raise CheckpointError(
            f"--distillation {run.train.distillation} needs answers in the classes of these images, and the model of "
            f"{flag} tells {len(theirs.labels)} others: name one of these classes by --teacher, or leave it out."
        )
    if theirs.model.image_size != run.model.image_size:
        raise CheckpointError(
            f"--distillation {run.train.distillation} shows the same pixels to the model of {flag}, which takes other "
            f"sizes than this one: it could with {format_flag('image_size', theirs.model.image_size)}."
        )


def distillation_loss(loss: Tensor, logits: Tensor, teacher: Tensor, share: float, temperature: float) -> Tensor:
    """Loss of targets that are in part a teacher's answers (Hinton et al. 2015, section 2).

    Args:
        loss: of the labels, float [].
        logits: float [B, K].
        teacher: its logits of the same images, float [B, K].
        share: of the teacher's part, 0..1.
        temperature: divides both logits in the teacher's part, of which the square weighs the gradients up again.

    Returns:
        float []: mean over the images of the loss and of the Kullback-Leibler divergence (nats) from the teacher's
        answers, which is 0 where the two agree.
    """
    answers = (teacher / temperature).softmax(dim=1)
    divergence = F.cross_entropy(logits / temperature, answers) - torch.special.entr(answers).sum(dim=1).mean()
    return loss.lerp(divergence * temperature**2, share)
