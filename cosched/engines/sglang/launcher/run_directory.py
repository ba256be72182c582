"""What the processes of one server share: a private folder that lives as long as the server.

The launcher makes it and names it in ``COSCHED_RUN``. In it are the settings, what each scheduler
process reported when its worker stood, and the socket that operators' requests go through.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import IO

import msgspec

from cosched.engines.sglang import RUN
from cosched.errors import ConfigError
from cosched.telemetry.run_folder import RunFolder

PREFIX = "cosched-"
LONGEST = 107 - len(f"/{PREFIX}12345678/tmp12345678")  # SGLang's sockets; Linux ends a path there
LOCK = "launcher.lock"
SHARED = "shared"
LOADS = re.compile(r"/dev/shm/sglang_loads_\S+")  # memory in which SGLang's ranks show their load


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduler process says that its worker stands, or why it does not (``error``)."""

    rank: int
    pid: int
    algorithm: str
    versions: dict[str, str]
    error: str | None = None


class RunDirectory:
    """The folder (mode 0700, in the system's temporary one: a socket's path must be short)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None  # of the launcher, for as long as it lives

    @classmethod
    def create(cls, config_yaml: str) -> RunDirectory:
        """A new folder with the settings in it; those of this user whose launcher was killed go.

        Raises:
            ConfigError: no socket could be in it.
        """
        if reason := too_long(temporary := tempfile.gettempdir()):
            raise ConfigError(reason)
        _remove_left_behind(Path(temporary))
        directory = cls(Path(tempfile.mkdtemp(prefix=PREFIX)))
        own = directory.path / "own.lock"
        directory._lock = _locked(own)
        own.rename(directory.path / LOCK)  # locked already when it can be found
        RunFolder(directory.path).write("config.yaml", config_yaml)
        return directory

    @classmethod
    def current(cls) -> RunDirectory | None:
        """The one that this process was started with."""
        path = os.environ.get(RUN)
        return cls(Path(path)) if path else None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def socket(self, replica: int = 0) -> Path:
        """Where operators reach one of the server's replicas."""
        return self.path / f"{replica}.sock"

    def sockets(self, replicas: int) -> list[Path]:
        return [self.socket(replica) for replica in range(replicas)]

    def report(self, rank: int, algorithm: str, error: str | None = None) -> None:
        """Called in a scheduler process, once; ``rank`` is among those of all replicas."""
        names = ("cosched", "sglang", "torch", "deepspeed")
        report = Report(
            rank=rank,
            pid=os.getpid(),
            algorithm=algorithm,
            versions={name: version for name in names if (version := version_of(name))},
            error=error,
        )
        RunFolder(self.path).write(f"rank{rank}.json", msgspec.json.encode(report))

    def reports(self) -> list[Report]:
        """All that came in."""
        files = sorted(self.path.glob("rank*.json"))
        return [msgspec.json.decode(file.read_bytes(), type=Report) for file in files]

    def note_shared(self) -> None:
        """Write down which memory SGLang's ranks share: they stand, and none of them will remove it."""
        found: set[str] = set()
        for report in self.reports():
            found |= set(LOADS.findall(Path(f"/proc/{report.pid}/maps").read_text()))
        RunFolder(self.path).write(SHARED, "\n".join(sorted(found)))

    def failure(self) -> str | None:
        """Why a scheduler process could not set up its worker."""
        return next((report.error for report in self.reports() if report.error), None)

    def check_reports(self, num_ranks: int) -> None:
        """Make sure that every rank's worker is ours.

        Raises:
            ConfigError: one did not report, or reported that it failed.
        """
        if failure := self.failure():
            raise ConfigError(f"the server cannot start: {failure}")
        missing = set(range(num_ranks)) - {report.rank for report in self.reports()}
        if missing:
            ranks = ", ".join(map(str, sorted(missing)))
            raise ConfigError(
                f"SGLang is up, but without cosched: no adapting worker reported from rank {ranks} "
                f"of {num_ranks}, so its draft would not learn. SGLang only logs a plugin that "
                f"fails: see its log above, and run cosched doctor"
            )

    def remove(self) -> None:
        _remove(self.path)
        if self._lock is not None:
            self._lock.close()


def _locked(path: Path) -> IO[bytes] | None:
    """The file, locked; None where another process has locked it. A lock ends with its process."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _remove_left_behind(parent: Path) -> None:
    """A launcher that was killed could not remove its folder, nor the socket in it."""
    for path in parent.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # another user's, or just gone
            if path.stat().st_uid == os.getuid() and (lock := _locked(path)) is not None:
                _remove(path.parent)
                lock.close()


def _remove(directory: Path) -> None:
    """With the memory that was shared: SGLang leaves it, and what is in the folder, for good."""
    with contextlib.suppress(OSError):  # it did not come so far
        for name in (directory / SHARED).read_text().splitlines():
            Path(name).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def too_long(temporary: str) -> str | None:
    """Why a server's sockets cannot be below this temporary folder; None where they can."""
    if (length := len(os.fsencode(temporary))) <= LONGEST:
        return None
    return (
        f"TMPDIR: {temporary} has {length} bytes, and the path of a server's socket has room for a temporary "
        f"folder of {LONGEST}; set a shorter one"
    )


def version_of(package: str) -> str | None:
    """The installed version; None where the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
