"""Pages of the site that are made of what the repository says elsewhere."""

from __future__ import annotations

import ast
import inspect
import re
from typing import TYPE_CHECKING

from links import ROOT
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from cosched.bench.suite import load_suite, suite_files
from cosched.cli import app
from cosched.engines.sglang.operators.metrics import METRICS
from cosched.telemetry.trackers.curves import SCALARS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGES = ("cosched", "drafters", "losses", "schedulers")


def commands_page() -> str:
    """Every command of ``cosched`` with its arguments and options, from the parser itself."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    return "\n".join(line for command in _commands(root, "cosched") for line in command)


def _commands(group: TyperGroup, path: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        where = f"{path} {name}"
        if isinstance(command, TyperGroup):
            yield from _commands(command, where)
        elif isinstance(command, TyperCommand):
            yield _command(command, where)


def _command(command: TyperCommand, where: str) -> list[str]:
    lines = [f"### {where} {{ #{where.replace(' ', '-')} }}\n", _plain(command.help or "") + "\n"]
    rows: list[str] = []
    for parameter in command.params:
        about = _plain(str(getattr(parameter, "help", None) or ""))
        if isinstance(parameter, TyperOption):
            name = "`, `".join(parameter.opts)
            if parameter.required:
                about += " **Required.**"
            elif parameter.default not in (None, False):
                about += f" Default: `{parameter.default}`."
        else:
            name = str(parameter.metavar or parameter.name).replace("|", "\\|")
        rows.append(f"| `{name}` | {about.strip()} |")
    if rows:
        lines += ["| argument | |\n| --- | --- |", "\n".join(rows) + "\n"]
    return lines


def _plain(help_text: str) -> str:
    """A help text without the marks of ``rich``: bold is code here."""
    return re.sub(r"\[bold\](.*?)\[/(?:bold)?\]", r"`\1`", inspect.cleandoc(help_text))


def metrics_table() -> str:
    """What SGLang's ``/metrics`` page shows of ours."""
    rows = [
        f"| `{one.shown_as}` | {one.kind} | {f'`{one.label}`' if one.label else ''} | {one.about} |"
        for one in METRICS
    ]
    return (
        "| metric | kind | label | what it is |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )


def scalars_table() -> str:
    """What experiment trackers draw."""
    rows = [f"| `{name}` | {about} |" for name, about in SCALARS.items()]
    return "| scalar | what it is |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def suites_table() -> str:
    """The benchmarks that are shipped."""
    rows = [
        f"| `{file.stem}` | {suite.about} | {suite.minutes} |"
        for file in suite_files(ROOT)
        for suite in [load_suite(file)]
    ]
    header = "| suite | what it asks | minutes on two cores |\n| --- | --- | --- |\n"
    return header + "\n".join(rows) + "\n"


def modules_page() -> str:
    """Every module by its folder, with the first line of its docstring."""
    lines: list[str] = []
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            if "stand_ins" in folder.parts:
                continue
            where = folder.relative_to(ROOT).as_posix()
            lines.append(f"{'##' if where == package else '###'} {where}/\n")
            if about := _first_line(folder / "__init__.py"):
                lines.append(f"{about}\n")
            modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
            if modules:
                rows = [f"| `{path.name}` | {_first_line(path)} |" for path in modules]
                lines.append("| module | what it is |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    if not path.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")
