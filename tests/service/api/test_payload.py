"""Bodies to image files, without a server."""

import base64
import json
import tracemalloc
from codecs import BOM_UTF8
from email.mime.image import MIMEImage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path

import pytest

from service.api.payload import MAX_PART_HEAD_BYTES, SPARE_PARTS, Payload, parse_body
from service.decoding.upload import Upload
from service.errors import (
    InvalidBase64,
    InvalidForm,
    InvalidJson,
    NoImage,
    TooManyImages,
    UnsupportedMediaType,
)

BOUNDARY = "frontier"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
DATA = b"\x89PNG\r\n\x1a\n\0\xff--frontie"  # holds line ends and nearly the boundary
TEXT = base64.b64encode(DATA).decode()


def form(*parts: tuple[str, bytes], end: str = f"--{BOUNDARY}--\r\n") -> bytes:
    """A multipart body from (headers, content) pairs."""
    chunks = [f"--{BOUNDARY}\r\n{headers}\r\n\r\n".encode() + content + b"\r\n" for headers, content in parts]
    return b"".join(chunks) + end.encode()


def file_part(name: str = "file", filename: str = "a.png") -> str:
    return f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\nContent-Type: image/png'


def parse(content_type: str, body: bytes, max_images: int = 4) -> list[Upload]:
    return parse_payload(content_type, body, max_images).uploads


def parse_payload(content_type: str, body: bytes, max_images: int = 4) -> Payload:
    return parse_body(content_type, body, max_images=max_images)


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "IMAGE/JPEG; q=1", "image/anything", "application/octet-stream", "binary/octet-stream", ""],
)
def test_a_raw_body_is_the_image(content_type: str) -> None:
    assert parse(content_type, DATA) == [Upload(DATA)]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "video/mp4", "nonsense"])
def test_other_media_types_are_refused(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="multipart/form-data"):
        parse(content_type, DATA)


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", ""])
def test_an_empty_raw_body_is_no_image(content_type: str) -> None:
    with pytest.raises(NoImage):
        parse(content_type, b"")


# Forms


def test_a_form_gives_its_files_in_order_under_any_field_name() -> None:
    body = form((file_part("file", "a.png"), DATA), (file_part("other", "b.png"), b"second"))
    assert parse(FORM, body) == [Upload(DATA, "a.png"), Upload(b"second", "b.png")]


def test_a_part_without_a_filename_is_a_image_if_it_says_so() -> None:
    body = form(('Content-Disposition: form-data; name="file"\r\nContent-Type: image/png', DATA))
    assert parse(FORM, body) == [Upload(DATA, None)]


def test_a_part_without_a_filename_is_a_image_if_it_begins_like_one() -> None:
    assert parse(FORM, form(('Content-Disposition: form-data; name="file"', DATA))) == [Upload(DATA, None)]


def test_file_names_are_utf8_and_quoted() -> None:
    body = form((file_part("file", 'ä \\"b\\".png'), DATA))
    assert parse(FORM, body)[0].filename == 'ä "b".png'


@pytest.mark.parametrize(
    ("parameters", "filename"),
    [
        ("filename*=UTF-8''na%C3%AFve%20one.png", "naïve one.png"),
        ("filename*=utf-8'fr'na%C3%AFve.png; size=3", "naïve.png"),
        ("filename*=\"UTF-8''a%22b.png\"", 'a"b.png'),
        ("filename*=ISO-8859-1''%A3.png", "£.png"),
        ("filename*=UTF-8''%ff.png", "\ufffd.png"),
        ("filename*=UTF-8''other.png; filename=\"plain.png\"", "plain.png"),
        ("filename*=other''a.png", None),
        ("filename*=a.png", None),
    ],
)
def test_a_file_name_that_is_spelt_in_the_extended_way_alone(parameters: str, filename: str | None) -> None:
    body = form((f'Content-Disposition: form-data; name="file"; {parameters}', DATA))
    assert parse(FORM, body) == [Upload(DATA, filename)]


def test_a_part_that_is_a_file_by_its_extended_name_may_be_no_image() -> None:
    body = form(("Content-Disposition: form-data; name=file; filename*=UTF-8''a.txt", b"text"))
    assert parse(FORM, body) == [Upload(b"text", "a.txt")]


def test_the_boundary_may_be_quoted_and_the_header_in_any_case() -> None:
    assert parse('Multipart/Form-Data; charset=x; boundary="frontier"', form((file_part(), DATA))) == [
        Upload(DATA, "a.png")
    ]


