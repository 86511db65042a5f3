"""Request bodies to image files: multipart/form-data, JSON with base64, or the bare bytes of one file.

Images are counted while the body is parsed. A URL in a body is never fetched.
"""

import re
from binascii import a2b_base64
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec
from python_multipart.multipart import parse_options_header

from imaging.formats import is_image
from service.decoding.upload import Upload, which
from service.errors import (
    BodyTooLarge,
    InvalidBase64,
    InvalidForm,
    InvalidJson,
    NoImage,
    ServiceError,
    TooManyImages,
    UnsupportedMediaType,
)

FORM: Final = "multipart/form-data"
JSON: Final = "application/json"
OPTIONS: Final = frozenset({"top_k", "label", "normalize"})
BYTES: Final = frozenset({"application/octet-stream", "binary/octet-stream"})  # the second is what S3 says
URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")  # RFC 4648, section 5
# RFC 5987
EXTENDED_NAME: Final = re.compile(rb";\s*filename\*=\"?(utf-8|iso-8859-1)'[^';]{0,40}'([^\";]*)", re.IGNORECASE)
SPARE_STRINGS: Final = 1000  # in JSON, beside the images; where there are more, no object is made of them
SPARE_PARTS: Final = 100  # in a form, beside the images
MAX_PART_HEAD_BYTES: Final = 4096  # the quoted strings in one take quadratic time
END_OF_DELIMITER: Final = re.compile(rb"(--)|[ \t]*\r\n")  # the closing one's, or what ends the line of another
FOLD: Final = re.compile(rb"\r\n(?=[ \t])")  # RFC 5322, section 2.2.3
IDENTITY: Final = frozenset({b"", b"binary", b"8bit", b"7bit"})  # Content-Transfer-Encoding that changes nothing


@dataclass(slots=True)
class Payload:
    """What a body holds.

    Attributes:
        uploads: the image files in their order; never empty.
        options: a form's text fields whose names are those of query parameters, as they were sent.
    """

    uploads: list[Upload]
    options: dict[str, str] = field(default_factory=dict)


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
    if media_type.startswith("image/") or media_type in ("", FORM, JSON) or media_type in BYTES:
        return media_type
    raise UnsupportedMediaType()


def check_content_type(content_type: str) -> None:
    """Raise what `parse_body` would, whatever the body: before it is read.

    Raises:
        UnsupportedMediaType, InvalidForm
    """
    if media_type_of(content_type) == FORM:
        boundary_of(content_type)


def parse_body(content_type: str, body: bytes, *, max_images: int) -> Payload:
    """Take the image files out of a body.

    Args:
        content_type: the header's value; "" where there is none, which is read as application/octet-stream.
        body: all of it.
        max_images: most images that a request may hold.

    Raises:
        UnsupportedMediaType, InvalidForm, InvalidJson, InvalidBase64, NoImage, TooManyImages
    """
    media_type = media_type_of(content_type)
    if media_type == FORM:
        payload = parse_form(content_type, body, max_images)
    elif media_type == JSON:
        payload = Payload(parse_json(body, max_images))
    else:
        payload = Payload([Upload(body)])
    check_not_empty(payload.uploads)
    return payload


def check_not_empty(uploads: Sequence[Upload]) -> None:
    """Raise NoImage for a file of no bytes."""
    for index, upload in enumerate(uploads):
        if not upload.data:
            raise NoImage(f"{which(uploads, index)}The image is empty: it has 0 bytes.")


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
    """Decode base64 of either alphabet, padded or not, bare or as a data: URL; line breaks alone are skipped."""
    scheme = text[:6].lower()
    if scheme.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidBase64(f"{where}: a data: URL must have the form data:image/png;base64,<base64>.")
    elif scheme.startswith(("http:", "https:", "file:", "ftp:")):
        raise InvalidBase64(f"{where} is a URL, and URLs are not fetched; send the image itself in base64.")
    try:
        return decode_bytes(text.encode("ascii"), where)
    except UnicodeEncodeError as error:
        raise not_base64(where) from error


def decode_bytes(text: bytes, where: str) -> bytes:
    """Decode the bytes of base64, as `decode_base64`."""
    text = text.translate(URL_SAFE, b"\r\n")
    if len(text) % 4 and not text.endswith(b"="):
        text += b"=" * (-len(text) % 4)
    try:
        return a2b_base64(text, strict_mode=True)
    except ValueError as error:
        if b" " in text:  # decoded as a web form's value, + becomes a blank: skipped, it would be another image
            raise InvalidBase64(f"{where} holds blanks in its base64; where they were +, send + as it is.") from error
        raise not_base64(where) from error


def not_base64(where: str) -> ServiceError:
    """Return what is said of text with other characters, or of a wrong length."""
    return InvalidBase64(
        f"{where} is not valid base64: the alphabet is A-Z, a-z, 0-9, + and / (or - and _), in lines or not, "
        "padded with = to a multiple of 4 or not at all."
    )


