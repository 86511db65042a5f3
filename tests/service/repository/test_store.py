"""Which version serves, and why one is refused. With tiny real models, and fake engines where a test must hold them."""

import asyncio
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from service.engine.session import EngineError
from service.errors import NotReady
from service.repository import versions as versions_module
from service.repository.store import ModelStore, NoUsableVersionError
from service.repository.versions import without_folders
from tests.fakes import Defect, FakeEngine, make_model_folder, tiny_images, tiny_logits, tiny_metadata
from tests.service.stores import FakeOpener, Make, Opener, StoreRecorder, answer, assert_serves, lines, store_settings

REASONS: dict[Defect, str] = {
    "corrupt_onnx": "can't load this file",
    "empty_onnx": "can't load this file",
    "missing_onnx": "there is no model.int8.onnx or model.onnx",
    "float_input": "must be images tensor(uint8)",
    "input_name": "must be images",
    "output_name": "must be logits",
    "two_outputs": "the graph's only output must be logits",
    "fixed_batch": "of any batch",
    "no_metadata": "there is no perceiver.* entry",
    "broken_metadata": "perceiver.labels must be JSON",
    "too_few_labels": "by its metadata the output must be",
    "other_size": "by its metadata the input must be",
    "golden_missing": "the file is missing",
    "golden_corrupt": "must be an npz archive",
    "golden_pickled": "allow_pickle=False",
    "golden_mismatch": "the golden images give other logits on cpu",
    "golden_of_other_size": "do not fit a model of shape",
}


# Which version


async def test_the_highest_version_serves(make: Make, tmp_path: Path) -> None:
    for version in (2, 10, 9):
        make_model_folder(tmp_path, version)
    store = make()
    await store.load()
    await assert_serves(store, 10)
    assert lines(store) == [(2, "available"), (9, "available"), (10, "live")]
    assert [status.metadata for status in store.versions()] == [tiny_metadata()] * 3


async def test_a_pinned_version_serves_whatever_comes(make: Make, tmp_path: Path) -> None:
    for version in (1, 2):
        make_model_folder(tmp_path, version)
    store = make(model_version=1)
    await store.load()
    make_model_folder(tmp_path, 3)
    await store.reload()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live"), (2, "available"), (3, "available")]


async def test_naming_a_version_folder_instead_of_its_parent_is_explained(tmp_path: Path) -> None:
    version = make_model_folder(tmp_path / "things", 1)
    with pytest.raises(
        NoUsableVersionError, match=f"this is the folder of a version; name its parent, {tmp_path}/things$"
    ):
        await ModelStore(store_settings(version), StoreRecorder()).load()


async def test_naming_a_folder_of_several_models_is_explained(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "things", 1)
    make_model_folder(tmp_path / "animals", 2)
    with pytest.raises(NoUsableVersionError, match=f"is none; name one of them, as {tmp_path}/animals$"):
        await ModelStore(store_settings(tmp_path), StoreRecorder()).load()


