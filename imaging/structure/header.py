"""What every format's walker returns."""

from dataclasses import dataclass
from typing import Literal

from imaging.errors import ImageTooCostly

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]


@dataclass(slots=True)  # not frozen: that costs a microsecond
class Header:
    """What a file says before its pixels.

    Attributes:
        format: Pillow's name of it.
        width: in pixels, before the image is turned upright.
        height: likewise.
        parts: the file without what its pixels don't need, in pieces: text, profiles, EXIF, later frames. So what a
            decoder does with these costs nothing, and can't fail.
        orientation: EXIF's, 1 to 8.
        frame: left, upper, right, lower of the first frame of an animation; None: it fills the image.
        passes: over all pixels, that decoding takes at most; None: the file's structure does not bound it.
    """

    format: Format
    width: int
    height: int
    parts: list[bytes | memoryview]
    orientation: int = 1
    frame: tuple[int, int, int, int] | None = None
    passes: int | None = None

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    def essential(self) -> bytes:
        """Return the file without what its pixels don't need."""
        return bytes(self.parts[0]) if len(self.parts) == 1 else b"".join(self.parts)


def check_count(count: int, limit: int, things: str) -> None:
    """Raise ImageTooCostly above a limit on a file's parts, which cost a decoder time one by one."""
    if count > limit:
        raise ImageTooCostly(
            f"The image has more than {limit} {things}, which would take too much work to decode; "
            "save it again with an image editor."
        )
