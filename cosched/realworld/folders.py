"""Files and folders that are there whole or not at all.

Of a sealed folder ``SHA256SUMS`` say whether it still is.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cosched.errors import RealWorldError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

SUMS = "SHA256SUMS"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder to write in; it takes the name ``path`` when it is done, in place of what is there.

    Until then ``path`` is what it was. What a killed process leaves is hidden beside it and is
    removed by the next attempt.

    Raises:
        RealWorldError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    before = path.with_name(f".{path.name}.before")
    try:
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _take_the_place(partial, path, before)
    except OSError as error:
        raise RealWorldError(f"{path} cannot be written: {error}") from error
    finally:
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """A file to write; it takes the name ``path`` when it is done, in place of what is there.

    Raises:
        RealWorldError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise RealWorldError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def sealed_folder(path: Path) -> Generator[Path]:
    """A new folder that also gets ``SHA256SUMS``, as ``sha256sum -c`` reads them.

    Raises:
        RealWorldError: it cannot be written.
    """
    with new_folder(path) as partial:
        yield partial
        (partial / SUMS).write_text(sums_of(partial), encoding="utf-8")


def sums_of(path: Path) -> str:
    """A line of SHA-256 and name for every file of a folder, by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return "".join(f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in files)


def _take_the_place(partial: Path, path: Path, before: Path) -> None:
    """What was at ``path`` goes only when the new one is there."""
    if path.exists():
        path.rename(before)
    try:
        partial.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        raise


def is_whole(path: Path) -> bool:
    """Whether a sealed folder is there as it was written; False where there is nothing.

    Raises:
        RealWorldError: something is there that is no sealed folder, or not what was written.
    """
    if not path.exists():
        return False
    remedy = "delete it, or give --overwrite to get it anew"
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RealWorldError(
            f"{path} is there, but not from here (no {SUMS} in it); {remedy}"
        ) from error
    for line in lines:
        wanted, _, name = line.partition("  ")
        file = path / name
        if not file.is_file():
            raise RealWorldError(f"{path} is not whole: {name} is missing; {remedy}")
        if (found := sha256_of(file)) != wanted:
            raise RealWorldError(
                f"{path} was changed or damaged: {name} has SHA-256 {found}, and {wanted} was "
                f"written; {remedy}"
            )
    return True