async def test_a_pinned_version_that_is_not_there_is_named(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    with pytest.raises(NoUsableVersionError, match="version 7 is pinned and missing; the versions are: 1"):
        await make(model_version=7).load()


@pytest.mark.parametrize("missing", [True, False])
async def test_a_folder_without_versions_is_named(missing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    if not missing:
        folder.mkdir()
    store = ModelStore(store_settings(folder), StoreRecorder())
    message = "models: there is no such folder" if missing else "models: holds no version"
    with pytest.raises(NoUsableVersionError, match=message):
        await store.load()
    with pytest.raises(NotReady):
        store.lease()
    await store.close()


async def test_if_the_highest_is_refused_at_the_start_the_next_serves(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    make_model_folder(tmp_path, 2, defect="golden_mismatch")
    make_model_folder(tmp_path, 3, defect="corrupt_onnx")
    store = make()
    await store.load()
    await assert_serves(store, 1)
    assert lines(store) == [(1, "live"), (2, "refused"), (3, "refused")]
    assert store.refused_versions == 2


async def test_if_all_are_refused_the_error_has_each_reason(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1, defect="corrupt_onnx")
    make_model_folder(tmp_path, 2, defect="golden_missing")
    with pytest.raises(NoUsableVersionError, match=r"version 1: .*can't load this file.*; version 2: .*is missing"):
        await make().load()


async def test_the_provider_that_can_not_be_had_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(choice: str, device_id: int = 0) -> str:
        raise EngineError(f"provider {choice} was asked for and can't run here")

    monkeypatch.setattr(versions_module, "resolve_provider", refuses)
    make_model_folder(tmp_path, 1)
    with pytest.raises(NoUsableVersionError, match="provider cuda was asked for and can't run here"):
        await ModelStore(store_settings(tmp_path, provider="cuda"), StoreRecorder()).load()


# Verification


@pytest.mark.parametrize("defect", get_args(Defect))
async def test_a_broken_version_is_refused_with_its_reason_and_the_old_one_goes_on(
    defect: Defect, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model_folder(tmp_path, 1)
    observer = StoreRecorder()
    store = make(observer=observer)
    await store.load()
    make_model_folder(tmp_path, 2, defect=defect)
    old, new = await store.reload()
    assert (old.state, new.state) == ("live", "refused")
    assert store.refused_versions == 1
    assert REASONS[defect] in new.public_reason
    ((number, reason),) = observer.refused
    assert (number, without_folders(reason, tmp_path)) == (2, new.public_reason)
    assert f"version 2: refused: {reason}" in caplog.text  # in full
    assert str(tmp_path) not in new.public_reason
    await assert_serves(store, 1)


async def test_a_refused_version_is_tried_again_only_when_its_files_change(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    broken = make_model_folder(tmp_path, 2, defect="golden_mismatch")
    opener = Opener()
    store = make(open_engines=opener)
    await store.load()
    for _ in range(3):
        await store.reload()
    assert opener.opened == [2, 1]
    good = make_model_folder(tmp_path / "elsewhere", 2)
    (good / "golden.npz").replace(broken / "golden.npz")
    await store.reload()
    assert opener.opened == [2, 1, 2]
    await assert_serves(store, 2)
    assert [status.public_reason for status in store.versions()] == ["", ""]


async def test_the_golden_difference_is_reported_passed_or_not(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    make_model_folder(tmp_path, 2, defect="golden_mismatch")
    observer = StoreRecorder()
    await make(observer=observer).load()
    refused, passed = observer.differences
    assert refused == pytest.approx(1, abs=1e-4)
    assert passed < 1e-4
    assert observer.live == [(1, "tiny", "cpu")]


async def test_engines_of_a_refused_version_are_closed(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    engine = FakeEngine()  # does not give the golden logits
    with pytest.raises(NoUsableVersionError, match="golden"):
        await make(open_engines=lambda folder, options: [engine]).load()
    assert engine.warmed
    assert engine.closed


async def test_a_version_is_warm_before_it_is_live(make: Make, tmp_path: Path) -> None:
    make_model_folder(tmp_path, 1)
    opener = FakeOpener()
    store = make(open_engines=opener)
    await store.load()
    assert opener.engines[1].warmed
    assert sum(map(len, opener.engines[1].batches)) == 7  # the golden images
    assert len(opener.engines[1].threads) == 1


async def test_float32_serves_where_a_variant_does_not_give_the_golden_logits(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = make_model_folder(tmp_path, 1)
    other = make_model_folder(tmp_path / "elsewhere", 2, precision="int8")
    (other / "model.onnx").rename(version / "model.int8.onnx")
    store = make()
    await store.load()
    assert store.live is not None
    assert store.live.metadata.precision == "float32"
    assert "version 1: float32 instead of int8, since the golden images give other logits" in caplog.text
    await assert_serves(store, 1)


async def test_a_requested_variant_is_not_replaced(make: Make, tmp_path: Path) -> None:
    version = make_model_folder(tmp_path, 1)
    other = make_model_folder(tmp_path / "elsewhere", 2, precision="int8")
    (other / "model.onnx").rename(version / "model.int8.onnx")
    with pytest.raises(NoUsableVersionError, match="golden"):
        await ModelStore(store_settings(tmp_path, precision="int8"), StoreRecorder()).load()


async def test_engines_of_a_cpu_serve_together_and_a_version_takes_over_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by default on two cores: two engines and one for an image alone, real ones, with measured batch sizes."""
    monkeypatch.setattr(versions_module, "usable_cores", lambda: 2)
    store = ModelStore(store_settings(tmp_path, intra_op_threads=0, tune_batch_size=True), StoreRecorder())
    for version in (1, 2):
        make_model_folder(tmp_path, version)
        await store.reload()
        for together in (1, 40, 1):
            answers = await asyncio.gather(*(answer(store, seed) for seed in range(together)))
            for seed, (named, logits) in enumerate(answers):
                assert named == version
                np.testing.assert_allclose(logits, tiny_logits(tiny_images(1, seed), version)[0], atol=1e-4)
    await store.close()
