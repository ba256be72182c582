"""Resident memory of a run's processes over time, and how fast it rises."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.leftovers import command, marked

SETTLE_S = (
    300.0  # of a process's life that do not count: caches fill, an allocator grows its arenas
)
WATCHED_S = 240.0  # behind that, or there is no slope: a step of an allocator's would be one
ROLES = {
    b"sglang::scheduler": "scheduler",
    b"sglang::detokenizer": "detokenizer",
    b"cosched.training.process": "trainer beside it",
    b"cosched.cli\0serve": "HTTP server",
    b"cosched.cli\0train": "side-car trainer",
    b"resource_tracker": "resource tracker",
}
OTHERS = "others"  # a command that is typed in a while, a process that has not said its title


@dataclass
class Process:
    """One process: when it was looked at (seconds since the watching began), and what it held then (MiB)."""

    role: str
    at_s: list[float] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)

    @property
    def slope(self) -> float | None:
        """MiB a minute by least squares, behind the first five minutes; None if it was gone too soon."""
        since = self.at_s[0] + SETTLE_S
        pairs = [p for p in zip(self.at_s, self.mebibytes, strict=True) if p[0] >= since]
        if not pairs or pairs[-1][0] - pairs[0][0] < WATCHED_S:
            return None
        minutes = [at / 60 for at, _ in pairs]
        return statistics.linear_regression(minutes, [held for _, held in pairs]).slope


class Resident:
    """Looks at all processes of the run that is marked with ``name``."""

    def __init__(self, name: str) -> None:
        self.processes: dict[int, Process] = {}
        self._name = name
        self._began = time.monotonic()

    def look(self) -> list[int]:
        """Once; which processes there are."""
        pids, at = marked(self._name), time.monotonic() - self._began
        for pid in pids:
            role = _role(command(pid))
            held = _resident(pid)
            if role != OTHERS and held is not None:
                process = self.processes.setdefault(pid, Process(role))
                process.at_s.append(at)
                process.mebibytes.append(held)
        return pids


def _role(words: bytes) -> str:
    return next((role for part, role in ROLES.items() if part in words), OTHERS)


def _resident(pid: int) -> float | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
