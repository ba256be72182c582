"""The folder of a run: made once, written whole, readable after an interruption."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import msgspec
from safetensors import SafetensorError

from cosched.errors import NOT_DECODED, RunFolderError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

Record = TypeVar("Record")


class RunFolder:
    """``config.yaml``, ``events.jsonl``, ``summary.json``, ``report.html``, ``checkpoints/``.

    Only a folder that has the file ``marker``, or nothing, is ever replaced.
    """

    def __init__(self, path: Path, marker: str = "config.yaml") -> None:
        self.path = path
        self._marker = marker

    def check_free(self, overwrite: bool) -> None:
        """Make sure that nothing of value is in the way.

        Raises:
            RunFolderError: the folder exists and ``overwrite`` is off, or it is no run's.
        """
        with explained(self.path):  # a parent folder may be closed to us
            exists = self.path.exists()
            foreign = (
                exists and not (self.path / self._marker).exists() and any(self.path.iterdir())
            )
        if exists and not overwrite:
            raise RunFolderError(
                f"{self.path} exists; give --overwrite to replace it, or another run.name"
            )
        if foreign:
            raise RunFolderError(
                f"{self.path} is no run folder (no {self._marker}); not overwriting it"
            )

    def check_same(self, config_yaml: str) -> None:
        """Make sure that the folder is of a run with these very settings.

        Raises:
            RunFolderError: it is not there, or its settings differ (the message names a line).
        """
        path = self.path / "config.yaml"
        with explained(path):
            before = path.read_text().splitlines() if path.exists() else None
        if before is None:
            raise RunFolderError(f"{self.path} has nothing to resume: there is no such run")
        for old, new in zip_longest(before, config_yaml.splitlines()):
            if old != new:
                raise RunFolderError(
                    f"{self.path} was run with {(old or 'nothing').strip()!r}, now it is "
                    f"{(new or 'nothing').strip()!r}; resume with the same settings"
                )

    def create(self, overwrite: bool = False) -> None:
        """Make the folder, empty.

        Raises:
            RunFolderError: as ``check_free``, or it cannot be made.
        """
        self.check_free(overwrite)
        with explained(self.path):
            if self.path.exists():
                # The marker goes last: who is killed in between has left a folder that may be replaced.
                for path in sorted(self.path.iterdir(), key=lambda one: one.name == self._marker):
                    is_folder = path.is_dir() and not path.is_symlink()
                    shutil.rmtree(path) if is_folder else path.unlink()
            self.path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file whole: a reader finds the old or the new one, never half of it."""
        target = self.path / name
        partial = target.with_name(f".{target.name}.partial")
        data = content.encode() if isinstance(content, str) else content
        with explained(target):
            partial.write_bytes(data)
            partial.replace(target)
        return target


class EventLog:
    """``events.jsonl``: one object a line, with ``kind`` and ``arm``; opened when the run starts."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def open(self, path: Path, keep_bytes: int = 0, buffered: bool = True) -> None:
        """Start the file, or go on behind its first ``keep_bytes``.

        Without a buffer every event is in the file at once, also if the process is killed.

        Raises:
            RunFolderError: it cannot be written, or has not so many bytes.
        """
        self._path = path
        with explained(path):
            size = path.stat().st_size if path.exists() else 0
            if not 0 <= keep_bytes <= size:
                raise RunFolderError(
                    f"{path} has {size} bytes, and {keep_bytes} of it are to be kept; it was cut off"
                )
            self._file = path.open("ab", buffering=1 << 16 if buffered else 0)
            self._file.truncate(keep_bytes)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        assert self._file is not None
        assert self._path is not None
        with explained(self._path):
            self._file.write(msgspec.json.encode({"kind": kind, **fields}) + b"\n")

    def flush(self, durable: bool = False) -> int:
        """Write out what is buffered; returns the size of the file in bytes.

        What is ``durable`` is on the disk when this returns: it survives the machine's end too.
        """
        assert self._file is not None
        assert self._path is not None
        with explained(self._path):
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
            return self._file.tell()

    def for_arm(self, arm: str) -> ArmEvents:
        """The same log as a ``Sink`` that names the arm."""
        return ArmEvents(self, arm)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._file is not None and self._path is not None:
            with explained(self._path):
                self._file.close()


class ArmEvents:
    """The event log as one arm writes to it."""

    def __init__(self, log: EventLog, arm: str) -> None:
        self._log = log
        self._arm = arm

    def emit(self, kind: str, **fields: Any) -> None:
        self._log.emit(kind, arm=self._arm, **fields)


class NoEvents:
    """A sink for who keeps none."""

    def emit(self, kind: str, **fields: Any) -> None:
        pass


@contextmanager
def explained(path: Path, done: Literal["written", "read"] = "written") -> Generator[None]:
    """Turn what the file system says into one message that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise RunFolderError(f"{path} cannot be {done}: {said}") from error


def trainer_folder(run_folder: Path) -> Path:
    """Beside the run folder, which is a server's or an experiment's: what its trainer saves and shows."""
    return run_folder.with_name(f"{run_folder.name}-trainer")


def read_json(path: Path, of: type[Record], why: str = "is damaged") -> Record:
    """A record that was written as JSON.

    Raises:
        RunFolderError: it cannot be read, or is damaged.
    """
    with explained(path, "read"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=of)
    except NOT_DECODED as error:
        raise RunFolderError(f"{path} {why}: {error}") from error
