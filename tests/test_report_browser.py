"""The report's page in a real browser: phone and desk, light and dark, and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.command import run_qsun
from tests.reports import bench, check, every_record, put, put_bundle, scorecard, verdict

CHROMIUM = shutil.which("chromium")
WIDTHS = (390, 1280)
LEAST_CONTRAST = 4.5
ON_SCREEN = [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")]

# Every piece of text with the colour behind it: the nearest that is not see-through. Text in a
# picture lies on the picture's own ground.
CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const svg = element.closest("svg");
    if (svg) return getComputedStyle(svg.querySelector("path")).fill;
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const unseen = ["STYLE", "title", "desc", "style"].includes(element.tagName);
    if (unseen || !node.data.trim()) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(ink), luminance(behind(element))].sort((x, y) => y - x);
    found.push([node.data.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""
# Each line of a picture against its ground.
LINES = """() => [...document.querySelectorAll("svg [id*=line2d] path")].map((path) => {
  const style = getComputedStyle(path);
  const ground = getComputedStyle(path.closest("svg").querySelector("path")).fill;
  return [style.stroke, ground];
})"""
# Colours and dashes of each chart's own lines: those of ink and grid are its axes and bounds.
DASHES = """() => [...document.querySelectorAll("figure.chart svg")].map((svg) => {
  const lines = [...svg.querySelectorAll("[id*=line2d] > path")].map((path) => path.style)
    .filter((style) => style.fill === "none" && style.strokeWidth === "1.5");
  return [lines.map((style) => style.stroke), lines.map((style) => style.strokeDasharray)];
})"""
# The same with the names of a legend, whose lines come last.
BY_SYSTEM = """() => [...document.querySelectorAll("figure.chart svg")].map((svg) => {
  const legend = svg.querySelector("[id*=legend]");
  const lines = [...legend.querySelectorAll("[id*=line2d] > path")].map((path) => path.style)
    .filter((style) => style.fill === "none" && style.strokeWidth === "1.5");
  const names = [...legend.querySelectorAll("text")].map((text) => text.textContent.trim());
  return [names, lines.map((style) => style.stroke), lines.map((style) => style.strokeDasharray)];
})"""
NAMES = """() => [...document.querySelectorAll("svg")].map((svg) =>
  svg.getAttribute("aria-labelledby").split(" ").map((id) => {
    const named = document.getElementById(id);
    return named && svg.contains(named) ? named.textContent : "";
  }))"""
# What reaches beyond the window's right edge and is in no box that scrolls.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((element) =>
  !element.closest(".scroll, .wide, .skip, svg")
  && element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map((element) => element.outerHTML.slice(0, 80))"""


