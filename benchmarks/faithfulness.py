"""Do heat maps show what the model goes by? `python -m benchmarks.faithfulness MODEL --data DIR`.

Deletion and insertion (Petsiuk et al. 2018): the cells of an image are replaced by its mean colour, the most important
first, and the probability of its label should fall fast; put into the blurred image in that order, it should rise fast.
Each curve has an area: for deletion less is better, for insertion more. Beside the methods stand a random order and the
model's own cross-attention, from torch: mean over heads, latents, iterations and both views.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.common import describe_run, find_model, print_run, run_command
from service.engine.onnx_engine import EngineError, OnnxEngine
from service.explanation.masks import CELLS, RUNS, Grid, Pixels, cover, grid_of, heat_map, mean_colour, rise_masks
from service.repository.folder import CHECKPOINT_FILE
from training.checkpoint import load_model
from training.data.dataset import DataError
from training.data.load import load
from training.model import CrossAttention, Perceiver, split_heads
from training.preprocessing import Preprocess

BATCH_SIZE = 32
STEPS = 16  # of a curve; each changes as many cells

Explain = Callable[[Pixels, int, int], Grid]


class Model:
    """The served model, as probabilities of a label."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine
        self.runs = 0

    def probabilities(self, images: Pixels) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] -> float32 [N, C]."""
        self.runs += len(images)
        parts = [self._engine.run(images[at : at + BATCH_SIZE]) for at in range(0, len(images), BATCH_SIZE)]
        logits = np.concatenate(parts)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return result


def by_masks(model: Model, masks: Grid, fill: Callable[[Pixels], Pixels]) -> Explain:
    """Explain by what covers cost."""

    def explain(image: Pixels, label: int, number: int) -> Grid:
        probabilities = model.probabilities(np.concatenate([image[None], cover(image, fill(image), masks)]))[:, label]
        return heat_map(masks, probabilities[0] - probabilities[1:])

    return explain


def at_random(grid: tuple[int, int]) -> Explain:
    """Give each image an order of its own."""
    return lambda image, label, number: np.random.default_rng(number).random(grid, np.float32)


def by_attention(model: Perceiver, preprocess: Preprocess, grid: tuple[int, int]) -> Explain:
    """Take the mean of the model's cross-attention."""
    weights: list[Tensor] = []
    seen: dict[CrossAttention, Tensor] = {}

    def on_query(cross: CrossAttention, module: object, inputs: object, output: Tensor) -> None:
        seen[cross] = output

    def on_key(cross: CrossAttention, module: object, inputs: object, output: Tensor) -> None:
        scores = split_heads(seen[cross] * cross.scale, cross.heads) @ split_heads(output, cross.heads).mT
        scores = scores if cross.position_bias is None else scores + cross.position_bias
        weights.append(scores.softmax(-1).mean((1, 2)))

    for cross in model.cross_attentions:
        assert isinstance(cross, CrossAttention)
        cross.query.register_forward_hook(partial(on_query, cross))
        cross.key.register_forward_hook(partial(on_key, cross))

    @torch.inference_mode()
    def explain(image: Pixels, label: int, number: int) -> Grid:
        weights.clear()
        pixels = preprocess(torch.from_numpy(image)[None])
        model.forward_view(torch.cat([pixels, pixels.flip(3)]))
        image_map, mirrored = torch.stack(weights).mean(0).unflatten(1, (model.config.grid, model.config.grid))
        both = (image_map + mirrored.flip(1)) / 2
        resized = torch.nn.functional.interpolate(both[None, None], grid, mode="area")[0, 0]
        return resized.numpy()

    return explain


def blurred(image: Pixels) -> Pixels:
    """Return an image so blurred that its shapes are gone."""
    radius = max(1, max(image.shape[:2]) / 8)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def curves(model: Model, image: Pixels, label: int, importance: Grid) -> tuple[float, float]:
    """Return the areas under the deletion and the insertion curve of a map, [G, K]."""
    order = np.argsort(-importance.ravel(), kind="stable")
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    bounds = np.linspace(0, order.size, STEPS + 1).round()
    taken = (rank.reshape(importance.shape) < bounds[:, None, None]).astype(np.float32)
    deleted = cover(image, mean_colour(image), taken)
    inserted = cover(image, blurred(image), 1 - taken)
    probabilities = model.probabilities(np.concatenate([deleted, inserted]))[:, label].reshape(2, -1)
    deletion, insertion = ((p[1:] + p[:-1]).mean() / 2 for p in probabilities.astype(np.float64))
    return float(deletion), float(insertion)


