"""The command line: one door for people, one message for each of their mistakes."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cosched.bench.commands import bench_app
from cosched.errors import ConfigError, CoschedError
from cosched.plan.command import plan
from cosched.realworld.commands import realworld_app
from cosched.report.commands import print_tables, report
from cosched.runs.ending import sigterm_interrupts
from cosched.tinyworld.commands import init, tinyworld_app
from cosched.top.command import top

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import TaskID

    from cosched.sweep.pool import Event
    from cosched.sweep.results import SweepSummary
    from cosched.sweep.sweep import Sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Test-time speculation: a draft that learns from its target while it serves.\n\n"
        "[bold]cosched run -c configs/quickstart.yaml[/] decodes the same text in several arms "
        "(plain, frozen, frozen+window, adapted) and leaves a report. Settings can be overridden "
        "behind the file: [bold]adapt.trainer.lr=1e-4 workload.max_prompts=2[/].\n\n"
        "Exit codes: 0 done, 1 failed or interrupted, 2 bad settings or input."
    ),
)
app.add_typer(tinyworld_app, name="tinyworld")
app.add_typer(realworld_app, name="realworld")
app.add_typer(bench_app, name="bench")
app.command()(init)
app.command()(report)
app.command()(top)
app.command()(plan)

ConfigFile = Annotated[Path, typer.Option("-c", "--config", help="The experiment, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.sub=value …]", help="Settings to change.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the last one was left.")]
ServerUrl = Annotated[str, typer.Option(help="Where the server is.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="COSCHED_API_KEY", help="The server's key, if it has one.")
]
Replica = Annotated[int, typer.Option(min=0, help="Which of the server's, with --dp-size.")]

console = Console()
errors = Console(stderr=True)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run folder if it exists.")
    ] = False,
    resume: Resume = False,
    record: Annotated[
        bool, typer.Option("--record", help="Record the first arm's text as a trace.")
    ] = False,
) -> None:
    """Run the arms of an experiment and write its folder: figures, events, report."""
    from cosched.settings.load import check_paths, load_config, to_yaml
    from cosched.telemetry.run_folder import RunFolder

    loaded = load_config(config, overrides or ())
    check_paths(loaded)
    folder = RunFolder(loaded.run_folder)
    if resume:
        if record or overwrite:
            raise ConfigError("--resume goes with neither --record nor --overwrite")
        folder.check_same(to_yaml(loaded))
    else:
        folder.check_free(overwrite)
    with console.status("loading the target and the drafts"):
        from cosched.runs.experiment import Experiment

        experiment = Experiment(loaded, record, shlex.join(["cosched", *sys.argv[1:]]))
    if not resume:
        folder.create(overwrite)
    with _progress() as progress, sigterm_interrupts():
        task = progress.add_task("decoding", total=experiment.total_tokens)

        def advance(arm: str, number: int) -> None:
            progress.update(task, advance=number, description=f"decoding [bold]{arm}[/]")

        summary = experiment.run(folder, advance, resume)
    from cosched.report.html import write_report
    from cosched.report.remarks import cut_line, trainer_lines

    with console.status("writing the report"):
        report_path = write_report(folder.path)
    print_tables(summary, console)
    if cut := cut_line(summary):
        console.print(cut, soft_wrap=True)
    for line in trainer_lines(summary):
        console.print(line, soft_wrap=True)
    console.print(f"report: [bold]{report_path}[/]", soft_wrap=True)
    if experiment.interrupted:
        errors.print(f"interrupted; what was measured so far is in {folder.path}", soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def sweep(
    config: Annotated[Path, typer.Option("-c", "--config", help="The sweep, a YAML file.")],
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; as many as there are cores.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the sweep's folder if it exists.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Judge many settings on the same recorded text, and say which of them gain.

    Settings behind the file change the experiment of all cells; [bold]run.name[/] and
    [bold]run.dir[/] name the folder. Recordings are shared and never replaced.
    """
    from cosched.sweep.plan import load_plan
    from cosched.sweep.sweep import MARKER, Sweep
    from cosched.telemetry.run_folder import RunFolder

    if resume and overwrite:
        raise ConfigError("--resume goes without --overwrite")
    plan = load_plan(config, overrides or ())
    folder = RunFolder(plan.folder, MARKER)
    if not (resume and (plan.folder / MARKER).exists()):
        folder.create(overwrite)
    changed = "".join(f"# with {word}\n" for word in overrides or ())
    folder.write(MARKER, config.read_text() + changed)
    running = Sweep(plan, jobs or os.cpu_count() or 1)
    console.print(
        f"{len(plan.cells)} cells, {len(plan.controls)} controls, {len(plan.recordings)} texts; "
        f"{len(running.jobs)} to run, {running.num_known} known"
    )
    summary = _with_progress(running)
    from cosched.sweep.page import write_page
    from cosched.sweep.table import tables

    for table in tables(summary):
        console.print(table)
    report_path = write_page(plan.folder, summary, MARKER)
    console.print(f"report: [bold]{report_path}[/]", soft_wrap=True)
    for failure in summary.failures:
        errors.print(f"[bold red]failed[/] {failure.id}: {escape(failure.message)}", soft_wrap=True)
    if running.interrupted:
        errors.print("interrupted; go on with --resume", soft_wrap=True)
    if running.interrupted or summary.failures:
        raise typer.Exit(1)


