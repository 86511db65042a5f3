"""Training and service read the same pixels from every hand-made file, and say the same where there are none."""

from pathlib import Path

import numpy as np
import pytest

from service.api.payload import Upload
from service.decoding.decoder import Decoder
from service.errors import ServiceError
from service.settings import Settings
from tests.fakes import InPlacePool, tiny_metadata
from tests.imaging.hand_made import bad_files, good_files
from training.data import image_files
from training.data.dataset import DataError
from training.data.image_files import read_image

GOOD, BAD = good_files(), bad_files()


@pytest.fixture
async def decoder() -> Decoder:
    decoder = Decoder(Settings())
    decoder.processes = InPlacePool(decoder.processes)
    return decoder


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("size", [24, 13, 40])
async def test_training_reads_what_the_service_reads(tmp_path: Path, decoder: Decoder, name: str, size: int) -> None:
    (tmp_path / name).write_bytes(GOOD[name])
    read = read_image(tmp_path / name, size)
    assert (read.shape, read.dtype) == ((size, size, 3), np.uint8)
    uploads, metadata = [Upload(GOOD[name])], tiny_metadata(input_size=(size, size))
    (served,) = await decoder.decode(uploads, metadata, deadline=1e9)
    np.testing.assert_array_equal(read, served)
    if (at_once := decoder.decode_inline(uploads, metadata)) is not None:
        np.testing.assert_array_equal(read, at_once[0])


@pytest.mark.parametrize("name", BAD)
async def test_training_says_what_the_service_says(
    tmp_path: Path, decoder: Decoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", Settings().max_pixels)
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(ServiceError) as served:
        await decoder.decode([Upload(BAD[name])], tiny_metadata(), deadline=1e9)
    with pytest.raises(DataError) as read:
        read_image(tmp_path / name, 24)
    assert f"{name}: this image cannot be read ({served.value.message}); replace it" in str(read.value)
