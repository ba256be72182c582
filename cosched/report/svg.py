"""Matplotlib figures as SVG for a page: coloured by its theme, titled, and safe side by side.

Colours go through CSS variables of the page, so that one drawing serves light and dark. The palette is Okabe and Ito's, which colour-blind readers can tell
apart, darkened where a line of it would be faint on white; and nothing is told by colour alone: an arm
has a marker too, a window is dashed, a stage is hatched. A figure is drawn twice, for a wide page and
for a phone, where the letters of the wide one would be too small to read.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure

from cosched.settings.arms import WINDOW_SUFFIX, draft_of, split_arm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.typing import RcKeyType

P = ParamSpec("P")
R = TypeVar("R")

PALETTE = {  # name of the CSS variable: (on a light page, on a dark page)
    "ink": ("#22272e", "#e4e8ed"),
    "muted": ("#596069", "#a3adb9"),
    "grid": ("#dde1e6", "#363d47"),
    "plain": ("#7a828d", "#8f98a3"),
    "frozen": ("#0072b2", "#3fa0dd"),
    "frozen-window": ("#2a8bc4", "#8ccdf2"),
    "adapted": ("#d55e00", "#f0803a"),
    "adapted-window": ("#b27700", "#f3c04b"),
    "spare-1": ("#008862", "#2fc299"),
    "spare-2": ("#b5548f", "#dd8dbd"),
    "spare-3": ("#6a51a3", "#a99bdc"),
    "spare-4": ("#8a6d1d", "#cdb45c"),
    "spare-5": ("#a63a3f", "#e5827f"),
    "spare-6": ("#2f7f8f", "#6fbccb"),
    "stage-prefill": ("#d5dae1", "#454d58"),
    "stage-verify": ("#b3bbc6", "#5d6774"),
    "stage-draft": ("#66c7a8", "#1d7259"),
    "stage-update": ("#d993bd", "#8f3f6f"),
    "stage-publish": ("#f0d0e4", "#64405a"),
    "stage-other": ("#e9ecf0", "#343b45"),
}
OWN_COLOUR = ("plain", "frozen", "frozen+window", "adapted", "adapted+window")
MARKS = {"plain": "|", "frozen": "o", "adapted": "s"}
SPARE_MARKS = ("D", "^", "v", "P", "X", "p")
SPARE = tuple(name for name in PALETTE if name.startswith("spare-"))
STYLE: dict[RcKeyType, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.borderpad": 0.2,
    "legend.handlelength": 2.6,
    "text.color": PALETTE["ink"][0],
    "axes.labelcolor": PALETTE["muted"][0],
    "axes.edgecolor": PALETTE["grid"][0],
    "xtick.color": PALETTE["grid"][0],
    "ytick.color": PALETTE["grid"][0],
    "xtick.labelcolor": PALETTE["muted"][0],
    "ytick.labelcolor": PALETTE["muted"][0],
    "grid.color": PALETTE["grid"][0],
    "hatch.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's own font
}


def colour(name: str) -> str:
    """The light value of a palette entry; ``to_svg`` turns it into the page's variable."""
    return PALETTE[name][0]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a figure is drawn for; ``width`` in inches, which the page scales."""

    name: str
    width: float
    narrow: bool


WIDE = Frame("wide", 8.4, narrow=False)
NARROW = Frame("narrow", 3.2, narrow=True)
SMALL = 7.5  # points, of the smallest letters: on a phone of 360 pixels they are 10 pixels high


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the report's style and restore what was there."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def arm_colour_name(arm: str, arms: Sequence[str]) -> str:
    """An arm's palette entry, the same in every figure and with every draft.

    Variants have one each, with a window or not.
    """
    base, windowed = split_arm(arm)
    own = base + WINDOW_SUFFIX * windowed
    if own in OWN_COLOUR:
        return own.replace("+", "-")
    return SPARE[_place(arm, arms) % len(SPARE)]


def arm_mark(arm: str, arms: Sequence[str]) -> str:
    """Its marker, for who cannot tell it by its colour."""
    base = split_arm(arm)[0]
    return MARKS.get(base) or SPARE_MARKS[_place(arm, arms) % len(SPARE_MARKS)]


def line_style(arm: str) -> str:
    """Dashed where the draft sees only a window."""
    return "--" if arm.endswith(WINDOW_SUFFIX) else "-"


def _place(arm: str, arms: Sequence[str]) -> int:
    """Which variant it is of those that the run has."""
    bases = dict.fromkeys(split_arm(other)[0] for other in arms)
    return [base for base in bases if base not in MARKS].index(split_arm(arm)[0])


def by_draft(arms: Sequence[str]) -> dict[str | None, list[str]]:
    """Arms of the same draft together; None is the draft of arms that name none."""
    found: dict[str | None, list[str]] = {}
    for arm in arms:
        found.setdefault(draft_of(arm), []).append(arm)
    return found


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, known to no global state."""
    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element whose ids begin with ``name``."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<style type=.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    for variable, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = _lighter(svg)
    head = re.search(r'viewBox="[^"]+"', svg)
    assert head is not None, "matplotlib writes a viewBox"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{head.group()} role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return opening + svg[svg.index(">") + 1 :]


def _lighter(svg: str) -> str:
    """Without what a page does not need, which is half of it: digits, its own font, white space."""
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r" font-family: [^;\"]+;", "", svg)
    svg = re.sub(r" ?\n *", " ", svg)
    return svg.replace("> <", "><")