def _with_progress(running: Sweep) -> SweepSummary:
    """Run a sweep under one bar for all of it and one for each worker."""
    with _progress("{task.fields[what]}") as progress, sigterm_interrupts():
        whole = progress.add_task("sweep", total=len(running.jobs), what="runs,")
        bars: dict[int, TaskID] = {}

        def show(event: Event) -> None:
            if event.worker not in bars:
                bars[event.worker] = progress.add_task("", what="tokens,")
            bar = bars[event.worker]
            if event.kind == "total":
                progress.reset(bar, total=event.value, description=event.job.id)
            elif event.kind == "tokens":
                progress.update(bar, advance=event.value)
            else:
                progress.update(whole, advance=1)

        return running.run(show)


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate an experiment and the files it names, and say what it would take in memory.

    Nothing is loaded: sizes come from the ``config.json`` files.
    """
    from cosched.settings.load import check_paths, load_config, outline

    loaded = load_config(config, overrides or ())
    check_paths(loaded)
    from cosched.engines.sglang.launcher.arguments import check_supported
    from cosched.memory.footprint import footprint
    from cosched.memory.sketch import sketch, sketch_draft
    from cosched.report.memory import footprint_table
    from cosched.workload.requests import check_texts

    check_texts(loaded)
    target, drafter = sketch(loaded)
    console.print(outline(loaded), markup=False, highlight=False)
    check_supported(loaded, loaded.engine.arguments, lambda name: f"engine.arguments.{name}")
    sizes = footprint(loaded, target, drafter)
    console.print(footprint_table(sizes, in_sglang=loaded.engine.kind == "sglang"))
    for key, own in loaded.by_draft.items():
        problems = sketch_draft(own, target).not_for_sglang()
        _say_what_sglang_cannot(problems, key if loaded.drafts else "this draft")
    console.print(f"{config}: valid; a run would write {loaded.run_folder}", soft_wrap=True)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def serve(
    config: Annotated[
        Path,
        typer.Option(
            "-c", help="The settings, a YAML file (--config is SGLang's, for a file of its)."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key.sub=value …] [--any-argument of SGLang's …]",
            help="Settings to change; from the first word with -- on, what sglang serve takes.",
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Serve with SGLang, the draft learning from what it serves.

    The server is SGLang's own, with its port, API and arguments; it stops like SGLang's, on SIGTERM.
    """
    from cosched.engines.sglang.launcher.launch import serve as run_server
    from cosched.settings.load import load_config

    resume = resume or "--resume" in (words or ())  # wherever it stands: SGLang has none
    words = [word for word in words or () if word != "--resume"]
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    run_server(load_config(config, words[:first]), words[first:], resume)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    arm: Annotated[
        str, typer.Option(help="The arm that servers run; adapted+window if their draft has one.")
    ] = "adapted",
    resume: Resume = False,
) -> None:
    """Train a draft for servers of the same file, with [bold]adapt.placement: sidecar[/].

    Servers connect when they like, and go on serving when this ends. It stops on SIGTERM or Ctrl-C, and
    saves what was learnt as [bold]adapt.checkpoint[/] says.
    """
    from cosched.runs.train import train as run_trainer
    from cosched.settings.load import load_config

    run_trainer(load_config(config, overrides or ()), arm, resume)


