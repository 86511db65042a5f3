"""The files of the page and of Swagger UI: headers, caching, and the switch."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from service.api.web_page import static_files
from tests.service.harness import error_of, running

ROOT = Path(__file__).parents[3]
FILES = {path: (name, content) for path, name, content in static_files()}
PAGES = [path for path, (name, _) in FILES.items() if name.endswith(".html")]


async def test_every_file_is_sent_once_and_then_only_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path, api_keys="secret") as run:
        assert {"/", "/docs", "/page/page.css", "/page/page.js", "/page/swagger-ui-bundle.js"} <= set(FILES)
        for path, (_, content) in FILES.items():
            response = await run.client.get(path)
            assert (response.status_code, response.content) == (200, content)
            assert response.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob:")
            assert "unsafe" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-request-id"]
            for tag in ("{}", 'W/{}, "other"'):
                headers = {"if-none-match": tag.format(response.headers["etag"])}
                again = await run.client.get(path, headers=headers)
                assert (again.status_code, again.content) == (304, b"")
            assert (await run.client.get(path, headers={"if-none-match": '"other"'})).status_code == 200
            assert (await run.client.head(path)).headers["content-length"] == str(len(content))
        files = len(FILES) - len(PAGES)
        assert await run.metric('perceiver_requests_total{code="304",route="/page/"}') == 2 * files


@pytest.mark.parametrize("path", ["/page/", "/page/nothing.js", "/page/../app.py", "/page/%2e%2e/app.py"])
async def test_nothing_else_is_sent(tmp_path: Path, path: str) -> None:
    async with running(tmp_path) as run:
        response = await run.client.get(path)
        assert (response.status_code, error_of(response.content)) == (404, "not_found")


async def test_both_pages_are_off_by_setting(tmp_path: Path) -> None:
    async with running(tmp_path, web_page=False) as run:
        for path in FILES:
            response = await run.client.get(path)
            assert (response.status_code, error_of(response.content)) == (404, "not_found")
            assert "the path is" not in response.text
        assert (await run.client.get("/openapi.json")).status_code == 200
        assert (await run.predict()).status_code == 200


@pytest.mark.parametrize("path", PAGES)
def test_a_page_holds_no_script_no_style_and_no_absolute_address(path: str) -> None:
    """So that the policy holds, and that it works behind a proxy which adds a prefix."""
    text = FILES[path][1].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|<script[^>]*>[^<]", text)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) > 3
    for address in addresses:
        assert address == "docs" or f"/{address}" in FILES


def test_a_wheel_has_every_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    for file in (ROOT / "service" / "api" / "page").iterdir():
        assert any(fnmatch(f"api/page/{file.name}", pattern) for pattern in patterns)
