"""The result of a suite: what was asked, with what, and what came out. Fields are added, never renamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cosched.bench.figures import Row
from cosched.bench.machine import Machine
from cosched.errors import RunFolderError
from cosched.telemetry.run_folder import RunFolder, explained, read_json

if TYPE_CHECKING:
    from pathlib import Path


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A run that the figures are of; its own ``commit`` and machine, as it may be older than the result.

    ``name`` ends in a digest of all its settings.
    """

    name: str
    seed: int
    seconds: float
    finished_at: str
    commit: str | None
    dirty: bool
    machine: Machine | None


class SuiteResult(msgspec.Struct, frozen=True, kw_only=True):
    """``NAME.json``. ``suite`` is the suite's file, ``overrides`` what was given behind it.

    ``commit`` and ``machine`` are those of the runs where all have the same, else None: each of ``runs``
    has its own. ``failures`` say what is below what was wanted.
    """

    name: str
    about: str
    command: str
    commit: str | None
    dirty: bool
    date: str
    machine: Machine | None
    seconds: float
    suite: dict[str, Any]
    overrides: list[str]
    runs: list[RunRecord]
    rows: list[Row]
    failures: list[str] = []

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})


def write_result(result: SuiteResult, folder: Path, file: str) -> Path:
    """Write it whole.

    Raises:
        RunFolderError: it cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    return RunFolder(folder).write(file, content)


def read_result(path: Path) -> SuiteResult:
    """Read one back.

    Raises:
        RunFolderError: it is not there, or damaged.
    """
    if not path.exists():
        raise RunFolderError(f"there is no {path}: `cosched bench {path.stem} --keep` makes it")
    return read_json(path, SuiteResult)
