"""The folder of a run: made once, written whole, readable after an interruption."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import RunFolderError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


class RunFolder:
    """``config.yaml``, ``events.jsonl``, ``summary.json``, ``report.html``, ``checkpoints/``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, overwrite: bool) -> RunFolder:
        """Make the folder.

        Raises:
            RunFolderError: it exists and ``overwrite`` is off, or it cannot be made.
        """
        if path.exists() and not overwrite:
            raise RunFolderError(
                f"{path} exists; give --overwrite to replace it, or another run.name"
            )
        if path.exists() and not (path / "config.yaml").exists() and any(path.iterdir()):
            raise RunFolderError(f"{path} is no run folder (no config.yaml); not overwriting it")
        with explained(path):
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True)
        return cls(path)

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file whole: a reader finds the old or the new one, never half of it."""
        target = self.path / name
        partial = target.with_name(f".{name}.partial")
        data = content.encode() if isinstance(content, str) else content
        with explained(target):
            partial.write_bytes(data)
            partial.replace(target)
        return target


class EventLog:
    """``events.jsonl``: one object a line, with ``kind`` and ``arm``; a ``Sink`` of an arm."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            self._file = path.open("ab", buffering=1 << 16)

    def emit(self, kind: str, **fields: Any) -> None:
        line = msgspec.json.encode({"kind": kind, **fields})
        with explained(self._path):
            self._file.write(line + b"\n")

    def for_arm(self, arm: str) -> ArmEvents:
        return ArmEvents(self, arm)

    def close(self) -> None:
        with explained(self._path):
            self._file.close()


class ArmEvents:
    """The event log as one arm writes to it."""

    def __init__(self, log: EventLog, arm: str) -> None:
        self._log = log
        self._arm = arm

    def emit(self, kind: str, **fields: Any) -> None:
        self._log.emit(kind, arm=self._arm, **fields)


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn what the file system says into one message that names the file."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror or error}") from error
