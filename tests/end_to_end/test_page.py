"""The page and Swagger UI in a real Chromium, which resolves no name: the service alone has all that they need."""

import base64
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.end_to_end.process import ROOT, started

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Names are looked up by nobody. As root, which CI is in its container, Chromium has no sandbox.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
APPLE = ROOT / "docs" / "apple.png"
INPUT_SIZE = [96, 128]  # a model that sees wide images
PHONE = {"width": 360, "height": 740}
MILLISECONDS = 60_000
GIVE = """([event, name, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, {type: "image/png"}));
    const given = event === "drop" ? {dataTransfer: data} : {clipboardData: data};
    const kind = event === "drop" ? DragEvent : ClipboardEvent;
    document.body.dispatchEvent(new kind(event, {bubbles: true, cancelable: true, ...given}));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@dataclass
class Tab:
    """A page in a browser, and all that it did."""

    page: Page
    base: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def give(self, event: str, path: Path) -> None:
        """Drop or paste a file."""
        self.page.evaluate(GIVE, [event, path.name, base64.b64encode(path.read_bytes()).decode()])

    def result(self) -> Any:
        """The newest result."""
        return self.page.locator("article").first

    def assert_quiet(self) -> None:
        """No request left the service, and the console is empty."""
        assert self.requests
        assert [url for url in self.requests if not url.startswith((self.base, "blob:", "data:"))] == []
        assert self.complaints == []

    def assert_accessible(self) -> None:
        """axe-core finds nothing, and nothing is wider than the window."""
        results = Axe().run(self.page)
        assert results.violations_count == 0, results.generate_report()
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=MILLISECONDS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the shipped model's service."""
    arguments = ("--provider", "cpu", "--no-tune-batch-size")
    with started(tmp_path_factory.mktemp("page"), *arguments) as process, process.ready():
        yield process.url()


