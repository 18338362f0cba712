"""Pages in a real browser: what is clicked, typed and seen, in headless Chromium."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsa_compile.html.file import write
from clsa_compile.html.page import render
from clsa_compile.report import Report

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE, PHONE = (1280, 900), (360, 740)
# The least contrast of texts, by WCAG 2.2 AA; of what is no text.
TEXT, SHAPE = 4.5, 3.0
# Seconds until a page of 2000 layers is ready to be used.
SOON = 2.0

Open = Callable[..., Any]


@pytest.fixture(scope="session")
def without(missing: Callable[[str, str], Any]) -> Callable[[str], Any]:
    return partial(missing, "CLSA_BROWSER")


@pytest.fixture(scope="module")
def browser(without: Callable[[str], Any]) -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        without("there is no Chromium; apt-get install chromium, or put google-chrome on PATH")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("there is no playwright; pip install playwright")
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that containers do not have; the pages are ours.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a report; fails for anything that it asks of the network or says on the console."""
    noise: list[str] = []
    contexts: list[Any] = []

    def shown(reports: Report | dict[str, Report], size: tuple[int, int] = WIDE, **settings: Any) -> Any:
        file = tmp_path / "report.html"
        write(file, render(reports if isinstance(reports, dict) else {"": reports}, "toy"))
        view = {"width": size[0], "height": size[1]}
        contexts.append(browser.new_context(viewport=view, offline=True, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on(
            "request", lambda request: noise.append(request.url) if request.url != file.as_uri() else None
        )
        page.goto(file.as_uri())
        return page

    yield shown
    for context in contexts:
        context.close()
    assert [line for line in noise if line != "data:,"] == []


@pytest.mark.parametrize(
    ("wanted", "outcome"), [("", pytest.skip.Exception), ("required", pytest.fail.Exception)]
)
def test_without_a_browser_these_tests_skip_unless_it_is_required(
    wanted: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch, without: Callable[[str], Any]
) -> None:
    monkeypatch.setenv("CLSA_BROWSER", wanted)
    with pytest.raises(outcome, match="there is no Chromium"):
        without("there is no Chromium")


def pictured(page: Any, side: str = "after") -> Any:
    return page.locator(f".picture .side.{side} .node:visible")


def rows(page: Any) -> Any:
    return page.locator(".layers tbody tr:visible")


def test_a_click_on_a_node_shows_its_details_and_its_row(show: Open, make: Any) -> None:
    page = show(make(8))
    pictured(page).nth(5).click()
    details = page.locator(".details")
    assert details.locator("h3").inner_text() == "Layer 5"
    assert "model.layers.5.self_attn" in details.inner_text()
    chosen = page.locator("tr.chosen")
    assert chosen.count() == 1
    assert "model.layers.5.self_attn" in chosen.text_content()
    page.locator(".table .tall").scroll_into_view_if_needed()
    inside, box = chosen.bounding_box(), page.locator(".table .tall").bounding_box()
    assert box["y"] <= inside["y"] < inside["y"] + inside["height"] <= box["y"] + box["height"] + 1
    assert page.locator(".node[aria-pressed=true]:visible").count() == 2, "before and after"
    pictured(page).nth(5).click()
    assert page.locator("tr.chosen").count() == 0
    assert details.locator("h3").inner_text() == "No layer selected"


def test_a_click_on_a_row_selects_its_node(show: Open, make: Any) -> None:
    page = show(make(8))
    rows(page).nth(3).locator("td").first.click()
    pressed = page.locator(".side.after .node[aria-pressed=true]:visible")
    assert pressed.get_attribute("data-first") == "3"
    assert page.locator(".details h3").inner_text() == "Layer 3"


def test_layers_that_are_alike_are_one_node_until_they_are_unfolded(show: Open, make: Any) -> None:
    page = show(make(16, "mass", every=8))
    assert pictured(page).count() == 4
    pictured(page).nth(1).click()
    assert page.locator(".details h3").inner_text() == "Layers 1 to 7, alike"
    assert page.locator("tr.chosen").count() == 7
    page.get_by_label("alike layers as one").uncheck()
    assert pictured(page).count() == 16
    assert page.locator(".side.after .node[aria-pressed=true]:visible").count() == 7


def test_the_filter_shows_rows_that_have_all_words(show: Open, make: Any) -> None:
    page = show(make(8, "mass", left=(6,)))
    count = page.locator("output")
    page.get_by_label("Filter").fill("layers.6 USERS")
    assert rows(page).count() == 1
    assert count.inner_text() == "1 of 8 layers"
    assert pictured(page).and_(page.locator(".dim")).count() == 7
    page.get_by_label("Filter").fill("")
    assert rows(page).count() == 8
    page.get_by_label("sparse 5").uncheck()
    assert rows(page).count() == 3
    assert count.inner_text() == "3 of 8 layers"
    page.get_by_label("Filter").fill("nothing has this")
    assert rows(page).count() == 0


def test_the_table_is_a_table_to_those_who_hear_it(show: Open, make: Any) -> None:
    page = show(make(8))
    table = page.get_by_role("region", name="table of layers").get_by_role("table")
    assert table.get_by_role("row").count() == 9
    assert table.get_by_role("columnheader").count() == 9
    assert table.get_by_role("rowheader").count() == 8
    assert table.get_by_role("cell").count() == 64


def test_nodes_have_names_and_say_whether_they_are_selected(show: Open, make: Any) -> None:
    page = show(make(8))
    node = page.get_by_role("button", name="layer 5, after: 2048 tokens by its own index")
    assert node.count() == 1
    node.click()
    assert page.get_by_role("button", pressed=True).count() == 2
    assert page.get_by_role("group", name="layer graph").count() == 1


def test_columns_stand_under_their_heads(show: Open, make: Any) -> None:
    for report in (make(4), make(4, "mass"), Report(make(4).plans)):
        page = show(report)
        lefts = page.evaluate(
            """() => [...document.querySelectorAll(".layers tr")].map((row) =>
              [...row.cells].map((cell) => cell.getBoundingClientRect().left))"""
        )
        assert len(lefts) == 5
        assert all(left == lefts[0] for left in lefts)


def test_edges_can_be_hidden(show: Open, make: Any) -> None:
    page = show(make(8, keys=(2, 3)))
    for name, kind in (("keys and values", "keys"), ("chosen tokens", "index")):
        edges = page.locator(f".side.after .edges.{kind} .line:visible")
        assert edges.count() > 0
        page.get_by_label(name).uncheck()
        assert edges.count() == 0
        page.get_by_label(name).check()
        assert edges.count() > 0


def test_the_keyboard_alone_is_enough(show: Open, make: Any) -> None:
    page = show(make(8))

    def focused(what: str) -> Any:
        return page.evaluate(f"document.activeElement.{what}")

    for _ in range(20):
        page.keyboard.press("Tab")
        if focused("classList.contains('node')"):
            break
    assert focused("dataset.first") == "0"
    width = page.evaluate("getComputedStyle(document.activeElement.querySelector('.body')).strokeWidth")
    assert float(width.removesuffix("px")) >= 3, "the focus can be seen"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert (focused("dataset.first"), focused("ownerSVGElement.classList.contains('after')")) == ("2", True)
    page.keyboard.press("Enter")
    assert page.locator(".details h3").inner_text() == "Layer 2"
    page.keyboard.press("End")
    page.keyboard.press(" ")
    assert page.locator(".details h3").inner_text() == "Layer 7"
    page.keyboard.press("Escape")
    assert page.locator("tr.chosen").count() == 0
    for _ in range(20):
        page.keyboard.press("Tab")
        if focused("type") == "search":
            break
    page.keyboard.type("layers.4")
    assert rows(page).count() == 1
    for _ in range(20):
        page.keyboard.press("Tab")
        if focused("classList.contains('pick')"):
            break
    page.keyboard.press("Enter")
    assert page.locator(".details h3").inner_text() == "Layer 4"
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused("tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


def test_arrow_keys_go_by_rows_that_are_shown(show: Open, make: Any) -> None:
    page = show(make(8, "mass", left=(2,)))
    page.get_by_label("left 1").uncheck()
    page.locator(".pick").nth(1).focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "3"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == "1"


def test_graphs_and_lengths_are_chosen(show: Open, make: Any) -> None:
    page = show({"decode": make(4), "prefill": make(5, "dense")})
    assert page.locator(".graph:visible").count() == 1
    assert rows(page).count() == 4
    assert page.locator(".figures:visible").count() == 1
    before = page.locator(".figures:visible").inner_text()
    page.get_by_label("4K").first.check()
    assert page.locator(".figures:visible").count() == 1
    assert page.locator(".figures:visible").inner_text() != before
    page.get_by_label("prefill").check()
    assert rows(page).count() == 5
    page.locator(".graph:visible .node:visible").first.click()
    assert page.locator(".graph:visible tr.chosen").count() == 1


COLOURS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const ground = (element) => {
    const body = element.closest(".node, .chip")?.querySelector("rect");
    if (body) return rgb(getComputedStyle(body).fill);
    for (let at = element; at; at = at.parentElement) {
      const found = rgb(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const text = element.textContent.trim().slice(0, 40);
    found.push([text, rgb(colour), ground(element), parseFloat(style.fontSize)]);
  }
  return found;
}
"""


def luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[int], b: list[int]) -> float:
    dark, bright = sorted((luminance(a), luminance(b)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(scheme: str, show: Open, make: Any) -> None:
    page = show(make(24, "mass", left=(6, 7), keys=(9, 10)), color_scheme=scheme)
    page.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
    pictured(page).nth(1).click()
    found = page.evaluate(COLOURS)
    assert len(found) > 200
    assert [
        (text, colour, ground) for text, colour, ground, _ in found if contrast(colour, ground) < TEXT
    ] == []
    ground = luminance(page.evaluate(COLOURS)[0][2])
    assert (ground > 0.8) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_groups_stand_out_from_the_ground(scheme: str, show: Open, make: Any) -> None:
    page = show(make(24), color_scheme=scheme)
    shades = page.evaluate(
        """() => [...document.querySelectorAll(".side.after .stripe")].map((stripe) => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const ground = stripe.closest(".picture");
          return [parse(getComputedStyle(stripe).fill), parse(getComputedStyle(ground).backgroundColor)];
        })"""
    )
    assert len({tuple(fill) for fill, _ in shades}) == 6
    assert min(contrast(fill, ground) for fill, ground in shades) >= SHAPE


def test_the_theme_can_be_changed_and_stays_in_memory(show: Open, make: Any) -> None:
    page = show(make(4), color_scheme="light")

    def is_dark() -> bool:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return luminance([int(part) for part in ground[4:-1].split(",")]) < 0.2

    assert not is_dark()
    page.get_by_role("button", name="dark", exact=True).click()
    assert is_dark()
    page.get_by_role("button", name="light", exact=True).click()
    assert not is_dark()
    page.get_by_role("button", name="dark", exact=True).click()
    page.reload()
    assert not is_dark()


def test_a_phone_shows_all_of_it(show: Open, make: Any) -> None:
    page = show({"decode": make(24, "mass", left=(6,), keys=(9, 10)), "prefill": make(3)}, PHONE)
    # What is out of sight is not laid out otherwise.
    page.add_style_tag(content=".later { content-visibility: visible !important; }")
    page.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    sizes = [size for *_, size in page.evaluate(COLOURS)]
    assert min(sizes) >= 13.5
    # A plot is drawn smaller than its units.
    scale = page.evaluate("(p => p.getBoundingClientRect().width / 400)(document.querySelector('.plot'))")
    assert scale * 17 >= 12
    assert page.locator(".side.before:visible").count() == 0
    page.get_by_label("before", exact=True).first.check()
    assert page.locator(".side.before:visible").count() == 1
    assert page.locator(".side.after:visible").count() == 0
    pictured(page, "before").nth(1).click()
    assert page.locator(".details:visible h3").inner_text().startswith("Layer")
    page.set_viewport_size({"width": 320, "height": 568})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_nothing_is_lost_without_a_script(show: Open, make: Any) -> None:
    page = show({"decode": make(16, "mass"), "prefill": make(3)}, java_script_enabled=False)
    assert rows(page).count() == 16
    assert page.locator(".plot:visible").count() == 2
    assert page.locator(".picture svg:visible").count() == 2
    assert page.locator(".theme:visible").count() == 0
    page.get_by_label("prefill").check()
    assert rows(page).count() == 3


TIMED = """
(code) => {
  const began = performance.now();
  new Function(code)();
  for (const box of document.querySelectorAll(".tall, .picture")) box.scrollHeight;
  return (performance.now() - began) / 1000;
}
"""
TYPE = """
const search = document.querySelector("input[type=search]");
search.value = "layers.199";
search.dispatchEvent(new Event("input"));
"""


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("index", "mass")), "dense"]
)
def test_two_thousand_layers_are_ready_soon(kind: str, show: Open, make: Any) -> None:
    page = show(make(2000, kind, left=(7, 1999), keys=(12, 13, 1500)))
    loads = []
    for _ in range(3):  # the best of them: others work on this machine too
        page.reload()
        loads.append(page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart"))
    assert min(loads) / 1000 < SOON
    pictured(page).nth(1).click()
    assert page.locator("tr.chosen").count() >= 1
    assert page.evaluate(TIMED, TYPE) < SOON
    assert page.locator("output").inner_text() == "11 of 2000 layers"
    assert page.evaluate(TIMED, "document.querySelector('.fold').click()") < SOON
    assert page.locator(".side.after .node").count() == 2000
    assert page.locator(".side.after .node:not(.dim)").count() == 11
    assert Path(page.url.removeprefix("file://")).stat().st_size < 8 * 2**20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_there_is_something_to_see(scheme: str, show: Open, make: Any) -> None:
    imread = pytest.importorskip("matplotlib.image").imread
    page = show(make(24, "mass"), color_scheme=scheme)
    for place in (".picture", ".plot >> nth=0", ".plot:visible >> nth=1", ".heat", ".figures:visible"):
        box = page.locator(place)
        box.scroll_into_view_if_needed()
        pixels = imread(io.BytesIO(box.screenshot()), format="png")
        shades = len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))
        assert shades > 20, f"{place} has {shades} colours"
