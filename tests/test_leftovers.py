"""What the tests of lost processes and of memory rest on: they see what is left, and what grows."""

from __future__ import annotations

import subprocess
import sys
from mmap import mmap
from pathlib import Path
from uuid import uuid4

import pytest

from tests.helpers import leftovers
from tests.helpers.resident import SETTLE_S, Process, Resident

CHILD = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()']); print(flush=True)"
)


def test_what_a_run_leaves_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose parent has ended, a file, and memory that one had mapped; then they are gone."""
    monkeypatch.setattr(leftovers, "ENDING_S", 0.1)
    name, temporary = str(tmp_path), tmp_path / "tmp"
    temporary.mkdir()
    path = Path(f"/dev/shm/test_{uuid4().hex}")
    path.write_bytes(b"x")
    with path.open("r+b") as file, mmap(file.fileno(), 1):
        assert leftovers.left(name, temporary, set()) == []
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD], env=leftovers.mark(name),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.wait(30)
        (temporary / "file").touch()
        (child,) = leftovers.marked(name)
        here = int(Path("/proc/self").resolve().name)
        assert path in leftovers.mapped_by([here])
        found = leftovers.left(name, temporary, {path})
    path.unlink()
    assert [words.partition(":")[0] for words in found] == [
        f"process {child}", f"file {temporary / 'file'}", f"shared memory {path}"
    ]  # fmt: skip
    process.communicate()
    assert leftovers.left(name, temporary, {path}) == [f"file {temporary / 'file'}"]


def test_memory_that_grows_is_seen_behind_the_first_minutes() -> None:
    """What comes before does not count, and of a process that was gone soon nothing is said."""
    times = [float(second) for second in range(0, 1200, 5)]
    held = [100 + (50 if at < SETTLE_S else 0) + 3 * at / 60 for at in times]
    assert Process("one", times, held).slope == pytest.approx(3.0)
    assert Process("one", times[:80], held[:80]).slope is None


def test_processes_are_looked_at_by_what_they_are(tmp_path: Path) -> None:
    """One that a person has typed is none of the server's; memory is what the system says."""
    words = [sys.executable, "-c", "print(flush=True); input()", "cosched.training.process"]
    processes = [
        subprocess.Popen(
            line, env=leftovers.mark(str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for line in (words, words[:-1])
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    resident = Resident(str(tmp_path))
    assert sorted(resident.look()) == sorted(process.pid for process in processes)
    (seen,) = resident.processes.values()
    assert seen.role == "trainer beside it"
    assert 1 < seen.mebibytes[0] < 100
    for process in processes:
        process.communicate()
