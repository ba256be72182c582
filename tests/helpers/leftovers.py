"""What processes leave behind: those of one run that live, and the shared memory that they have mapped.

A run is told by a variable in its environment, which all that it starts inherit.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

SHARED = Path("/dev/shm")
ENDING_S = 15.0  # that a process may take to see that its parent is gone

_MARK = "COSCHED_TEST_RUN"


def mark(name: str) -> dict[str, str]:
    """Variables to start that run with; a process that gives itself a title keeps them."""
    return {_MARK: name, "SPT_NOENV": "1"}


def marked(name: str) -> list[int]:
    """Processes of that run that live: a zombie has no environment."""
    wanted = f"{_MARK}={name}".encode()
    found: list[int] = []
    for path in listed(Path("/proc")):
        if path.name.isdecimal():
            with suppress(OSError):
                if wanted in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def mapped_by(pids: list[int]) -> set[Path]:
    """Shared memory by its names: others on this machine have some too."""
    found: set[Path] = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if f" {SHARED}/" in line:
                    found.add(SHARED / line.partition(f" {SHARED}/")[2].removesuffix(" (deleted)"))
    return found


def left(name: str, temporary: Path, shared: set[Path]) -> list[str]:
    """What there still is of a run that has ended, in words; its processes are ended now."""
    until = time.monotonic() + ENDING_S
    while (alive := marked(name)) and time.monotonic() < until:
        time.sleep(0.05)
    found: list[str] = []
    for pid in alive:
        found.append(f"process {pid}: {command(pid)!r}")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    found += [f"file {path}" for path in temporary.rglob("*")]
    found += [f"shared memory {path}" for path in shared if path.exists()]
    return found


def listed(folder: Path) -> list[Path]:
    """What is in it, if it is there."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def command(pid: int) -> bytes:
    """What that process was started with, or calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
