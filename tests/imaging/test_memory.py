"""What decoding an image takes at its peak, as `max_pixels` says: who sizes a container's memory counts on it."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.process import ROOT
from tests.imaging.files import encode

WIDTH, HEIGHT = 4000, 2000
SPARE_BYTES = 8 * 1024**2  # for what does not grow with the image
# In a process of its own, whose peak begins with it.
PROGRAM = """
import sys
from pathlib import Path
from imaging.decoder import decode_image

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

data = sys.stdin.buffer.read()
before = peak()
decode_image(data, size=(32, 32), max_pixels=10**8)
print(1024 * (peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
@pytest.mark.parametrize(
    ("mode", "name", "most", "options"),
    [
        ("RGBA", "PNG", 12, {}),
        ("LA", "PNG", 12, {}),
        ("I;16", "PNG", 12, {}),
        ("I;16", "PNG", 12, {"transparency": 0}),
        ("RGB", "PNG", 12, {"transparency": (0, 0, 0)}),
        ("CMYK", "TIFF", 12, {"compression": "tiff_deflate"}),
        ("RGBA", "WEBP", 16, {"quality": 0, "method": 0}),
    ],
)
def test_bytes_a_pixel_of_a_image_that_lies_on_its_side(
    mode: str, name: str, most: int, options: dict[str, object]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new(mode, (WIDTH, HEIGHT)), name, exif=exif, **options)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=data, cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert int(done.stdout) <= most * WIDTH * HEIGHT + SPARE_BYTES
