"""Draw docs/page.png and docs/swagger-ui.png: the shipped model's service in a real Chromium.

python -m tests.end_to_end.screenshots
"""

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.end_to_end.process import ROOT, started
from tests.end_to_end.test_page import CHROMIUM, FLAGS

SIZE = {"width": 1180, "height": 860}
COLOURS = 96  # more show no difference, and need more room


def main() -> None:
    """Draw both."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(Path(folder), "--provider", "cpu", "--port", "8000") as service,
        service.ready(),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=SIZE)
        page.goto(service.url())
        page.get_by_role("button", name="Rocket").click()
        expect(page.get_by_text("Answered by")).to_be_visible()
        expect(page.locator("article")).not_to_have_attribute("aria-busy", "true", timeout=60_000)
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        draw(page, ROOT / "docs" / "page.png")
        page.goto(f"{service.url()}/docs")
        expect(page.locator("#operations-predict-predict")).to_be_visible()
        draw(page, ROOT / "docs" / "swagger-ui.png")
        browser.close()


def draw(page: Page, path: Path) -> None:
    """Write what a page shows, in few colours."""
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    palette = image.quantize(COLOURS, kmeans=10)
    image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
