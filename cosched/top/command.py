"""``cosched top``, as the command line has it."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003  typer reads the annotation
from typing import Annotated

import typer
from rich.console import Console


def top(
    run_dir: Annotated[
        Path | None, typer.Argument(help="The folder of a run, instead of a server.")
    ] = None,
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:30000",
    api_key: Annotated[
        str | None, typer.Option(envvar="COSCHED_API_KEY", help="The server's key, if it has one.")
    ] = None,
    replica: Annotated[int, typer.Option(min=0, help="Which of the server's, with --dp-size.")] = 0,
    arm: Annotated[str, typer.Option(help="Which arm of the run.")] = "adapted",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Watch a running server, or a run: acceptance by place and depth, versions, guard, time, alarms.

    It ends with Ctrl-C. [bold]--once[/] is for scripts.
    """
    from cosched.top.sources import Run, Server
    from cosched.top.watch import watch

    source = Server(url, api_key, replica) if run_dir is None else Run(run_dir, arm)
    watch(source, Console(), interval, time.sleep, once)
