"""The figures: that they are drawn, from what, and what stands in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from training.evaluate import ConfusedPair, calibration_bins
from training.plots import save_answers, save_confusion, save_curves, save_reliability, shorten


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they were when they were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def rows(epochs: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 4.5 - 0.05 * epoch,
            "val_loss": 4.4 - 0.05 * epoch,
            "val_top1": 0.4 - 0.001 * abs(epoch - 2),
            "val_top5": 0.7,
            "learning_rate": 1e-3,
            "pictures_per_second": 512.0,
            "seconds": 88.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def assert_image(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 10


@pytest.mark.parametrize("epochs", [1, 3, 80])
def test_curves_show_every_epoch(tmp_path: Path, figures: list[Figure], epochs: int) -> None:
    save_curves(rows(epochs), tmp_path / "curves.png", "top1")
    assert_image(tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    assert list(panels) == ["Loss", "Validation accuracy", "Learning rate", "Speed"]
    lines = panels["Loss"].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), [row["train_loss"] for row in rows(epochs)])
    np.testing.assert_allclose(lines[1].get_ydata(), [row["val_loss"] for row in rows(epochs)])
    assert all(axes.get_xlabel() == "epoch" and axes.get_ylabel() for axes in panels.values())


@pytest.mark.parametrize(
    ("best_by", "told"), [("top1", "best by top-1: 40.0%\nepoch 2"), ("loss", "best by loss: 39.7%\nepoch 5")]
)
def test_curves_mark_the_epoch_that_is_kept(tmp_path: Path, figures: list[Figure], best_by: str, told: str) -> None:
    save_curves(rows(5), tmp_path / "curves.png", best_by)
    assert [text.get_text() for text in figures[0].axes[1].texts] == [told]


@pytest.mark.parametrize(
    ("first", "last"), [((0.02, 0.08), (0.55, 0.82)), ((0.565, 0.862), (0.746, 0.944))], ids=["fresh", "trained"]
)
def test_the_legend_hides_no_accuracy(
    tmp_path: Path, figures: list[Figure], first: tuple[float, float], last: tuple[float, float]
) -> None:
    done = np.linspace(0, 1, 40)[:, None] ** 0.5
    accuracies = np.array(first) * (1 - done) + np.array(last) * done
    history = [row | {"val_top1": a, "val_top5": b} for row, (a, b) in zip(rows(40), accuracies, strict=True)]
    save_curves(history, tmp_path / "curves.png", "loss")
    axes = figures[0].axes[1]
    legend = axes.get_legend()
    assert legend is not None
    for line in axes.lines:
        points = axes.transData.transform(np.column_stack(line.get_data()))
        assert legend.get_window_extent().count_contains(points) == 0, line.get_label()


def test_curves_of_several_stages_are_one(tmp_path: Path, figures: list[Figure]) -> None:
    numbers = [1, 1, 3, 3]  # the second had no epochs
    staged = [row | {"stage": stage, "val_top1": 0.9 / stage} for row, stage in zip(rows(4), numbers, strict=True)]
    save_curves(staged, tmp_path / "curves.png", "top1")
    for axes in figures[0].axes:
        assert axes.get_xlabel() == "epoch; dotted: where a stage begins"
        marks = {line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"}
        assert marks == {0.5, 2.5}
        assert [text.get_text() for text in axes.texts][-2:] == ["3", "1"]
    assert list(figures[0].axes[0].get_lines()[0].get_xdata()) == [1, 2, 3, 4]
    # The last stage is what is kept, whatever an earlier one has reached.
    assert figures[0].axes[1].texts[0].get_text() == "best of stage 3 by top-1: 30.0%\nepoch 4"


def test_no_curves_without_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="before the first epoch"):
        save_curves([], tmp_path / "curves.png", "top1")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("count", [0, 1, 20])
def test_confusion_has_a_bar_for_each_pair(tmp_path: Path, figures: list[Figure], count: int) -> None:
    pairs = [ConfusedPair(f"oak_tree {i}", "maple_tree", 20 - i, (20 - i) / 100) for i in range(count)]
    save_confusion(pairs, tmp_path / "confusion.png")
    assert_image(tmp_path / "confusion.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [pair.share for pair in pairs]
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"{p.true}  →  {p.predicted}" for p in pairs]


def test_reliability_shows_the_bins_before_and_after(tmp_path: Path, figures: list[Figure]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator) * 2
    labels = torch.randint(10, (500,), generator=generator)
    both = [calibration_bins(logits / temperature, labels) for temperature in (1, 3)]
    save_reliability(*both, tmp_path / "reliability.png")
    assert_image(tmp_path / "reliability.png")
    top, bottom = figures[0].axes[:2], figures[0].axes[2:]
    for column, (name, bins) in enumerate(zip(("before", "after"), both, strict=True)):
        filled = bins[:, 0] > 0
        assert 0 < filled.sum() < len(bins)
        assert [bar.get_height() for bar in top[column].patches] == bins[filled, 2].tolist()
        assert [bar.get_height() for bar in bottom[column].patches] == bins[:, 0].tolist()
        error = (bins[:, 0] * (bins[:, 1] - bins[:, 2]).abs()).sum().item()
        title = top[column].get_title(loc="left")
        assert name in title
        assert f"{error:.2%}" in title


def test_answers_stand_below_their_images(tmp_path: Path, figures: list[Figure]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    rows = {"noise": [(images[0], "ant 90%"), (images[1], "bee 40%")], "text": [(images[2], "cat 50%")]}
    save_answers(rows, tmp_path / "answers.png")
    assert_image(tmp_path / "answers.png")
    shown = [(axes.images[0].get_array(), axes.texts[-1].get_text()) for axes in figures[0].axes if axes.images]
    assert [words for _, words in shown] == ["ant 90%", "bee 40%", "cat 50%"]
    for (image, _), image in zip(shown, images, strict=True):
        np.testing.assert_array_equal(image, image)
    assert [figures[0].axes[i].texts[0].get_text() for i in (0, 2)] == ["noise", "text"]


def test_drawing_needs_no_display() -> None:
    """pyplot keeps every figure alive and looks for a display: it stays out."""
    code = "import sys, training.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    save_confusion([ConfusedPair("price_$_low", "price_$_high", 3, 0.25)], tmp_path / "confusion.png")
    save_answers({"noise": [(np.zeros((8, 8, 3), np.uint8), "$a_$ 50%")]}, tmp_path / "answers.png")
    assert_image(tmp_path / "confusion.png")
    assert_image(tmp_path / "answers.png")


def test_long_names_leave_room_for_what_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    """As those of data sets that name a species by all that it belongs to; matplotlib warns where there is none."""
    names = [f"00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_{end}" for end in ("a" * 160, "b")]
    save_confusion([ConfusedPair(*names, 3, 0.25)], tmp_path / "confusion.png")
    (label,) = figures[0].axes[0].get_yticklabels()
    assert label.get_text() == "00000_Animalia_Annelida…aaaaaaaaaaaa  →  00000_Animalia_Annelida…_Lumbricus_b"
    assert label.get_window_extent().x0 > 0


def test_names_are_shortened_in_their_middle() -> None:
    assert [shorten(name, 6) for name in ("abcdef", "abcdefg", " a\nb ")] == ["abcdef", "abc…fg", "a b"]
