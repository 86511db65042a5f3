"""Request bodies to image files: multipart/form-data, JSON with base64, or the bare bytes of one file.

Images are counted while the body is parsed. A URL in a body is never fetched.
"""

import re
from binascii import a2b_base64
from codecs import BOM_UTF8
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from imaging.formats import is_image
from service.decoding.upload import Upload, which
from service.errors import (
    BodyTooLarge,
    InvalidBase64,
    InvalidForm,
    InvalidJson,
    NoImage,
    TooManyImages,
    UnsupportedMediaType,
)

FORM: Final = "multipart/form-data"
JSON: Final = "application/json"
BLANKS: Final = b" \t\r\n\f\v"
# RFC 5987
EXTENDED_NAME: Final = re.compile(rb";\s*filename\*=\"?(utf-8|iso-8859-1)'[^';]{0,40}'([^\";]*)", re.IGNORECASE)
SPARE_STRINGS: Final = 1000  # in JSON, beside the images; where there are more, no object is made of them


def check_size(size: int, max_bytes: int) -> None:
    """Raise BodyTooLarge for a size, announced or counted, above the limit."""
    if size > max_bytes:
        raise BodyTooLarge(f"The body is larger than the {max_bytes} bytes that are allowed.")


@lru_cache(maxsize=128)  # a client sends the same each time, and errors are not kept
def media_type_of(content_type: str) -> str:
    """Return the media type of a header's value, in lower case; anything but FORM and JSON is that of an image.

    Raises:
        UnsupportedMediaType
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("image/") or media_type in ("", "application/octet-stream", FORM, JSON):
        return media_type
    raise UnsupportedMediaType()


def check_content_type(content_type: str) -> None:
    """Raise what `parse_body` would, whatever the body: before it is read.

    Raises:
        UnsupportedMediaType, InvalidForm
    """
    if media_type_of(content_type) == FORM:
        boundary_of(content_type)


def parse_body(content_type: str, body: bytes, *, max_images: int) -> list[Upload]:
    """Take the image files out of a body; never empty.

    Args:
        content_type: the header's value; "" where there is none, which is read as application/octet-stream.
        body: all of it.
        max_images: most images that a request may hold.

    Raises:
        UnsupportedMediaType, InvalidForm, InvalidJson, InvalidBase64, NoImage, TooManyImages
    """
    media_type = media_type_of(content_type)
    if media_type == FORM:
        uploads = parse_form(content_type, body, max_images)
    elif media_type == JSON:
        uploads = parse_json(body, max_images)
    else:
        uploads = [Upload(body)]
    for index, upload in enumerate(uploads):
        if not upload.data:
            raise NoImage(f"{which(uploads, index)}The image is empty: it has 0 bytes.")
    return uploads


class JsonBody(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON body; the decoder makes nothing of what does not fit it."""

    image: str | msgspec.UnsetType = msgspec.UNSET
    images: list[str] | msgspec.UnsetType = msgspec.UNSET


JSON_BODY: Final = msgspec.json.Decoder(JsonBody)


