"""``cosched init`` and ``cosched tinyworld``: the small world that examples and tests run in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

tinyworld_app = typer.Typer(
    no_args_is_help=True, help="The small target, drafts and prompts that come with cosched."
)
console = Console()


@tinyworld_app.command("build")
def tinyworld_build(
    directory: Annotated[Path, typer.Option(help="Where the models and prompts go.")] = Path(
        "build/tinyworld"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to train with.")] = 2,
    share: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the training, to try it out.")
    ] = 1.0,
) -> None:
    """Train the tiny world from this machine's own text (two to three hours on two cores)."""
    from cosched.tinyworld.build import build

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        build(directory, seed, threads, share, progress)
    console.print(f"built: [bold]{directory}[/]", soft_wrap=True)


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where to; here, if none is named.")
    ] = Path(),
) -> None:
    """Write the example experiments, and the toy model that they run with, into a folder."""
    from cosched.tinyworld.starter import write_starter

    for path in write_starter(folder):
        console.print(f"wrote [bold]{path}[/]", soft_wrap=True)
    there = "" if folder == Path() else f"cd {folder} && "
    console.print(f"next: [bold]{there}cosched run -c configs/quickstart.yaml[/]", soft_wrap=True)