@app.command()
def control(
    verb: Annotated[str, typer.Argument(metavar="status|on|off|rollback N|save NAME")],
    what: Annotated[str | None, typer.Argument(metavar="[N or NAME]")] = None,
    url: ServerUrl = "http://127.0.0.1:30000",
    api_key: ApiKey = None,
    replica: Replica = 0,
) -> None:
    """Ask a running server how its draft does, or tell it what to do with it.

    [bold]save[/] writes the draft that serves into the server's run folder, as checkpoints/NAME.
    """
    from cosched.engines.sglang.operators.routes import call, in_lines, request_body

    for name, value in in_lines(call(url, verb, request_body(verb, what), api_key, replica)):
        console.print(f"{name:26}{value}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Can the draft of this file be served?")
    ] = None,
    overrides: Overrides = None,
    url: Annotated[str | None, typer.Option(help="A running server to look at.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Say what is installed, whether it fits together, and what to do where it does not."""
    from cosched.doctor import examine
    from cosched.settings.load import load_config

    marks = {"ok": "[green]ok[/]  ", "note": "[yellow]note[/]", "bad": "[bold red]BAD[/] "}
    worst = 0
    loaded = None if config is None else load_config(config, overrides or ())
    for finding in examine(loaded, url, api_key):
        console.print(marks[finding.level], escape(finding.text), soft_wrap=True, highlight=False)
        worst |= finding.level == "bad"
    raise typer.Exit(worst)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A draft checkpoint in any format that we read.")],
    destination: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    form: Annotated[
        str, typer.Option("--format", help="sglang, specforge, speculators; zlab, amd.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[drafter.key=value …]", help="What the checkpoint does not say."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="The drafter, where config.json does not tell.")
    ] = None,
) -> None:
    """Write a draft checkpoint in another public format, bit by bit the same weights."""
    from cosched.convert_checkpoint import convert as convert_checkpoint

    family, problems = convert_checkpoint(source, destination, form, kind, overrides or ())
    console.print(f"{family}: {source} -> [bold]{destination}[/] ({form})", soft_wrap=True)
    _say_what_sglang_cannot(problems)


@app.command()
def plugins() -> None:
    """List drafters, losses, policies, objectives and draft lengths, and where they come from."""
    from cosched.registry import DRAFTERS, LENGTHS, LOSSES, OBJECTIVES, POLICIES

    table = Table("kind", "name", "what it is")
    table.add_column("from", overflow="fold")
    for registry in (DRAFTERS, LOSSES, POLICIES, OBJECTIVES, LENGTHS):
        for plugin in registry.plugins():
            table.add_row(registry.role, plugin.name, plugin.summary, plugin.origin)
    console.print(table)


def _say_what_sglang_cannot(problems: Sequence[str], draft: str = "this draft") -> None:
    for problem in problems:
        console.print(f"stock SGLang cannot run {draft}: {escape(problem)}", soft_wrap=True)


def _progress(what: str = "tokens,") -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


def main() -> None:
    """Entry point of the ``cosched`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Large tensors in huge pages, which torch looks up at its first tensor: it gives their memory back
    # and asks for it anew all the time, and an update spent a quarter of its time on faults of 4 KiB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except CoschedError as error:
        errors.print(f"[bold red]cosched:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        errors.print("[bold red]cosched:[/] interrupted")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
