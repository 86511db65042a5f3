"""Which way up an image is: EXIF's orientation, from EXIF itself or from XMP.

Read here and not by Pillow, which reads every tag to find this one: hundreds of megabytes for a block of 64 KiB whose
tags all point to the same bytes.
"""

import re
from typing import Final

from imaging.structure.directory import read_directory

ORIENTATION: Final = 0x0112
XMP_ORIENTATION: Final = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
EXIF_PREFIX: Final = b"Exif\0\0"


def of_exif(block: bytes) -> int | None:
    """Return the orientation in a block of EXIF, with or without its prefix; None where it has none or is damaged."""
    while block.startswith(EXIF_PREFIX):
        block = block[len(EXIF_PREFIX) :]
    try:
        directory = read_directory(block)
        return directory.first(ORIENTATION)
    except (ValueError, IndexError):
        return None


def of_xmp(packet: bytes) -> int | None:
    """Return the orientation in a packet of XMP; None where it has none."""
    found = XMP_ORIENTATION.search(packet)
    return int(found[1]) if found else None


def chosen(exif: int | None, xmp: int | None) -> int:
    """Return the orientation of an image that has both kinds of metadata: 1 to 8, by EXIF if it says any."""
    said = exif if exif is not None else xmp
    return said if said is not None and 1 <= said <= 8 else 1
