"""Blocks of the pages that are filled in from results, so that no figure is copied by hand.

``<!-- bench: SUITE VIEW -->`` … ``<!-- /bench -->`` holds a table, as the suite's ``views.VIEW`` says.
``<!-- bench: SUITE figure=tau text=code arm=adapted+window -->1.56<!-- /bench -->`` holds one figure, in a
sentence; with ``interval=yes`` also its interval, with ``digits=2`` so many digits. A label of several words is
quoted: ``arm="prompt lookup"``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cosched.bench.result import SuiteResult, read_result
from cosched.bench.suite import FOLDER, View, load_suite
from cosched.bench.tables import shown, table_of
from cosched.errors import ConfigError
from cosched.telemetry.run_folder import RunFolder, explained

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path("benchmarks/results")
PAGES = ("README.md", "docs/*.md", "benchmarks/results/*.md")
BLOCK = re.compile(r"(<!-- bench: (\w+)((?: [^>\s]+)*) -->)(.*?)(<!-- /bench -->)", re.DOTALL)
FENCE = re.compile(
    r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE
)  # what shows a block is none


def pages(root: Path) -> Iterator[Path]:
    """Those that may have blocks."""
    for pattern in PAGES:
        yield from sorted(root.glob(pattern))


def render(root: Path, check: bool = False) -> list[str]:
    """Fill in all blocks, or with ``check`` only say which differ from their results.

    Returns:
        ``PAGE: SUITE VIEW`` of each block that was, or would be, changed.

    Raises:
        CoschedError: a block names a result, a view or a figure that there is not.
    """
    changed: list[str] = []
    for page in pages(root):
        with explained(page, "read"):
            before = page.read_text(encoding="utf-8")
        after, differing = _filled(before, root, page)
        changed += [f"{page.relative_to(root)}: {block}" for block in differing]
        if differing and not check:
            RunFolder(page.parent).write(page.name, after)
    return changed


def _filled(text: str, root: Path, page: Path) -> tuple[str, list[str]]:
    """A page with its blocks filled in, and which of them were not as they are now."""
    differing: list[str] = []
    code = [found.span() for found in FENCE.finditer(text)]

    def fill(block: re.Match[str]) -> str:
        if any(start <= block.start() < end for start, end in code):
            return block[0]
        result = read_result(root / RESULTS / f"{block[2]}.json")
        try:
            content = _content(result, _views(root, result), shlex.split(block[3]))
        except (ConfigError, ValueError) as error:  # quotes that are not closed
            raise ConfigError(f"{page}: <!-- bench: {block[2]}{block[3]} -->: {error}") from error
        if content != block[4]:
            differing.append(f"{block[2]}{block[3]}")
        return f"{block[1]}{content}{block[5]}"

    return BLOCK.sub(fill, text), differing


def _views(root: Path, result: SuiteResult) -> dict[str, View]:
    """As the suite's file has them now; as it had them then, where it is gone."""
    file = root / FOLDER / f"{result.name}.yaml"
    if file.exists():
        return load_suite(file).views
    return msgspec.convert(result.suite.get("views", {}), dict[str, View])


def _content(result: SuiteResult, views: dict[str, View], words: list[str]) -> str:
    if any("=" in word for word in words):
        return _figure(result, dict(word.split("=", 1) for word in words if "=" in word))
    name = words[0] if words else "table"
    if name not in views:
        raise ConfigError(f"no view {name!r}; the suite has {', '.join(views) or 'none'}")
    table = table_of(result, views[name]).markdown()
    brackets = "; in brackets: 95\u00a0% interval" if "(" in table else ""
    source = f"\n{source_of(result)}{brackets}.\n" if views[name].source else ""
    return f"\n\n{table}\n{source}\n"


def _figure(result: SuiteResult, asked: dict[str, str]) -> str:
    """One figure, the place of which is named by as many labels as it takes."""
    name, interval = asked.pop("figure", ""), asked.pop("interval", "no") == "yes"
    digits = asked.pop("digits", "")
    found = [row for row in result.rows if asked.items() <= row.at.items() and name in row.figures]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} places have that figure; name one, and all its labels")
    return shown(found[0].figures[name], interval, int(digits) if digits.isdigit() else None)


def source_of(result: SuiteResult) -> str:
    """The line below a table: what repeats it, and what it was measured with."""
    commits = sorted({run.commit or "unknown" for run in result.runs}) or [str(result.commit)]
    changed = " and changes" if result.dirty else ""
    machine = result.machine.in_words if result.machine else "several machines"
    repeats = f"{result.seeds} seeds" if result.seeds > 1 else "one run"
    return (
        f"`{result.command}`: {result.date}, commit {', '.join(commits)}{changed}, {machine}, "
        f"{repeats}"
    )