@pytest.fixture(scope="module")
def keyed_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one that wants a key."""
    arguments = ("--provider", "cpu", "--no-tune-batch-size")
    keys = {"PERCEIVER_API_KEYS": "sesame"}
    with started(tmp_path_factory.mktemp("keyed"), *arguments, **keys) as process, process.ready():
        yield process.url()


@pytest.fixture
def tab(browser: Browser, service: str, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """The page, opened; a parameter is what its browser is set to."""
    yield from opened(browser, service, **getattr(request, "param", {}))


@pytest.fixture
def keyed_tab(browser: Browser, keyed_service: str) -> Iterator[Tab]:
    yield from opened(browser, keyed_service)


def opened(browser: Browser, base: str, **settings: Any) -> Iterator[Tab]:
    with browser.new_context(**settings) as context:
        context.set_default_timeout(MILLISECONDS)
        expect.set_options(timeout=MILLISECONDS)
        tab = Tab(context.new_page(), base)
        tab.page.on("request", lambda sent: tab.requests.append(sent.url))
        tab.page.on("console", lambda message: tab.complaints.append(message.text))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.route("**/explain?*", explain)
        tab.page.goto(base)
        yield tab


def explain(route: Route) -> None:
    """Answer with a map that is strongest at the top left."""
    heat = [[0.5 * math.exp(-(x * x + y * y) / 20) - 0.02 for x in range(16)] for y in range(16)]
    label = route.request.url.partition("label=")[2]
    explanation = {"filename": "x", "label": label, "index": 0, "probability": 0.9, "size": [16, 16], "map": heat}
    answer = {"model": "x", "version": 9, "method": "rise", "model_runs": 129, "crop": "center"}
    route.fulfill(json=answer | {"input_size": INPUT_SIZE, "explanations": [explanation]})


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_gets_its_label(tab: Tab, event: str) -> None:
    tab.give(event, APPLE)
    result = tab.result()
    expect(result.get_by_role("heading", name="apple")).to_be_visible()
    expect(result.get_by_role("listitem")).to_have_count(5)
    expect(result.get_by_role("listitem").first).to_contain_text("%")
    expect(result.get_by_text("Answered by perceiver-cifar100, version")).to_be_visible()
    expect(result.locator("code")).to_have_text(f"curl -F file=@apple.png {tab.base}/predict")
    expect(result.locator("dl")).to_contain_text("model")
    expect(result.locator(".unfamiliar")).to_be_hidden()
    tab.assert_quiet()
    tab.assert_accessible()


def test_behind_a_proxy_that_keeps_the_times_there_is_an_answer(tab: Tab) -> None:
    def without_times(route: Route) -> None:
        answer = route.fetch()
        headers = {name: value for name, value in answer.headers.items() if name != "server-timing"}
        route.fulfill(response=answer, headers=headers)

    tab.page.route("**/predict", without_times)
    tab.give("drop", APPLE)
    expect(tab.result().get_by_text("Answered by perceiver-cifar100, version")).to_be_visible()
    expect(tab.result().locator("dt")).to_have_text(["with the network"])
    tab.assert_quiet()


def test_several_images_get_a_result_each(tab: Tab) -> None:
    files = [APPLE, *(ROOT / "service/api/page").glob("*.jpg")]
    tab.page.set_input_files("#files", files)
    for file in files:
        result = tab.page.locator("article").filter(has_text=file.name)
        expect(result.get_by_text("Answered by")).to_be_visible()
        expect(result.locator("canvas")).to_be_hidden()  # until it is asked for
    result.get_by_role("button", name="Show which regions carried it").click()
    expect(result.locator("canvas")).to_be_visible()
    tab.assert_quiet()


def test_an_error_is_told_in_words(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear model,")
    tab.page.set_input_files("#files", tmp_path / "letter.txt")
    words = "The bytes are not an image"
    expect(tab.result().get_by_text(words)).to_be_visible()
    expect(tab.result().get_by_text("not_an_image")).to_be_visible()
    expect(tab.page.get_by_role("status")).to_contain_text(words)
    tab.assert_accessible()


def test_what_may_pass_can_be_tried_again(tab: Tab) -> None:
    error = {"code": "overloaded", "message": "The queue is full.", "request_id": "abc"}
    tab.page.route(
        "**/predict", lambda route: route.fulfill(status=503, json={"error": error}, headers={"Retry-After": "2"})
    )
    tab.give("drop", APPLE)
    expect(tab.result().get_by_text("The queue is full. Try again in 2 s.")).to_be_visible()
    tab.page.unroute("**/predict")
    tab.result().get_by_role("button", name="Try again").click()
    expect(tab.result().get_by_role("heading", name="apple")).to_be_focused()


def test_a_service_that_is_gone_is_told_in_words(tab: Tab) -> None:
    tab.page.route("**/predict", lambda route: route.abort())
    tab.give("drop", APPLE)
    expect(tab.result().get_by_text("The service can't be reached")).to_be_visible()


def test_a_heat_map_lies_over_the_region_that_the_model_sees(tab: Tab, tmp_path: Path) -> None:
    tab.page.set_viewport_size({"width": 1200, "height": 900})
    tab.give("drop", wide_image(tmp_path))
    canvas = tab.result().locator("canvas")
    expect(canvas).to_be_visible()
    expect(tab.result().get_by_text("most at the top left")).to_be_visible()
    over, under = canvas.bounding_box(), tab.result().locator(".frame img").bounding_box()
    assert over
    assert under
    assert over["width"] == pytest.approx(over["height"] * 4 / 3, abs=1)
    assert over["height"] == pytest.approx(under["height"], abs=1)
    assert over["x"] + over["width"] / 2 == pytest.approx(under["x"] + under["width"] / 2, abs=1)
    slider = tab.result().get_by_role("slider", name="Heat map")
    slider.fill("0")
    assert canvas.evaluate("canvas => canvas.style.opacity") == "0"
    tab.assert_accessible()
    labels = tab.result().get_by_role("combobox", name="Regions that carry")
    with tab.page.expect_request("**/explain?*") as asked:
        labels.select_option(index=1)
    assert asked.value.url.partition("label=")[2] != tab.requests[-2].partition("label=")[2]
    tab.assert_quiet()


def test_of_labels_that_are_chosen_quickly_the_last_one_has_the_map(tab: Tab) -> None:
    tab.give("drop", APPLE)
    expect(tab.result().locator("canvas")).to_be_visible()
    labels = tab.result().get_by_role("combobox", name="Regions that carry")
    held: list[Route] = []
    tab.page.unroute("**/explain?*")
    tab.page.route("**/explain?*", lambda route: held.append(route))
    for index in (1, 2):
        with tab.page.expect_request("**/explain?*"):
            labels.select_option(index=index)
    for route in held:  # the first has been left by the page
        explain(route)
    last = labels.evaluate("list => list.selectedOptions[0].text")
    expect(tab.result().get_by_text(f"the more “{last}” loses")).to_be_visible()
    expect(tab.result()).not_to_have_attribute("aria-busy", "true")


def test_an_image_that_the_browser_can_not_show_has_no_heat_map(tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "apple.tiff"
    with Image.open(APPLE) as image:
        image.save(path)
    tab.give("drop", path)
    expect(tab.result().get_by_role("heading", name="apple")).to_be_visible()
    expect(tab.result().get_by_text("This browser can't show this format.")).to_be_visible()
    for hidden in (".map", ".map-words", ".explain", "canvas"):
        expect(tab.result().locator(hidden)).to_be_hidden()
    assert not [url for url in tab.requests if "/explain" in url]


def test_the_heat_map_is_the_services_own(tab: Tab) -> None:
    tab.page.unroute("**/explain?*")
    tab.page.get_by_role("button", name="Rocket").click()
    expect(tab.result().locator("canvas")).to_be_visible()
    expect(tab.result().get_by_text("the more “rocket” loses")).to_be_visible()
    tab.assert_quiet()


def test_what_was_sent_with_an_older_key_is_sent_again(keyed_tab: Tab) -> None:
    page = keyed_tab.page
    held: list[Route] = []
    keyed_tab.give("drop", APPLE)
    expect(page.get_by_label("API key")).to_be_focused()
    page.route("**/predict", lambda route: held.append(route), times=1)
    with page.expect_request("**/predict"):
        keyed_tab.give("drop", ROOT / "docs" / "examples" / "five-things" / "orange" / "00.png")
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="apple")).to_be_visible()
    held[0].continue_()
    expect(keyed_tab.result().get_by_role("heading", name="orange")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_hidden()


@pytest.mark.parametrize("status", [403, 404, 501])
def test_a_service_that_does_not_explain_shows_no_heat_map(tab: Tab, status: int) -> None:
    error = {"code": "any", "message": "No.", "request_id": "abc"}
    tab.page.route("**/explain?*", lambda route: route.fulfill(status=status, json={"error": error}))
    with tab.page.expect_response("**/explain?*"):
        tab.give("drop", APPLE)
    expect(tab.result()).not_to_have_attribute("aria-busy", "true")
    for hidden in (".map", ".map-words", ".explain", "canvas"):
        expect(tab.result().locator(hidden)).to_be_hidden()


def test_what_is_unlike_the_training_images_is_said(tab: Tab) -> None:
    def flag(route: Route) -> None:
        response = route.fetch()
        answer = json.loads(response.text())
        answer["predictions"][0]["unfamiliar"] = True
        route.fulfill(response=response, json=answer)

    tab.page.route("**/predict", flag)
    tab.page.route("**/explain?*", lambda route: None)  # left open: its words would come next
    tab.give("drop", APPLE)
    expect(tab.result().get_by_text("Unlike anything it was trained on.")).to_be_visible()
    expect(tab.page.get_by_role("status")).to_contain_text("unlike anything")
    tab.assert_accessible()


def test_a_key_is_asked_for_where_one_is_needed(keyed_tab: Tab) -> None:
    page = keyed_tab.page
    expect(page.get_by_label("API key")).to_be_hidden()
    keyed_tab.give("drop", APPLE)
    expect(page.get_by_label("API key")).to_be_focused()
    keyed_tab.assert_accessible()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The service does not accept this key.")).to_be_visible()
    page.keyboard.type("sesame")  # over the wrong one, which is selected
    page.keyboard.press("Enter")
    heading = keyed_tab.result().get_by_role("heading", name="apple")
    expect(heading).to_be_focused()
    expect(page.get_by_label("API key")).to_be_hidden()
    expect(keyed_tab.result().locator("code")).to_contain_text('-H "X-API-Key: $KEY"')
    assert "sesame" not in page.content()


def test_the_keyboard_is_enough(tab: Tab) -> None:
    keys = tab.page.keyboard
    tab.page.on("filechooser", lambda chooser: chooser.set_files(APPLE))
    keys.press("Tab")
    expect(tab.page.get_by_role("link", name="API")).to_be_focused()
    keys.press("Tab")
    expect(tab.page.locator("#files")).to_be_focused()
    keys.press("Enter")
    expect(tab.result().get_by_role("heading", name="apple")).to_be_visible()
    keys.press("Tab")
    expect(tab.page.get_by_role("button", name="Rocket")).to_be_focused()
    keys.press("Space")
    expect(tab.result().get_by_role("heading", name="rocket")).to_be_visible()
    for _ in range(2):
        keys.press("Tab")
    expect(tab.page.get_by_role("button", name="Cat")).to_be_focused()
    slider = tab.result().get_by_role("slider", name="Heat map")
    expect(slider).to_be_visible()
    keys.press("Tab")
    expect(slider).to_be_focused()
    keys.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "65 %")
    tab.assert_quiet()


@pytest.mark.parametrize("tab", [{"viewport": PHONE}, {"viewport": PHONE, "color_scheme": "dark"}], indirect=True)
def test_it_fits_a_phone(tab: Tab) -> None:
    tab.assert_accessible()
    tab.page.get_by_role("button", name="Apple").click()
    expect(tab.result().locator("canvas")).to_be_visible()
    tab.assert_accessible()


@pytest.mark.parametrize("tab", [{"color_scheme": "dark"}], indirect=True)
def test_it_is_dark_where_the_system_is(tab: Tab) -> None:
    ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(ground) < 64
    tab.give("drop", APPLE)
    expect(tab.result().locator("canvas")).to_be_visible()
    tab.assert_accessible()


def test_swagger_ui_is_drawn_without_another_host(tab: Tab) -> None:
    tab.page.get_by_role("link", name="API").click()
    expect(tab.page.locator("#operations-predict-predict")).to_be_visible()
    tab.assert_quiet()


def wide_image(folder: Path) -> Path:
    """A file of 96 x 48 pixels."""
    Image.new("RGB", (96, 48), "orange").save(folder / "wide.png")
    return folder / "wide.png"
