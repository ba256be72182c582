"""``cosched bench``: measure suites, and fill the pages with what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from typer.core import TyperGroup

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.bench.measure import Progress
    from cosched.bench.result import SuiteResult
    from cosched.bench.suite import AnySuite

WORK = Path("runs/bench")
WIDTH = 200  # of a table in a log
console = Console()
errors = Console(stderr=True)


class _SuiteFirst(TyperGroup):
    """``cosched bench NAME`` is ``cosched bench run NAME``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_SuiteFirst,
    no_args_is_help=True,
    help="Measure what is claimed: [bold]cosched bench --list[/], [bold]cosched bench NAME[/].",
)


@bench_app.command("run")
def bench_run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME … [key.sub=value …]",
            help="Suites of configs/bench, and settings to change in every run of theirs.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="A suite of your own, a YAML file.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the suites, and stop.")] = False,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed", min=0, help="This seed instead of the file's; several times: these."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON.")] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Also write the result to where pages have their figures from."
        ),
    ] = False,
) -> None:
    """Measure one suite or several; [bold]cosched bench NAME[/] is enough.

    A run that is there with the same settings stays, an interrupted one goes on. Results go to
    runs/bench/NAME/result.json, with --keep to benchmarks/results/NAME.json as well.
    """
    from cosched.bench.suite import suite_file

    if list_:
        console.print(_list_of_suites())
        return
    overrides = [word for word in words or () if "=" in word]
    files = [suite_file(word) for word in words or () if "=" not in word]
    files += [] if config is None else [config]
    if not files:
        raise ConfigError("name a suite; `cosched bench --list` has them")
    if keep and (overrides or seed):
        raise ConfigError(
            "--keep: what pages quote is the suite as its file has it; leave out the rest"
        )
    tell = errors if as_json else console
    results: list[SuiteResult] = []
    for result, path in _results(files, overrides, seed or [], keep, tell):
        results.append(result)
        if not as_json:
            _show(result)
        tell.print(f"result: [bold]{path}[/]", soft_wrap=True)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(results)).decode())
    failures = [failure for result in results for failure in result.failures]
    for failure in failures:
        errors.print(f"[bold red]too low[/] {failure}", soft_wrap=True, highlight=False)
    if failures:
        raise typer.Exit(1)


def _results(
    files: list[Path], overrides: list[str], seeds: list[int], keep: bool, tell: Console
) -> Iterator[tuple[SuiteResult, Path]]:
    """Each suite's result as soon as it is measured, and where it was written."""
    import msgspec

    from cosched.bench.render import RESULTS
    from cosched.bench.result import write_result
    from cosched.bench.suite import RunsSuite, load_suite

    suites = {file: load_suite(file) for file in files}
    minutes = sum(suite.minutes for suite in suites.values())
    tell.print(f"{len(files)} suites, about {minutes} minutes on two cores", highlight=False)
    for number, (file, suite) in enumerate(suites.items(), 1):
        tell.print(f"{number} of {len(files)}: [bold]{file.stem}[/], {suite.about}", soft_wrap=True)
        own = suite
        if seeds and isinstance(suite, RunsSuite):
            own = msgspec.structs.replace(suite, seeds=tuple(seeds))
        result = _measured(file, own, overrides, [f"--seed={seed}" for seed in seeds], tell)
        path = write_result(result, WORK / file.stem, "result.json")
        if keep:
            path = write_result(result, RESULTS, f"{file.stem}.json")
        yield result, path


@bench_app.command("render")
def bench_render(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail where a page differs.")
    ] = False,
) -> None:
    """Fill the blocks of README and documentation from benchmarks/results.

    A block stands between [bold]<!-- bench: NAME VIEW -->[/] and [bold]<!-- /bench -->[/].
    """
    from cosched.bench.render import render

    changed = render(Path.cwd(), check)
    for block in changed:
        console.print(f"{'differs' if check else 'filled'}: {block}", markup=False, soft_wrap=True)
    if check and changed:
        errors.print("`cosched bench render` fills them in")
        raise typer.Exit(1)
    if not changed:
        console.print("all figures are those of the results")


def _list_of_suites() -> Table:
    from cosched.bench.suite import load_suite, suite_files

    table = Table("suite", "minutes", "what it asks", box=None)
    for file in suite_files():
        suite = load_suite(file)
        table.add_row(file.stem, str(suite.minutes), suite.about)
    return table


def _measured(
    file: Path, suite: AnySuite, overrides: list[str], options: list[str], tell: Console
) -> SuiteResult:
    """Measure it under a bar, or with a line a minute where that would not be seen."""
    from cosched.bench.run import command_of, run_suite

    command = command_of(file, [*options, *overrides])

    with Bar(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[left]}"), console=tell,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=1.0, left="", visible=False)
        said = _SaysNow(tell)

        def show(progress: Progress) -> None:
            what = f"run {progress.place} of {progress.total}, {progress.name}"
            left = (
                ""
                if progress.seconds_left is None
                else f"about {spoken(progress.seconds_left)} left"
            )
            bar.update(task, completed=progress.share, description=what, left=left, visible=True)
            said(f"{what}: {progress.share:.0%}, {left}".rstrip(", "))

        return run_suite(file, suite, overrides, command, show)


class _SaysNow:
    """A line a minute where nobody sees the bar: in a log."""

    def __init__(self, tell: Console) -> None:
        self._tell = tell
        self._next = time.monotonic()

    def __call__(self, text: str) -> None:
        if self._tell.is_terminal or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 60
        self._tell.print(text, markup=False, highlight=False, soft_wrap=True)


def spoken(seconds: float) -> str:
    """``3 h 5 min``; less than a minute in seconds."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _show(result: SuiteResult) -> None:
    """The suite's own table, or all figures where it has none; into a log as wide as it takes."""
    import msgspec

    from cosched.bench.suite import View
    from cosched.bench.tables import table_of

    view = msgspec.convert(result.suite["views"].get("table", {}), View)
    known = {name for row in result.rows for name in row.figures}  # a few runs may lack some
    view = msgspec.structs.replace(view, figures=tuple(n for n in view.figures if n in known))
    wide = console if console.is_terminal else Console(width=WIDTH)
    wide.print(table_of(result, view).for_terminal(result.name))
