from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.engine.runners import Outputs
from service.engine.session import EngineError
from service.repository.folder import GOLDEN_FILE, Golden, load_golden
from service.repository.golden_check import FEW_IMAGES, GoldenMismatchError, check_golden, replay_golden
from service.repository.store import ModelStore
from tests.fakes import (
    CLASSES,
    HEIGHT,
    WIDTH,
    FakeEngine,
    Images,
    Logits,
    image,
    make_model_folder,
    tiny_images,
    tiny_logits,
    tiny_metadata,
)
from tests.service.stores import AnyGolden, StoreRecorder, store_settings
from tests.service.tiny_engines import limited_engine, open_tiny

TOLERANCE = 1e-4


def test_the_right_model_gives_the_golden_logits(folder: Path) -> None:
    engine = open_tiny(folder, max_batch_size=3)  # three batches for seven images
    report = check_golden(engine, load_golden(folder / GOLDEN_FILE))
    assert (report.n, report.labels_differ) == (7, 0)
    assert report.max_abs_difference < TOLERANCE


def test_another_model_does_not(tmp_path: Path) -> None:
    engine = open_tiny(make_model_folder(tmp_path, 1))
    with pytest.raises(GoldenMismatchError, match=r"0\.0001 is allowed; \d of 7 labels differ") as mismatch:
        check_golden(engine, load_golden(make_model_folder(tmp_path, 2) / GOLDEN_FILE))
    assert mismatch.value.report.max_abs_difference > 1


def test_golden_images_count_labels_that_differ() -> None:
    engine = FakeEngine(max_batch_size=2, tag=1)  # answers [0, 1, 0, 0, 0] to black images
    logits = np.zeros((3, CLASSES), dtype=np.float32)
    logits[0, 1] = 1
    logits[1, 4] = 0.5
    golden = Golden(np.zeros((3, HEIGHT, WIDTH, 3), np.uint8), np.zeros(3, np.int64), logits)
    report = replay_golden(engine, golden)
    assert (report.max_abs_difference, report.labels_differ, report.n) == (1.0, 2, 3)


def test_an_engine_that_gives_no_number_is_refused() -> None:
    class NanEngine(FakeEngine):
        def run(self, images: Images) -> Logits:
            return np.full((len(images), CLASSES), np.nan, dtype=np.float32)

    golden = Golden(tiny_images(2), np.zeros(2, np.int64), np.zeros((2, CLASSES), np.float32))
    with pytest.raises(GoldenMismatchError, match="nan"):
        check_golden(NanEngine(), golden)


def test_another_unfamiliarity_is_refused() -> None:
    engine = FakeEngine(max_batch_size=2, threshold=2)
    images = np.stack([image(number) for number in (1, 2, 9)])
    logits, scores, _ = engine.run_outputs(images)
    assert scores is not None
    golden = Golden(images, logits.argmax(axis=1), logits, unfamiliarity=scores)
    assert check_golden(engine, golden).score_ratio == 0
    other = scores.copy()
    other[2] /= 1.05
    assert check_golden(engine, replace(golden, unfamiliarity=other)).score_ratio == pytest.approx(0.05, rel=1e-4)
    other[2] /= 1.1
    with pytest.raises(GoldenMismatchError, match=r"another unfamiliarity on cpu: it differs by up to 15\.5%, and 10%"):
        check_golden(engine, replace(golden, unfamiliarity=other))
    with pytest.raises(EngineError, match="must have an unfamiliarity"):
        check_golden(engine, replace(golden, unfamiliarity=None))


def test_golden_images_go_on_in_smaller_batches_when_memory_runs_out(folder: Path) -> None:
    engine, session = limited_engine(folder, limit=2)
    engine.max_batch_size = 4
    assert check_golden(engine, load_golden(folder / GOLDEN_FILE)).n == 7
    assert session.sizes == [4, 2, 2, 2, 1]


def test_golden_images_are_run_in_each_batch_size_of_a_gpu(folder: Path) -> None:
    """A captured graph may be wrong alone, and 7 golden images fill none of the small ones."""

    class OneWrongGraph:
        metadata = tiny_metadata()

        def __init__(self, provider: str, wrong: int, largest: int = 8) -> None:
            self.provider = provider
            self.wrong = wrong
            self.max_batch_size = largest
            self.sizes: list[int] = []

        def run_outputs(self, images: np.ndarray) -> Outputs:
            self.sizes.append(len(images))
            return Outputs(tiny_logits(images, 1) + (len(images) == self.wrong))

    golden = load_golden(folder / GOLDEN_FILE)
    assert len(golden) == 7
    check_golden(OneWrongGraph("cpu", 2), golden)
    for size in (1, 2, 4, 8, 16, 32, 48):  # above 7 they are repeated
        with pytest.raises(GoldenMismatchError, match="on cuda: the largest difference is 1, and"):
            check_golden(OneWrongGraph("cuda", size, 48), golden)
    right = OneWrongGraph("cuda", 0, 48)
    report = check_golden(right, golden)
    assert (report.labels_differ, report.n) == (0, 7)
    assert right.sizes == [7, 48, 32, 16, 8, 4, 2, 1]


def test_golden_images_of_another_model_are_refused(tmp_path: Path) -> None:
    path = make_model_folder(tmp_path, defect="golden_of_other_size")
    with pytest.raises(EngineError, match=r"\[4, 4, 3\] with 5 logits do not fit a model of shape \[4, 6, 3\]"):
        check_golden(open_tiny(path), load_golden(path / GOLDEN_FILE))


async def test_one_engine_runs_all_golden_images_and_each_other_one_batch(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path).parent
    n = len(load_golden(folder / "1" / GOLDEN_FILE))
    engines: list[AnyGolden] = [AnyGolden(tag=0) for _ in range(3)]
    for engine in engines[:2]:
        engine.max_batch_size = 5
    engines[2].max_batch_size, engines[2].runs_alone = 1, True
    store = ModelStore(store_settings(folder), StoreRecorder(), open_engines=lambda path, settings: engines)
    await store.load()
    assert [sum(map(len, engine.batches)) for engine in engines] == [n, 5, FEW_IMAGES]
    assert store.live is not None
    assert store.live.expected_rate > 0
    await store.close()