@dataclass
class Shown:
    """A page as a browser shows it, and what the browser had to say of it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a record of every kind, a failed check, an interrupted bench and a low floor."""
    folder = tmp_path_factory.mktemp("browser")
    digest = put_bundle(folder / "bundle")
    records = every_record(folder, digest)
    floors = [{"system": "qsun", "test": "math.seen", "accuracy": 0.9}]
    put(folder / "verdict.json", "verdict", verdict(digest, check("served.start", "failed")))
    put(folder / "scorecard.json", "scorecard", scorecard(digest, floors=floors))
    more = put(folder / "sun.json", "bench", bench("sun", complete=False, missing=["8 requests/s"]))
    out = folder / "report.html"
    other = put(folder / "other.json", "bench", bench("sun"), hardware={"accelerator": "Another"})
    outcome = run_qsun("report", folder / "bundle", *records, more, other, "--out", out)
    assert outcome.exit_code == 0, outcome.stderr
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "chromium is missing: `make chromium` says how to get it"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def show(browser: Browser, path: Path, width: int, scheme: Any, media: Any = "screen") -> Shown:
    """Open a page from disk; JavaScript is off for the page itself."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )
    shown = Shown(context.new_page())
    shown.page.on("console", lambda message: shown.errors.append(message.text))
    shown.page.on("pageerror", lambda error: shown.errors.append(str(error)))
    shown.page.on("request", lambda request: shown.asked.append(request.url))
    shown.page.emulate_media(media=media, color_scheme=scheme)
    shown.page.goto(path.as_uri())
    return shown


def luminance(colour: str) -> float:
    channels = [int(one) / 255 for one in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("width", "scheme"), ON_SCREEN)
def test_on_a_screen(browser: Browser, report: Path, width: int, scheme: str) -> None:
    shown = show(browser, report, width, scheme)
    page = shown.page
    size = page.evaluate(
        "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert size[0] <= size[1] == width
    assert page.evaluate(OVERFLOWING) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 500
    assert [one for one in contrasts if one[1] < LEAST_CONTRAST] == []
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    lines = page.evaluate(LINES)
    assert len(lines) > 20
    for stroke, behind in lines:
        assert behind == ground
        if stroke != "none":
            lighter, darker = sorted((luminance(stroke), luminance(behind)), reverse=True)
            is_grid = stroke in ("rgb(208, 215, 222)", "rgb(61, 68, 77)")
            assert is_grid or (lighter + 0.05) / (darker + 0.05) >= LEAST_CONTRAST
    assert shown.errors == []
    assert shown.asked == [report.as_uri()]
    page.context.close()


def test_on_paper(browser: Browser, report: Path) -> None:
    shown = show(browser, report, 700, "dark", media="print")
    page = shown.page
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert [one for one in page.evaluate(CONTRASTS) if one[1] < LEAST_CONTRAST] == []
    grounds = page.evaluate(
        "() => [...document.querySelectorAll('svg')].map("
        "(svg) => getComputedStyle(svg.querySelector('path')).fill)"
    )
    assert set(grounds) == {"rgb(255, 255, 255)"}
    # Nothing scrolls on paper: what is wide must fit, a page of A4 less its margins here.
    assert page.evaluate(
        "() => [...document.querySelectorAll('.scroll > *, .wide > *')].filter((one) => "
        "one.getBoundingClientRect().right > document.documentElement.clientWidth).length"
    ) == 0  # fmt: skip
    assert page.evaluate("() => getComputedStyle(document.querySelector('.skip')).display") == (
        "none"
    )
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.context.close()


def test_for_those_who_do_not_see_it(browser: Browser, report: Path) -> None:
    page = show(browser, report, 1280, "light").page
    assert page.evaluate("() => document.documentElement.lang") == "en"
    levels = page.evaluate(
        "() => [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map((one) => +one.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert 3 in levels
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = page.evaluate(NAMES)
    assert len(names) >= 11
    assert all(title and len(text) > 30 for title, text in names)
    assert page.get_by_role("img").count() == page.locator("svg[role=img]").count() == len(names)
    tables = page.locator("table").count()
    assert tables > 15
    assert page.locator("table > caption").count() == tables
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("tbody tr").count() == page.locator("tbody th[scope=row]").count()
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    assert skip.evaluate("(one) => one === document.activeElement")
    assert skip.evaluate("(one) => one.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "content"
    page.context.close()


def test_a_wide_table_scrolls_in_its_own_box(browser: Browser, report: Path) -> None:
    page = show(browser, report, 390, "light").page
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].map("
        "(box) => [box.scrollWidth > box.clientWidth, box.tabIndex, box.ariaLabel])"
    )
    assert sum(scrolls for scrolls, _, _ in boxes) >= 2
    assert all(index == 0 and label for _, index, label in boxes)
    page.context.close()


def test_what_must_not_be_overlooked_is_said_in_words(browser: Browser, report: Path) -> None:
    page = show(browser, report, 390, "light").page
    notices = page.locator(".notice").all_text_contents()
    assert [text.partition(":")[0] for text in notices] == [
        *("Not passed", "Below the floor", "Interrupted", "Not compared")
    ]
    for strokes, dashes in page.evaluate(DASHES):
        assert len(set(dashes)) >= len(set(strokes)) >= 1
    by_system = [
        dict(zip(names, zip(strokes, dashes, strict=True), strict=False))
        for names, strokes, dashes in page.evaluate(BY_SYSTEM)
    ]
    for system in ("isolated", "qsun"):
        assert len({one[system] for one in by_system if system in one}) == 1
    assert sum("qsun" in one for one in by_system) >= 9
    page.context.close()