def check_count(images: int, max_images: int) -> None:
    """Raise TooManyImages above the limit."""
    if images > max_images:
        raise TooManyImages(f"The request holds more than the {max_images} images that are allowed.")


def boundary_of(content_type: str) -> bytes:
    """Return what stands between the parts of a form."""
    if len(content_type) > MAX_PART_HEAD_BYTES:
        raise InvalidForm(f"The Content-Type of the form is larger than {MAX_PART_HEAD_BYTES} bytes.")
    boundary: bytes | None = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidForm("The Content-Type multipart/form-data names no boundary.")
    return boundary


def parse_form(content_type: str, body: bytes, max_images: int) -> Payload:
    """Read every file of a multipart/form-data body, whatever its field is called, and the fields of OPTIONS."""
    payload = Payload([])
    for number, (head, content) in enumerate(parts_of(body, boundary_of(content_type)), 1):
        if number > max_images + SPARE_PARTS:
            raise InvalidForm(f"The form has more than {max_images + SPARE_PARTS} parts.")
        headers = part_headers(head)
        disposition = headers.get(b"content-disposition", b"")
        options = parse_options_header(disposition)[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            filename = extended_name(disposition)
        content = transfer_decoded(content, headers, name)
        if not content and filename == b"":
            continue  # what a browser sends for a file input in which nothing was chosen
        if filename is None and not holds_image(content, headers):
            if name in OPTIONS:
                payload.options[name] = content.decode("utf-8", "replace")
            continue  # a token against forgery, a note: the commonest habit of clients
        check_count(len(payload.uploads) + 1, max_images)
        payload.uploads.append(Upload(content, None if filename is None else filename.decode("utf-8", "replace")))
    if not payload.uploads:
        raise NoImage("The form holds no file; send one with: curl -F file=@image.jpg")
    return payload


def parts_of(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the head and the content of each part of a form; what stands before the first and behind the last is none.

    Raises:
        InvalidForm: there is no closing boundary, or a head is too large.
    """
    delimiter = b"\r\n--" + boundary  # RFC 2046, section 5.1.1: its line end is no content
    begin = None
    at = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    while at != -1:
        after = at + len(delimiter)
        if (line := END_OF_DELIMITER.match(body, after)) is not None:  # else content that begins like one
            if begin is not None:
                yield part_of(body, begin, at)
            if line[1]:
                return
            begin = after = line.end()
        at = body.find(delimiter, after)
    raise InvalidForm("The form ends before its closing boundary.")


def part_of(body: bytes, begin: int, end: int) -> tuple[bytes, bytes]:
    """Return the head and the content of the part at these bytes."""
    if body.startswith(b"\r\n", begin):
        return b"", body[begin + 2 : end]
    head_end = body.find(b"\r\n\r\n", begin, end)
    if head_end == -1:  # no content, not even an empty one
        head_end = end
    if head_end - begin > MAX_PART_HEAD_BYTES:
        raise InvalidForm(f"The headers of a part of the form are larger than {MAX_PART_HEAD_BYTES} bytes.")
    return body[begin:head_end], body[head_end + 4 : end]


def part_headers(head: bytes) -> dict[bytes, bytes]:
    """Return the headers of a part, names in lower case; a value may be folded over several lines."""
    headers = {}
    for line in FOLD.sub(b"", head).split(b"\r\n") if head else ():
        name, colon, value = line.partition(b":")
        if not colon:
            raise InvalidForm(f"A header of a part of the form has no colon: {line[:40].decode('latin-1')!a}.")
        headers[name.strip().lower()] = value.strip()
    return headers


def transfer_decoded(content: bytes, headers: dict[bytes, bytes], field: str) -> bytes:
    """Undo a part's Content-Transfer-Encoding, which RFC 7578 deprecates and mail libraries write."""
    coding = headers.get(b"content-transfer-encoding", b"").lower()
    if coding in IDENTITY:
        return content
    where = f"The form's field {field[:40]!r}"
    if coding == b"base64":
        return decode_bytes(content, where)
    shown = coding[:40].decode("latin-1")
    raise InvalidForm(f"{where} has the Content-Transfer-Encoding {shown!a}; send binary or base64.")


def holds_image(content: bytes, headers: dict[bytes, bytes]) -> bool:
    """Whether a part without a file name is an image all the same, as from `curl -F 'file=<image.jpg'`."""
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
    return media_type.startswith("image/") or media_type in BYTES or is_image(content)


def extended_name(disposition: bytes) -> bytes | None:
    """Return the file name, as UTF-8, that a part has in another spelling only.

    RFC 7578 forbids it, so the plain one counts where there is one; some clients send nothing else.
    """
    if (found := EXTENDED_NAME.search(disposition)) is None:
        return None
    charset, name = found[1].decode(), unquote_to_bytes(found[2].rstrip())
    return name.decode(charset, "replace").encode()