def test_an_empty_file_input_is_skipped() -> None:
    empty = (file_part("file", ""), b"")
    assert parse(FORM, form(empty, (file_part(), DATA))) == [Upload(DATA, "a.png")]
    with pytest.raises(NoImage, match="curl -F"):
        parse(FORM, form(empty))


def test_a_file_without_content_is_no_image() -> None:
    with pytest.raises(NoImage, match="0 bytes"):
        parse(FORM, form((file_part(), b"")))


def test_of_several_images_the_empty_one_is_named() -> None:
    with pytest.raises(NoImage, match=r"Image 2 of 3 \('b.png'\): The image is empty"):
        parse(FORM, form((file_part(), DATA), (file_part(filename="b.png"), b""), (file_part(), DATA)))
    with pytest.raises(NoImage, match="Image 2 of 2: The image is empty"):
        parse("application/json", json.dumps({"images": [TEXT, ""]}).encode())


def field(name: str, value: bytes) -> tuple[str, bytes]:
    return f'Content-Disposition: form-data; name="{name}"', value


def test_text_fields_beside_the_file_are_ignored_but_for_top_k() -> None:
    body = form(field("csrf_token", b"x"), (file_part(), DATA), field("top_k", b"3"), field("notes", b"\xff"))
    assert parse_payload(FORM, body) == Payload([Upload(DATA, "a.png")], {"top_k": "3"})


@pytest.mark.parametrize(
    "text", [b'<?xml version="1.0"?><note/>', b"<svg/>", b"%PDF is what I have", b"GIF89a was 1989"]
)
def test_a_text_field_that_begins_like_an_image_is_ignored_too(text: bytes) -> None:
    assert parse(FORM, form(field("notes", text), (file_part(), DATA))) == [Upload(DATA, "a.png")]


def test_a_form_of_text_fields_alone_says_how_to_send_a_file() -> None:
    with pytest.raises(NoImage, match="curl -F file=@"):  # what comes of `curl -F file=image.jpg`
        parse(FORM, form(field("file", b"image.jpg")))


def test_what_stands_before_the_first_boundary_and_behind_the_last_is_ignored() -> None:
    body = form((file_part(), DATA))
    for preamble in (b"x\r\n", b"This is a MIME message.\r\n\r\n", b"\r\n", b"--frontierX\r\n"):
        assert parse(FORM, preamble + body + b"\r\nmore\r\n") == [Upload(DATA, "a.png")]


def test_boundaries_may_have_blanks_behind_them() -> None:
    body = form((file_part(), DATA), (file_part(), b"x"))
    assert parse(FORM, body.replace(b"--frontier\r\n", b"--frontier \t\r\n")) == parse(FORM, body)


def test_a_line_that_begins_like_a_boundary_is_content() -> None:
    content = b"a\r\n--frontierX\r\n--frontier-\r\n--frontie\r\nb"
    assert parse(FORM, form((file_part(), content))) == [Upload(content, "a.png")]


def test_headers_of_a_part_may_be_folded() -> None:
    headers = 'Content-Disposition: form-data;\r\n name="file";\r\n\tfilename="a.png"'
    assert parse(FORM, form((headers, DATA))) == [Upload(DATA, "a.png")]


def test_a_form_that_a_mail_library_writes() -> None:
    message = MIMEMultipart("form-data")
    for part, name in ((MIMEText("2"), "top_k"), (MIMEImage(DATA, "png"), 'file"; filename="ein langer Name.png')):
        part["Content-Disposition"] = f'form-data; name="{name}"'
        message.attach(part)
    head, _, body = message.as_bytes(policy=message.policy.clone(linesep="\r\n")).partition(b"\r\n\r\n")
    content_type = head.partition(b"Content-Type: ")[2].partition(b"\r\nMIME")[0].replace(b"\r\n", b"").decode()
    assert parse_payload(content_type, body) == Payload([Upload(DATA, "ein langer Name.png")], {"top_k": "2"})


@pytest.mark.parametrize("coding", ["base64", "BASE64", "binary", "8bit", "7bit"])
def test_content_transfer_encodings(coding: str) -> None:
    content = base64.encodebytes(DATA * 9) if coding.lower() == "base64" else DATA * 9
    headers = f"{file_part()}\r\nContent-Transfer-Encoding: {coding}"
    assert parse(FORM, form((headers, content))) == [Upload(DATA * 9, "a.png")]


