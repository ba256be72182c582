"""What is to be gone on from after an end without a word: the newest few states, each whole.

A folder of states holds one folder a state, by its number, and the file ``newest``, which names the one
to go on from. A state is filled beside its place, its files are listed with their SHA-256 in
``SHA256SUMS`` (as ``sha256sum -c`` reads it), all of it is on the disk before it gets its name, and only
then ``newest`` is replaced and an older state removed. So at any moment the one that is named is whole.
A disk may still alter what it holds: what does not match its sums is passed over, by name.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
from typing import TYPE_CHECKING

from cosched.errors import RunFolderError
from cosched.telemetry.run_folder import explained
from cosched.telemetry.whole_folder import sync, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUMS = "SHA256SUMS"
NEWEST = "newest"
NAME = re.compile(r"\d{8}")
LONGEST = 1 << 20  # bytes of a list of some dozen files
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")

logger = logging.getLogger("cosched")


class SavedStates:
    """The newest ``keep`` states in a folder that nobody else writes to."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep
        self._lock: int | None = None

    def hold(self) -> None:
        """Let no other process hold the folder as long as this one lives, or until it is let go.

        Raises:
            RunFolderError: another holds it, or it cannot be written to.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except OSError as error:
            os.close(lock)
            raise RunFolderError(
                f"{self.folder} is another process's to write to: end that, or take a run.name of "
                f"your own"
            ) from error
        self._lock = lock

    def let_go(self) -> None:
        """Whoever wants to may hold the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def saved_at(self) -> float:
        """When the newest was saved, in seconds since 1970; 0 where none was."""
        times = (
            path.stat().st_mtime
            for path in (self.folder / NEWEST, *self._folders())
            if path.exists()
        )
        return max(times, default=0.0)

    def save(self, fill: Callable[[Path], None]) -> Path:
        """One more state, of the files that ``fill`` writes into a folder which is there and empty.

        Raises:
            RunFolderError: it cannot be written; the states that there were are still there.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.name) for path in self._folders()]
        path = self.folder / f"{max(numbers, default=0) + 1:08}"

        def write(partial: Path) -> None:
            partial.mkdir()
            fill(partial)
            (partial / SUMS).write_text(_sums(partial))

        write_whole(path, write, durable=True)
        try:
            self._point_to(path.name)
        except RunFolderError:
            shutil.rmtree(path, ignore_errors=True)  # the one that is pointed to stays the newest
            raise
        self._remove_others()
        return path

    def newest(self) -> Path | None:
        """The newest state that is whole; None where nothing has ever been saved.

        What is not whole is passed over with a warning that names the file.

        Raises:
            RunFolderError: there are states, and none of them is whole.
        """
        damages: list[str] = []
        for path in self._in_order():
            damage = damage_of(path)
            if damage is None:
                return path
            damages.append(damage)
            logger.warning("cosched passes over a saved state that is not whole: %s", damage)
        if damages:
            raise RunFolderError(f"no state in {self.folder} is whole: {'; '.join(damages)}")
        return None

    def _in_order(self) -> Iterator[Path]:
        """The one that is pointed to, then all others from the newest on."""
        paths = sorted(self._folders(), reverse=True)
        name = self._pointed_to()
        if paths and name is None:
            logger.warning("cosched cannot read %s; the newest state goes", self.folder / NEWEST)
        named = [path for path in paths if path.name == name]
        yield from named
        yield from (path for path in paths if path not in named)

    def _pointed_to(self) -> str | None:
        pointer = self.folder / NEWEST
        try:
            name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
        except OSError:
            return None
        return name if NAME.fullmatch(name) else None

    def _point_to(self, name: str) -> None:
        pointer = self.folder / NEWEST
        partial = pointer.with_name(f".{NEWEST}.partial")
        with explained(pointer):
            partial.write_text(f"{name}\n")
            sync(partial)
            partial.replace(pointer)
            sync(self.folder)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]

    def _remove_others(self) -> None:
        """All but the newest few, and what a writer that was killed has left half done."""
        for path in sorted(self._folders())[: -self._keep]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".*.partial"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def damage_of(path: Path) -> str | None:
    """What is wrong with a state, with the name of a file; None where it is as it was written."""
    sums = path / SUMS
    try:
        if not stat.S_ISREG((found := sums.lstat()).st_mode) or found.st_size > LONGEST:
            return f"{sums} is damaged"
        *whole, rest = sums.read_text().split("\n")
        lines = [LINE.fullmatch(line) for line in whole]
        listed = {line[2]: line[1] for line in lines if line}
        if rest or not listed or len(listed) != len(lines):
            return f"{sums} is damaged"
        files = _files(path)
        if missing := sorted(listed.keys() - files.keys()):
            return f"{path / missing[0]} is missing"
        if foreign := sorted(files.keys() - listed.keys()):
            return f"{path / foreign[0]} is none of its files"
        for name, file in files.items():
            if _sum(file) != listed[name]:
                return f"{file} is not as it was written"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{sums.parent} cannot be read: {error}"
    return None


def _files(path: Path) -> dict[str, Path]:
    """By the names that they are listed under; a link is no file of a state's."""
    found = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return {file.relative_to(path).as_posix(): file for file in found if file != path / SUMS}


def _sums(path: Path) -> str:
    files = sorted(_files(path).items())
    return "".join(f"{_sum(file)}  {name}\n" for name, file in files)


def _sum(file: Path) -> str:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe has no end
    with os.fdopen(descriptor, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
