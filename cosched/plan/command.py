"""``cosched plan``, as the command line has it."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotation
from typing import Annotated

import msgspec
import typer
from rich.console import Console


def plan(
    config: Annotated[
        Path, typer.Option("-c", "--config", help="The experiment, or the server, a YAML file.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key.sub=value …]", help="Settings to change; plan.KEY says what is planned."
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="The folder of a run that measured it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Would a learning draft pay here, and how many servers does one trainer reach?

    It takes what a run measured (or what [bold]plan.KEY=VALUE[/] gives), simulates servers, link and trainer, and says
    of each figure whether it was measured, scaled, counted, given or assumed. No model is loaded.
    """
    from cosched.plan.forecast import forecast
    from cosched.plan.settings import load
    from cosched.plan.table import costs_table, lines_table, sentences

    console, errors = Console(), Console(stderr=True)
    loaded, asked = load(config, words or ())
    with errors.status("planning") as status:
        found = forecast(loaded, asked, source, lambda what: status.update(f"simulating {what}"))
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    console.print(lines_table(found))
    console.print(costs_table(found))
    for sentence in sentences(found):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