def test_other_content_transfer_encodings_are_named() -> None:
    headers = f"{file_part()}\r\nContent-Transfer-Encoding: quoted-printable"
    with pytest.raises(InvalidForm, match="field 'file' has the Content-Transfer-Encoding 'quoted-printable'"):
        parse(FORM, form((headers, DATA)))
    with pytest.raises(InvalidBase64, match="field 'file' is not valid base64"):
        parse(FORM, form((headers.replace("quoted-printable", "base64"), DATA)))


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "Binary/Octet-Stream; x=y"])
def test_a_part_of_a_binary_type_is_a_file(content_type: str) -> None:
    assert parse(FORM, form((f"{field('file', b'')[0]}\r\nContent-Type: {content_type}", b"x"))) == [Upload(b"x")]


@pytest.mark.parametrize("headers", [file_part("file", ""), field("note", b"")[0], "X: y"])
def test_the_parts_of_a_form_are_bounded(headers: str) -> None:
    parts = [(headers, b"")] * (4 + SPARE_PARTS - 1)
    assert parse(FORM, form(*parts, (file_part(), DATA))) == [Upload(DATA, "a.png")]
    with pytest.raises(InvalidForm, match=f"more than {4 + SPARE_PARTS} parts"):
        parse(FORM, form(*parts, (headers, b""), (file_part(), DATA)))


def test_parts_without_headers_or_without_content_are_none() -> None:
    body = form((file_part(), DATA)).removeprefix(b"--frontier\r\n")
    for part in (b"\r\ntext\r\n", b"X: y\r\n", b"X: y\r\n\r\n\r\n"):
        assert parse(FORM, b"--frontier\r\n" + part + b"--frontier\r\n" + body) == [Upload(DATA, "a.png")]


def test_headers_of_a_part_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidForm, match=r"no colon: 'no\\x00colon'"):
        parse(FORM, form(("no\0colon", DATA)))
    with pytest.raises(InvalidForm, match="larger than 4096 bytes"):
        parse(FORM, form((f"X: {'y' * MAX_PART_HEAD_BYTES}", DATA)))


def test_a_content_type_is_bounded_as_the_headers_of_a_part_are() -> None:
    with pytest.raises(InvalidForm, match="larger than 4096 bytes"):
        parse(f'{FORM}; a="{";" * MAX_PART_HEAD_BYTES}"', form((file_part(), DATA)))


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", form((file_part(), DATA))),
        ("multipart/form-data; boundary=", form((file_part(), DATA))),
        (f"multipart/form-data; boundary={'x' * 300}", form((file_part(), DATA))),
        (FORM, b"no boundary here"),
        (FORM, form((file_part(), DATA), end="")),
        (FORM, form((file_part(), DATA))[:-8]),
        (FORM, form((f"X: {'y' * 20_000}", DATA))),
        (FORM, b""),
    ],
    ids=["none", "empty", "long", "absent", "open", "cut", "huge header", "no body"],
)
def test_broken_forms_are_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(InvalidForm):
        parse(content_type, body)


def test_too_many_files_are_refused() -> None:
    parts = [(file_part(), DATA)] * 5
    assert len(parse(FORM, form(*parts[:4]))) == 4
    with pytest.raises(TooManyImages, match="the 4 images"):
        parse(FORM, form(*parts))


# JSON


def test_json_with_one_image() -> None:
    assert parse("application/json", json.dumps({"image": TEXT}).encode()) == [Upload(DATA)]


def test_json_with_several_images_and_a_charset() -> None:
    body = json.dumps({"images": [TEXT, TEXT]}).encode()
    assert parse("application/json; charset=utf-8", body) == [Upload(DATA), Upload(DATA)]


def test_base64_as_data_url_or_with_line_breaks() -> None:
    texts = [
        f"data:image/png;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        "\n".join(TEXT[i : i + 8] for i in range(0, 40, 8)),
        f"{TEXT}\r\n",
        TEXT.rstrip("="),
        TEXT.replace("/", "_"),
    ]
    body = json.dumps({"images": texts}).encode()
    assert parse("application/json", body, len(texts)) == [Upload(DATA)] * len(texts)


def test_base64_of_either_alphabet() -> None:
    every = bytes(range(256))
    for text in (base64.b64encode(every), base64.urlsafe_b64encode(every)):
        for sent in (text, text.rstrip(b"=")):
            assert parse("application/json", b'{"image": "%b"}' % sent) == [Upload(every)]


