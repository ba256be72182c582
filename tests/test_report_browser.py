"""The pages of a report as a browser lays them out: phone, desktop, dark, and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from cosched.report.compare import lines, load_runs
from cosched.report.compare_page import page as comparison
from tests.helpers.made_up_runs import ALL_ARMS, make_run, page_of

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (320, 360, 700, 1280)
DARK, LIGHT = 0, 1  # as Blink counts colour schemes
DRAFTS = ("plain", *(f"{d}.{a}" for d in ("eagle3", "dflash") for a in ALL_ARMS[1:4]))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]

MEASURE = """
const shown = e => e.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true});
const numbers = c => c.match(/[\\d.]+/g).map(Number);
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
function contrast(a, b) {
  const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
  return (high + .05) / (low + .05);
}
function ground(view, e) {
  for (; e; e = e.parentElement) {
    const c = numbers(view.getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const view = frame.contentWindow, page = frame.contentDocument;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const found = {wide: page.documentElement.scrollWidth, small: [], outside: [], over: [], pale: [],
    loaded: view.performance.getEntriesByType("resource").map(r => r.name), figures: 0,
    headings: [...page.querySelectorAll("h1, h2, h3")].map(h => Number(h.tagName[1])),
    bare: [...page.querySelectorAll("table")].filter(t => !t.caption || !t.querySelector("th[scope]")).length,
    page: light(ground(view, page.body))};
  for (const e of page.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !shown(e)) continue;
    const style = view.getComputedStyle(e), svg = e.closest("svg");
    if (e.closest("title, desc")) continue;
    if (!(svg && e.closest("[data-bar]"))) {
      const ratio = contrast(numbers(svg ? style.fill : style.color), ground(view, e));
      if (ratio < 4.5) found.pale.push(e.textContent.slice(0, 20) + " " + ratio.toFixed(2));
    }
  }
  for (const svg of [...page.querySelectorAll("svg")].filter(shown)) {
    found.figures += 1;
    const room = svg.getBoundingClientRect(), flat = [];
    for (const text of svg.querySelectorAll("text")) {
      const m = text.getScreenCTM(), scale = Math.hypot(m.a, m.b), box = text.getBoundingClientRect();
      const size = scale * parseFloat(view.getComputedStyle(text).fontSize);
      if (size < 8.5) found.small.push(text.textContent + " " + size.toFixed(1));
      if (box.left < room.left - 1 || box.right > room.right + 1 || box.top < room.top - 1
          || box.bottom > room.bottom + 1) found.outside.push(text.textContent);
      if (Math.abs(m.b) > 1e-6) continue;
      for (const [other, of] of flat) {
        const x = Math.min(of.right, box.right) - Math.max(of.left, box.left);
        const y = Math.min(of.bottom, box.bottom) - Math.max(of.top, box.top);
        if (x > 2 && y > .4 * Math.min(of.height, box.height)) found.over.push(other + " / " + text.textContent);
      }
      flat.push([text.textContent, box]);
    }
  }
  return found;
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def chromium(folder: Path, *words: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def measured(page: str, folder: Path, scheme: int) -> list[dict[str, Any]]:
    """What the page looks like in a frame of each width."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    outer = folder / "frames.html"
    outer.write_text(
        f'<meta charset="utf-8">{frames}<pre id="found"></pre><script>{MEASURE}</script>'
    )
    dom = chromium(
        folder, f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", outer.as_uri()
    )
    told = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert told is not None
    return json.loads(html.unescape(told.group(1)))


@pytest.fixture(params=["arms", "drafts", "comparison"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    arms = DRAFTS if request.param == "drafts" else ALL_ARMS
    make_run(tmp_path / "one", arms, num_requests=7)
    if request.param != "comparison":
        return page_of(tmp_path / "one")
    make_run(tmp_path / "two", arms, num_requests=7)
    (tmp_path / "two/config.yaml").write_text("engine: {max_batch: 1}\nother: yes\n")
    runs = load_runs([tmp_path / "one", tmp_path / "two"])
    return comparison(runs, lines(runs))


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_page_is_legible(page: str, tmp_path: Path, scheme: int) -> None:
    """At any width nothing is wider than the page, no figure's letters are tiny, cut off or on top of

    each other, and all text stands out from its ground, in light and in dark.
    """
    for width, found in zip(WIDTHS, measured(page, tmp_path, scheme), strict=True):
        assert found["wide"] <= width, f"it scrolls sideways at {width}"
        assert found["figures"] >= 1
        wrong = {name: found[name] for name in ("small", "outside", "over", "pale") if found[name]}
        assert not wrong, f"at {width} pixels"
        assert (found["page"] < 0.2) == (scheme == DARK)


def test_page_can_be_heard(page: str, tmp_path: Path) -> None:
    """One first heading and no level left out; tables have captions and named cells; nothing is fetched."""
    found = measured(page, tmp_path, LIGHT)[0]
    levels = found["headings"]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert found["bare"] == 0
    assert found["loaded"] == []


def test_page_can_be_printed(page: str, tmp_path: Path) -> None:
    """A browser makes a few pages of paper of it."""
    (tmp_path / "page.html").write_text(page)
    paper = tmp_path / "page.pdf"
    chromium(tmp_path, f"--print-to-pdf={paper}", (tmp_path / "page.html").as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 1 <= pages <= 16
