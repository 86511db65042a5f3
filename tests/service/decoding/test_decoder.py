"""Where images are decoded, and under which limits."""

import numpy as np
import pytest

from imaging.decoder import decode_image
from service.api.payload import Upload
from service.decoding.decoder import SERVICE_ERRORS, Decoder
from service.errors import ImageTooCostly, TooManyPixels, UnsupportedFormat
from service.settings import Settings
from tests.fakes import tiny_metadata
from tests.imaging.files import all_files, encode, pixels

ARRAY = pixels()
SIZE = ARRAY.shape[:2]
METADATA = tiny_metadata(input_size=SIZE)


async def test_a_image_of_many_scans_leaves_the_event_loop() -> None:
    data = encode(ARRAY, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + scan * 80 + data[-2:]
    decoder = Decoder(Settings(decode_threads=1))
    assert decoder.decode_here([Upload(data)], METADATA) is not None
    assert decoder.decode_here([Upload(many)], METADATA) is None
    decoder.close()


@pytest.mark.parametrize("name", all_files(ARRAY))
async def test_only_jpeg_and_png_are_decoded_on_the_event_loop(name: str) -> None:
    decoder = Decoder(Settings(decode_threads=1))
    data = all_files(ARRAY)[name]
    decoded = decoder.decode_here([Upload(data)], METADATA)
    assert (decoded is not None) is name.startswith(("JPEG", "PNG"))
    (in_thread,) = await decoder.decode([Upload(data)], METADATA, deadline=1e9)
    np.testing.assert_array_equal(in_thread, decode_image(data, size=SIZE, max_pixels=10_000))
    decoder.close()


async def test_limits_hold() -> None:
    decoder = Decoder(Settings(max_pixels=1000, decode_threads=1))
    uploads = [Upload(encode(ARRAY, "JPEG"))]
    assert decoder.decode_here(uploads, METADATA) is None
    with pytest.raises(TooManyPixels):
        await decoder.decode(uploads, METADATA, deadline=1e9)
    decoder.close()
    decoder = Decoder(Settings(decode_threads=1))
    (decoded,) = decoder.decode_here(uploads, METADATA) or ()
    np.testing.assert_array_equal(decoded, decode_image(uploads[0].data, size=SIZE, max_pixels=10_000))
    decoder.close()


def test_each_error_of_an_image_has_an_answer_of_its_own() -> None:
    kinds = {kind.__name__: answer.__name__ for kind, answer in SERVICE_ERRORS.items()}
    assert kinds == {name: name for name in kinds}
    assert len(kinds) == 5
    assert (ImageTooCostly.status, UnsupportedFormat.status) == (413, 415)
