"""Every hand-made file that the tests of images share: all formats and pixel formats, good ones and bad ones."""

from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from tests.imaging.files import all_files, encode, pixels, planar_tiff, png_announcing

DATA = Path(__file__).parent / "data"
RANDOM = np.random.default_rng(0)
COLOUR = Image.fromarray(RANDOM.integers(0, 256, (24, 31, 3), dtype=np.uint8))
ALPHA = Image.fromarray(RANDOM.integers(0, 256, (24, 31, 4), dtype=np.uint8))
DEEP = Image.fromarray(RANDOM.integers(0, 65536, (24, 31), dtype=np.uint16))


def exif(orientation: int) -> Image.Exif:
    metadata = Image.Exif()
    metadata[0x0112] = orientation
    return metadata


def tags(values: dict[int, int]) -> TiffImagePlugin.ImageFileDirectory_v2:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in values.items():
        directory[tag] = value
    return directory


def good_files() -> dict[str, bytes]:
    """Files that give pixels, by name."""
    return all_files(pixels(24, 31)) | {
        "colour.png": encode(COLOUR, "PNG"),
        "colour.jpg": encode(COLOUR, "JPEG"),
        "colour.webp": encode(COLOUR, "WEBP"),
        "colour.bmp": encode(COLOUR, "BMP"),
        "colour.tif": encode(COLOUR, "TIFF"),
        "animated.gif": encode(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(180)]),
        "bits.png": encode(COLOUR.convert("1"), "PNG"),
        "grey.png": encode(COLOUR.convert("L"), "PNG"),
        "palette.png": encode(COLOUR.quantize(16), "PNG"),
        "palette-transparent.png": encode(COLOUR.quantize(16), "PNG", transparency=3),
        "palette-alpha.png": encode(COLOUR.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        "alpha.png": encode(ALPHA, "PNG"),
        "alpha.webp": encode(ALPHA, "WEBP", lossless=True),
        "alpha.tif": encode(ALPHA, "TIFF"),
        "grey-alpha.png": encode(ALPHA.convert("LA"), "PNG"),
        "colour-key.png": encode(COLOUR, "PNG", transparency=COLOUR.getpixel((3, 4))),
        "cmyk.jpg": encode(COLOUR.convert("CMYK"), "JPEG"),
        "cmyk.tif": encode(COLOUR.convert("CMYK"), "TIFF"),
        "deep.png": encode(DEEP, "PNG"),
        "deep-transparent.png": encode(DEEP, "PNG", transparency=DEEP.getpixel((3, 4))),
        "deep.tif": encode(DEEP, "TIFF"),
        "deep-white-is-zero.tif": encode(DEEP, "TIFF", tiffinfo=tags({262: 0})),
        "turned-deep.png": encode(DEEP, "PNG", exif=exif(6)),
        "turned-deep.tif": encode(DEEP, "TIFF", tiffinfo=tags({274: 8, 262: 0})),
        "turned.webp": encode(COLOUR, "WEBP", exif=exif(5), lossless=True),
        "turned.tif": encode(COLOUR, "TIFF", tiffinfo=tags({274: 3})),
        "damaged-exif.png": encode(COLOUR, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        **{f"turned-{way}.png": encode(COLOUR, "PNG", exif=exif(way)) for way in range(1, 9)},
        **{f"turned-{way}.jpg": encode(COLOUR, "JPEG", exif=exif(way)) for way in range(1, 9)},
        "planar.tif": planar_tiff(np.asarray(COLOUR), compressed=False),
        "planar-deep.tif": planar_tiff(np.asarray(COLOUR).astype(np.uint16) * 257, compressed=True),
        "exact.jpg": encode(COLOUR.resize((24, 24)), "JPEG"),
        "two-images.jpg": encode(COLOUR, "MPO", save_all=True, append_images=[COLOUR.rotate(180)]),
        "large.jpg": encode(COLOUR.resize((803, 601)), "JPEG"),
        "large-progressive.jpg": encode(COLOUR.resize((800, 608)), "JPEG", progressive=True),
        **{path.name: path.read_bytes() for path in sorted(DATA.iterdir()) if path.name not in UNSUPPORTED},
    }


UNSUPPORTED = ("bmp_masks_rgb.bmp", "tiff_la_assoc.tif")


def bad_files() -> dict[str, bytes]:
    """Files that give none."""
    return {
        "nothing": b"",
        "text": b"hello",
        "icon.ico": encode(COLOUR, "ICO"),
        "cut.png": encode(COLOUR, "PNG")[:700],
        "cut.jpg": encode(COLOUR, "JPEG")[:700],
        "cut.tif": encode(COLOUR, "TIFF")[:700],
        "cut.gif": encode(COLOUR, "GIF")[:300],
        "gigantic.png": png_announcing(100_000, 100_000),
        "floats.tif": encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
        **{name: (DATA / name).read_bytes() for name in UNSUPPORTED},
    }