# Of occlusion (Zeiler and Fergus 2014): side of a window and its step, as shares of the image.
WINDOWS = {
    "small": ((1 / 4, 1 / 8),),
    "large": ((1 / 2, 1 / 8),),
    "mixed": ((1 / 4, 1 / 8), (3 / 8, 3 / 16), (1 / 2, 1 / 4)),
}


def occlusion_masks(grid: tuple[int, int], windows: tuple[tuple[float, float], ...]) -> Grid:
    """Slide windows over the image, with their centres from edge to edge: float32 [R, G, K], 1 is covered."""
    masks = []
    for share, step in windows:
        sides = [max(1, round(share * n)) for n in grid]
        steps = [max(1, round(step * n)) for n in grid]
        tops, lefts = (range(-(side // 2), n - side // 2, s) for n, side, s in zip(grid, sides, steps, strict=True))
        for top in tops:
            for left in lefts:
                mask = np.zeros(grid, np.float32)
                mask[max(0, top) : top + sides[0], max(0, left) : left + sides[1]] = 1
                masks.append(mask)
    return np.stack(masks)


def methods(model: Model, grid: tuple[int, int]) -> Iterator[tuple[str, Explain]]:
    """Yield every method by masks, with what stands in the cover and the number of masks in its name; shipped first."""
    yield f"rise {CELLS} mean {RUNS}", by_masks(model, rise_masks(grid), mean_colour)
    for cells in (3, 4, 8):
        yield f"rise {cells} mean {RUNS}", by_masks(model, rise_masks(grid, RUNS, cells), mean_colour)
    yield f"rise {CELLS} blur {RUNS}", by_masks(model, rise_masks(grid), blurred)
    for name, windows in WINDOWS.items():
        masks = occlusion_masks(grid, windows)
        for fill in (mean_colour, blurred):
            yield f"occlusion {name} {fill.__name__[:4]} {len(masks)}", by_masks(model, masks, fill)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faithfulness", description=__doc__)
    parser.add_argument("model", type=Path, help="model folder or version folder, with its checkpoint")
    parser.add_argument("--data", type=Path, help="as of python -m training; default: CIFAR-100, downloaded to data/")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--methods", nargs="+", help="names, or the beginnings of names; default: all")
    return parser.parse_args()


def main() -> int:
    """Explain, measure, print."""
    args = parse_arguments()
    found = find_model(args.model)
    engine = OnnxEngine(found.path / "model.onnx", provider="cpu", intra_op_threads=1)
    metadata = engine.metadata
    data = load(args.data, input_size=metadata.input_size[0], validation_fraction=0.02)
    split = data.val if args.split == "val" else data.test
    chosen = np.linspace(0, len(split.labels) - 1, args.images).round().astype(int)
    images = split.images.numpy()[chosen]
    trained, preprocess, _ = load_model(found.path / CHECKPOINT_FILE)
    model, grid = Model(engine), grid_of(metadata.input_size)
    explained = model.probabilities(images).argmax(1).tolist()
    print_run(describe_run() | {"model": f"{metadata.name}, version {found.version}"})
    everything = [
        ("random", at_random(grid)),
        ("cross-attention", by_attention(trained.eval(), preprocess, grid)),
        *methods(model, grid),
    ]
    print(f"{'method':<28} {'deletion':>9} {'insertion':>9} {'difference':>10}", flush=True)
    for name, explain in everything:
        if args.methods and not name.startswith(tuple(args.methods)):
            continue
        areas = np.array(
            [
                curves(model, image, label, explain(image, label, n))
                for n, (image, label) in enumerate(zip(images, explained, strict=True))
            ]
        )
        d, i = areas.mean(0)
        se = (areas[:, 1] - areas[:, 0]).std() / len(areas) ** 0.5
        print(f"{name:<28} {d:>9.4f} {i:>9.4f} {i - d:>10.4f} +- {se:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main, EngineError, DataError)
