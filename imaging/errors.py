# ruff: noqa: N818 - the service answers with these names; the suffix would say "Error" of each twice
"""What can be wrong with an image file. The class says which kind, the message what was wrong and what would be right.

    ImageError
    ├── NotAnImage           the bytes are in no image format that is known here
    ├── UnsupportedFormat    a format, or a variant of one, that is not decoded here
    ├── TruncatedImage       the file begins well and ends too early, or is damaged within
    ├── TooManyPixels        more pixels than the caller allows
    └── ImageTooCostly       few pixels, but a structure that would take a decoder seconds or gigabytes

A message is a public sentence: it holds nothing of the machine that read the file. Standard library only.
"""

FORMATS = "JPEG, PNG, WebP, BMP, GIF or TIFF"


class ImageError(Exception):
    """Base of all reasons for which the bytes of a file give no pixels.

    Attributes:
        message: public sentence; the class's own where the instance was given none.
    """

    default = "The image can't be read."

    def __init__(self, message: str | None = None) -> None:
        self.message = message or self.default
        super().__init__(self.message)


class NotAnImage(ImageError):
    """The bytes are in no image format that is known here."""

    default = f"The bytes are not an image; it must be a {FORMATS} file."


class UnsupportedFormat(ImageError):
    """An image format, or a variant of one, that is not decoded here."""

    default = f"This image format is not supported; save the image as a {FORMATS} file."


class TruncatedImage(ImageError):
    """The file begins well and ends too early, or is damaged within."""

    default = "The image is truncated or damaged."


class TooManyPixels(ImageError):
    """The header announces more pixels than the caller allows."""

    default = "The image has too many pixels."


class ImageTooCostly(ImageError):
    """Decoding would cost far more than the image's pixels account for."""

    default = "The image would take too much work to decode; save it again with an image editor."
