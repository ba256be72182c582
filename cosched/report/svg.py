"""Matplotlib figures as SVG for a page: coloured by its theme, titled, and safe side by side.

Colours go through CSS variables of the page, with the light theme's value as fallback, so that one
drawing serves light and dark. The palette is Okabe and Ito's, which colour-blind readers can tell
apart; arms with a window are dashed as well.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cosched.settings.arms import beside, split_arm

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

PALETTE = {  # name of the CSS variable: (on a light page, on a dark page)
    "ink": ("#22272e", "#e4e8ed"),
    "muted": ("#626a74", "#9aa4b0"),
    "grid": ("#dde1e6", "#363d47"),
    "plain": ("#868d97", "#8f98a3"),
    "frozen": ("#0072b2", "#3fa0dd"),
    "frozen-window": ("#45a5dc", "#8ccdf2"),
    "adapted": ("#d55e00", "#f0803a"),
    "adapted-window": ("#e69f00", "#f3c04b"),
    "spare-1": ("#009e73", "#2fc299"),
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
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's own font
}


def colour(name: str) -> str:
    """The light value of a palette entry; ``to_svg`` turns it into the page's variable."""
    return PALETTE[name][0]


def arm_colour_name(arm: str, arms: list[str]) -> str:
    """An arm's palette entry, the same in every figure.

    Variants and arms of other drafts have one each, with a window or not.
    """
    if arm in OWN_COLOUR:
        return arm.replace("+", "-")
    others = dict.fromkeys(_hue(other) for other in arms if other not in OWN_COLOUR)
    return SPARE[list(others).index(_hue(arm)) % len(SPARE)]


def _hue(arm: str) -> str:
    return beside(arm, split_arm(arm)[0])


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
        svg = svg.replace(light, f"var(--{variable}, {light})")
    head = re.search(r'viewBox="[^"]+"', svg)
    assert head is not None, "matplotlib writes a viewBox"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{head.group()} role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return opening + svg[svg.index(">") + 1 :]