@pytest.mark.parametrize(
    "text",
    [
        "not base64!",
        "HTTPS://example.org/a.png",
        TEXT.rstrip("=")[:-1],
        f"{TEXT[:4]} {TEXT[4:]}",
        f" {TEXT}",
        f"{TEXT[:4]}\t{TEXT[4:]}",
        "QQ=",
        "====",
        "data:image/png,abc",
        f"data:image/png;base64{TEXT}",
        "ä",
        TEXT.replace("i", "."),
    ],
)
def test_bad_base64_is_refused_and_located(text: str) -> None:
    with pytest.raises(InvalidBase64, match=r"images\[1\]"):
        parse("application/json", json.dumps({"images": [TEXT, text]}).encode())


def test_base64_whose_plus_became_a_blank_is_no_other_image() -> None:
    text = (Path(__file__).parent / "base64_plus_as_blank.txt").read_text()
    with pytest.raises(InvalidBase64, match=r"holds blanks in its base64; where they were \+"):
        parse("application/json", json.dumps({"image": text}).encode())
    (upload,) = parse("application/json", json.dumps({"image": text.replace(" ", "+")}).encode())
    assert upload.data.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("url", ["http://localhost/a.png", "https://example.org/a.png", "file:///etc/passwd"])
def test_urls_are_not_fetched(url: str) -> None:
    with pytest.raises(InvalidBase64, match="not fetched"):
        parse("application/json", json.dumps({"image": url}).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"null",
        b"{}",
        b'{"photo": "aaaa"}',
        b'{"image": 1}',
        b'{"image": ["aaaa"]}',
        b'{"images": "aaaa"}',
        b'{"images": ["aaaa", 1]}',
        b'{"image": "aaaa", "images": ["aaaa"]}',
        b'{"image": "aaaa", "top_k": 1}',
        b'{"image": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_json_of_other_shapes_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        parse("application/json", body)


@pytest.mark.parametrize(
    ("begin", "filling", "end"),
    [
        (b'{"images": [', b"[],", b"[]]}"),
        (b'{"images": [', b"{},", b"{}]}"),
        (b'{"images": [', b"0,", b"0]}"),
        (b'{"images": [', b'"",', b'""]}'),
        (b'{"images": ["x"], "more": [', b"[],", b"[]]}"),
        (b'{"image": 1.', b"1", b"}"),
        (b'{"image": "!', b" ", b'"}'),
        (b'{"image": "!', rb"\n", b'"}'),
        (b'{"image": "!', rb"\u0020", b'"}'),
        (b"", b" ", b"}"),
    ],
)
def test_a_json_body_of_many_small_things_takes_no_more_memory_than_one_of_images(
    begin: bytes, filling: bytes, end: bytes
) -> None:
    body = begin + filling * (2**22 // len(filling)) + end
    tracemalloc.start()
    try:
        with pytest.raises((InvalidJson, InvalidBase64, TooManyImages)):
            parse("application/json", body)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


def test_what_is_wrong_with_json_is_told() -> None:
    with pytest.raises(InvalidJson, match=r'form \{"image".*Expected `str`, got `int` - at `\$.images\[1\]`'):
        parse("application/json", b'{"images": ["aaaa", 1]}')
    with pytest.raises(InvalidJson, match=r"is not JSON: .*trailing"):
        parse("application/json", b'{"image": "aaaa"}}')


def test_keys_that_are_no_text_are_escaped() -> None:
    with pytest.raises(InvalidJson) as caught:
        parse("application/json", b'{"\\u0000\\n\\u202e": 1}')
    assert "\\x00\\n\\u202e" in caught.value.message
    assert caught.value.message.isprintable()


def test_json_may_begin_with_a_byte_order_mark_and_escape_its_slashes() -> None:
    text = TEXT.replace("/", "\\/")
    assert parse("application/json", BOM_UTF8 + b'{"image": "%b"}' % text.encode()) == [Upload(DATA)]


@pytest.mark.parametrize("body", [b'{"images": []}', b'{"image": ""}', b'{"images": [""]}'])
def test_json_without_a_image(body: bytes) -> None:
    with pytest.raises(NoImage):
        parse("application/json", body)


def test_too_many_in_json_are_refused_before_any_is_decoded() -> None:
    with pytest.raises(TooManyImages):
        parse("application/json", json.dumps({"images": ["not base64!"] * 5}).encode())
    with pytest.raises(TooManyImages):
        parse("application/json", json.dumps({"images": [""] * 5000}).encode())


@pytest.mark.parametrize("images", [1, 64, 10_000])  # the most that the settings allow
def test_as_many_in_json_as_are_allowed_are_not_taken_for_too_many_strings(images: int) -> None:
    body = json.dumps({"images": [TEXT] * images}).encode()
    assert parse("application/json", body, max_images=images) == [Upload(DATA)] * images