def parse_json(body: bytes, max_images: int) -> list[Upload]:
    """Read {"image": base64} or {"images": [base64, ...]}."""
    quotes = body.count(b'"')
    if quotes > 2 * (max_images + SPARE_STRINGS):
        if b'"images"' in body[:100]:
            check_count(quotes // 2, max_images)
        raise InvalidJson(f"The body holds more strings than {max_images} images need. {InvalidJson.default}")
    try:
        content = JSON_BODY.decode(body.removeprefix(BOM_UTF8))
    except msgspec.ValidationError as error:
        raise InvalidJson(f"{InvalidJson.default} {str(error)[:200]}.") from error
    except ValueError as error:
        raise InvalidJson(f"The body is not JSON: {str(error)[:200]}.") from error
    match content.image, content.images:
        case str(text), msgspec.UNSET:
            return [Upload(decode_base64(text, "image"))]
        case msgspec.UNSET, list(texts):
            if not texts:
                raise NoImage("The list images is empty.")
            check_count(len(texts), max_images)
            return [Upload(decode_base64(text, f"images[{i}]")) for i, text in enumerate(texts)]
    raise InvalidJson()


def decode_base64(text: str, where: str) -> bytes:
    """Decode base64, bare or as a data: URL; line breaks are allowed, other characters are not."""
    scheme = text[:6].lower()
    if scheme.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidBase64(f"{where}: a data: URL must have the form data:image/png;base64,<base64>.")
    elif scheme.startswith(("http:", "https:", "file:", "ftp:")):
        raise InvalidBase64(f"{where} is a URL, and URLs are not fetched; send the image itself in base64.")
    try:
        return a2b_base64(text.encode("ascii").translate(None, BLANKS), strict_mode=True)
    except ValueError as error:
        raise InvalidBase64(
            f"{where} is not valid base64: the alphabet is A-Z, a-z, 0-9, + and /, padded with = to a multiple of 4."
        ) from error


def check_count(images: int, max_images: int) -> None:
    """Raise TooManyImages above the limit."""
    if images > max_images:
        raise TooManyImages(f"The request holds more than the {max_images} images that are allowed.")


def boundary_of(content_type: str) -> bytes:
    """Return what stands between the parts of a form."""
    boundary: bytes | None = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidForm("The Content-Type multipart/form-data names no boundary.")
    return boundary


def parse_form(content_type: str, body: bytes, max_images: int) -> list[Upload]:
    """Read every file of a multipart/form-data body, whatever its field is called."""
    form = Form(max_images)
    try:
        parser = MultipartParser(boundary_of(content_type), form.callbacks())
        parser.write(body)
    except FormParserError as error:
        raise InvalidForm(f"The body is not valid multipart/form-data: {error}.") from error
    if not form.ended:
        raise InvalidForm("The form ends before its closing boundary.")
    if not form.uploads:
        raise NoImage("The form holds no file; send one with: curl -F file=@image.jpg")
    return form.uploads


def extended_name(disposition: bytes) -> bytes | None:
    """Return the file name, as UTF-8, that a part has in another spelling only.

    RFC 7578 forbids it, so the plain one counts where there is one; some clients send nothing else.
    """
    if (found := EXTENDED_NAME.search(disposition)) is None:
        return None
    charset, name = found[1].decode(), unquote_to_bytes(found[2].rstrip())
    return name.decode(charset, "replace").encode()


class Form:
    """Collects the files of a form from the parser's callbacks.

    Attributes:
        uploads: the files in their order; a file input that was left empty is none.
        ended: whether the closing boundary was seen.
    """

    def __init__(self, max_images: int) -> None:
        self.max_images = max_images
        self.uploads: list[Upload] = []
        self.ended = False

    def callbacks(self) -> Any:
        """Return what MultipartParser calls; all of the body comes in one write, so no value comes in pieces."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._name,
            "on_header_value": self._value,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.chunks: list[bytes] = []

    def _name(self, data: bytes, start: int, end: int) -> None:
        self.header = data[start:end].lower()

    def _value(self, data: bytes, start: int, end: int) -> None:
        self.headers[self.header] = data[start:end]

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.chunks.append(data[start:end])

    def _end(self) -> None:
        disposition = self.headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        filename = options.get(b"filename")
        if filename is None:
            filename = extended_name(disposition)
        data = b"".join(self.chunks)
        if not data and filename == b"":
            return  # what a browser sends for a file input in which nothing was chosen
        if filename is None and not self._holds_image(data):
            field = options.get(b"name", b"").decode("utf-8", "replace")[:40]
            raise InvalidForm(f"The field {field!r} is not a file; options such as top_k go into the query string.")
        check_count(len(self.uploads) + 1, self.max_images)
        self.uploads.append(Upload(data, None if filename is None else filename.decode("utf-8", "replace")))

    def _holds_image(self, data: bytes) -> bool:
        """Whether a part without a file name is an image all the same, as from `curl -F 'file=<image.jpg'`."""
        if self.headers.get(b"content-type", b"").startswith((b"image/", b"application/octet-stream")):
            return True
        return is_image(data)

    def _finish(self) -> None:
        self.ended = True
