"""Where images are decoded, and under which limits. The processes are real."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image

from imaging.decoder import decode_image
from imaging.errors import ImageError
from service.api.payload import Upload
from service.decoding.decode_process import ERRORS
from service.decoding.decoder import SERVICE_ERRORS, Decoder, process_count
from service.engine.cpus import usable_cpus
from service.errors import DeadlineExceeded, ImageTooCostly, TooManyPixels, Unavailable, UnsupportedFormat
from service.settings import Settings
from tests.fakes import InPlacePool, tiny_metadata
from tests.imaging.files import all_files, encode, pixels
from tests.imaging.hand_made import bad_files, good_files

ARRAY = pixels()
SIZE = ARRAY.shape[:2]
METADATA = tiny_metadata(input_size=SIZE)
LARGE = encode(Image.new("RGB", (4000, 4000)), "PNG")  # which takes over 50 ms, and 64 MB
NEVER = 1e9


@asynccontextmanager
async def processes(**settings: object) -> AsyncIterator[tuple[Decoder, list[str]]]:
    """A decoder with processes, one unless told, and the reasons for which these have ended."""
    reasons: list[str] = []
    decoder = Decoder(Settings.model_validate({"decode_processes": 1} | settings), reasons.append)
    await decoder.start()
    try:
        yield decoder, reasons
    finally:
        decoder.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for belongs to the code under test
            await asyncio.sleep(0.005)


async def test_an_image_of_many_scans_leaves_the_event_loop() -> None:
    data = encode(ARRAY, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + scan * 80 + data[-2:]
    decoder = Decoder(Settings())
    assert decoder.decode_inline([Upload(data)], METADATA) is not None
    assert decoder.decode_inline([Upload(many)], METADATA) is None


async def test_only_jpeg_and_png_are_decoded_on_the_event_loop() -> None:
    decoder = Decoder(Settings())
    for name, data in all_files(ARRAY).items():
        decoded = decoder.decode_inline([Upload(data)], METADATA)
        assert (decoded is not None) is name.startswith(("JPEG", "PNG")), name


async def test_a_process_sees_what_this_one_sees() -> None:
    async with processes(decode_processes=2) as (decoder, reasons):
        for files in (all_files(ARRAY), good_files()):
            for name, data in files.items():
                (decoded,) = await decoder.decode([Upload(data)], METADATA, NEVER)
                np.testing.assert_array_equal(decoded, decode_image(data, size=SIZE, max_pixels=10**7), err_msg=name)
        for name, data in bad_files().items():
            with pytest.raises(ImageError) as here:
                decode_image(data, size=SIZE, max_pixels=Settings().max_pixels)
            with pytest.raises(SERVICE_ERRORS[type(here.value)]) as there:
                await decoder.decode([Upload(data)], METADATA, NEVER)
            assert str(there.value) == str(here.value), name
        assert reasons == []


async def test_several_images_come_in_their_order_and_an_error_names_its_own() -> None:
    async with processes(decode_processes=2) as (decoder, _):
        arrays = [pixels(seed=seed) for seed in range(5)]
        uploads = [Upload(encode(array, "PNG")) for array in arrays]
        for array, decoded in zip(arrays, await decoder.decode(uploads, METADATA, NEVER), strict=True):
            np.testing.assert_array_equal(decoded, array)
        uploads[3] = Upload(uploads[3].data[:60], "x.png")
        with pytest.raises(Exception, match=r"Image 4 of 5 \('x.png'\): The PNG image is truncated"):
            await decoder.decode(uploads, METADATA, NEVER)


async def test_limits_hold() -> None:
    decoder = Decoder(Settings(max_pixels=1000))
    decoder.processes = InPlacePool(decoder.processes)
    uploads = [Upload(encode(ARRAY, "JPEG"))]
    assert decoder.decode_inline(uploads, METADATA) is None
    with pytest.raises(TooManyPixels):
        await decoder.decode(uploads, METADATA, deadline=1e9)
    decoder = Decoder(Settings())
    (decoded,) = decoder.decode_inline(uploads, METADATA) or ()
    np.testing.assert_array_equal(decoded, decode_image(uploads[0].data, size=SIZE, max_pixels=10_000))


@pytest.mark.parametrize(
    ("settings", "sentence", "reason"),
    [
        ({"decode_cpu_s": 0.02}, "0.02 s of CPU time that are allowed", ["cpu_limit"]),
        ({"decode_timeout_s": 0.02}, "0.02 s that are allowed", ["time_limit"]),
        ({"decode_memory_bytes": 20 << 20}, "20 MiB of memory that are allowed", []),  # the process goes on
    ],
)
async def test_what_takes_too_much_is_told_so_and_the_next_image_is_decoded(
    settings: dict[str, object], sentence: str, reason: list[str]
) -> None:
    small = Upload(encode(pixels(6, 4), "BMP"))
    async with processes(**settings) as (decoder, reasons):
        for _ in range(2):
            with pytest.raises(ImageTooCostly, match=sentence):
                await decoder.decode([Upload(LARGE)], METADATA, NEVER)
            assert (await decoder.decode([small], METADATA, NEVER))[0].shape == (*SIZE, 3)
        assert reasons == 2 * reason


async def test_of_images_in_other_processes_none_is_lost() -> None:
    small = Upload(encode(ARRAY, "BMP"))
    async with processes(decode_processes=2, decode_cpu_s=0.05) as (decoder, _):
        others = asyncio.gather(*(decoder.decode([small], METADATA, NEVER) for _ in range(50)))
        with pytest.raises(ImageTooCostly):
            await decoder.decode([Upload(LARGE)], METADATA, NEVER)
        for (decoded,) in await others:
            np.testing.assert_array_equal(decoded, ARRAY)


async def test_who_waits_for_a_process_has_a_deadline() -> None:
    async with processes() as (decoder, reasons):
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(decoder.decode([Upload(LARGE)], METADATA, NEVER))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await decoder.decode([Upload(encode(ARRAY, "BMP"))], METADATA, loop.time() + 0.001)
        assert (await first)[0].shape == (*SIZE, 3)
        assert reasons == []


async def test_nothing_is_decoded_for_those_who_have_left() -> None:
    async with processes() as (decoder, _):
        first = asyncio.create_task(decoder.decode([Upload(LARGE)], METADATA, NEVER))
        waiting = [asyncio.create_task(decoder.decode([Upload(LARGE)], METADATA, NEVER)) for _ in range(100)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await first
        (decoded,) = await decoder.decode([Upload(encode(ARRAY, "BMP"))], METADATA, NEVER)
        np.testing.assert_array_equal(decoded, ARRAY)


# The formats that are accepted


async def test_a_format_that_is_switched_off_is_decoded_nowhere() -> None:
    decoder = Decoder(Settings(image_formats=("PNG", "WEBP")))
    decoder.processes = InPlacePool(decoder.processes)
    for name, data in all_files(ARRAY).items():
        uploads = [Upload(data)]
        if name.startswith(("PNG", "WEBP")):
            assert len(await decoder.decode(uploads, METADATA, NEVER)) == 1
            continue
        with pytest.raises(UnsupportedFormat, match=r"is not accepted here; send one of: PNG, WEBP\.$"):
            decoder.decode_inline(uploads, METADATA)
        with pytest.raises(UnsupportedFormat, match="is not accepted here"):
            await decoder.decode(uploads, METADATA, NEVER)


# Threads for parsing


async def test_a_thread_that_cannot_be_started_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    decoder = Decoder(Settings())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(5):
            with pytest.raises(Unavailable, match="no more threads"):
                await decoder.in_thread(lambda: 1, NEVER)
    assert await decoder.in_thread(lambda: 2, NEVER) == 2
    decoder.close()


async def test_threads_are_there_before_the_system_starts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    decoder = Decoder(Settings(decode_processes=1))
    await decoder.start()
    other = Decoder(Settings(decode_processes=1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        both = threading.Barrier(2)
        assert sorted(await asyncio.gather(*(decoder.in_thread(both.wait, NEVER) for _ in range(2)))) == [0, 1]
        with pytest.raises(OSError, match="no more threads"):
            await other.start()
    decoder.close()
    other.close()


async def test_what_runs_in_the_background_leaves_a_thread_to_others() -> None:
    decoder = Decoder(Settings())
    held = threading.Event()
    later = [asyncio.create_task(decoder.in_thread(held.wait, NEVER, is_background=True)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert await decoder.in_thread(lambda: 2, NEVER) == 2
    later.pop().cancel()  # which waits for a place
    held.set()
    assert await asyncio.gather(*later) == [True, True]
    decoder.close()


async def test_a_thread_that_is_late_keeps_its_place_until_it_ends() -> None:
    decoder = Decoder(Settings())
    held = threading.Event()
    soon = asyncio.get_running_loop().time() + 0.02
    for _ in range(4):
        with pytest.raises(DeadlineExceeded):
            await decoder.in_thread(held.wait, soon)
    held.set()
    assert await decoder.in_thread(lambda: 2, NEVER) == 2
    decoder.close()


# Beside


def test_each_error_of_an_image_has_an_answer_of_its_own() -> None:
    kinds = {kind.__name__: answer.__name__ for kind, answer in SERVICE_ERRORS.items()}
    assert kinds == {name: name for name in kinds}
    assert set(SERVICE_ERRORS) == set(ERRORS) == set(ImageError.__subclasses__())
    assert (ImageTooCostly.status, UnsupportedFormat.status) == (413, 415)


def test_workers_share_the_processors() -> None:
    assert process_count(Settings(decode_processes=7, workers=2)) == 7
    assert process_count(Settings()) == min(usable_cpus(), 4)
    assert process_count(Settings(workers=64)) == 1
