"""The page at `/` and Swagger UI at `/docs`: static files, sent from memory."""

from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api.paths import DOCS, PAGE, PAGE_FILES

TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SWAGGER_UI: Final = ("swagger-ui-bundle.js", "swagger-ui.css")
# Neither page loads, sends or runs anything of another origin, nor what stands in its HTML. data: and blob: are the
# icons of Swagger UI, and the images that a user chose.
HEADERS: Final = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class StaticFile:
    """Answers GET and HEAD with one file. A client keeps it, and asks each time whether it is still the same.

    Args:
        name: of the file; decides its type.
        content: of the file.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._etag = f'"{sha256(content).hexdigest()[:32]}"'
        self._headers = HEADERS | {
            "content-type": TYPES[PurePath(name).suffix],
            "cache-control": "no-cache",
            "etag": self._etag,
        }

    async def __call__(self, request: Request) -> Response:
        """Answer one request; 304 where the client has the file."""
        if self._etag in request.headers.get("if-none-match", ""):  # maybe in a list, or made weak by a proxy
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def page_routes() -> list[Route]:
    """Return the routes of both pages and of the files that they load."""
    return [Route(path, StaticFile(name, content).__call__) for path, name, content in static_files()]


def static_files() -> Iterator[tuple[str, str, bytes]]:
    """Yield path, name and content of each file."""
    pages = {"index.html": PAGE, "docs.html": DOCS}
    for file in files("service.api").joinpath("page").iterdir():
        if PurePath(file.name).suffix in TYPES:
            yield pages.get(file.name, PAGE_FILES + file.name), file.name, file.read_bytes()
    for name in SWAGGER_UI:
        yield PAGE_FILES + name, name, files("fastapi_offline").joinpath("static", name).read_bytes()
