"""States on a disk: whole or passed over by name, the newest few, whenever their writer is killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cosched.errors import RunFolderError
from cosched.telemetry import whole_folder
from cosched.telemetry.saved_states import NEWEST, SUMS, SavedStates, damage_of
from tests.helpers.paths import ROOT
from tests.helpers.states import number_of, numbered


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_newest_of_them_is_found(tmp_path: Path) -> None:
    """With what another program can check: ``sha256sum -c SHA256SUMS``."""
    states = SavedStates(tmp_path / "deep" / "state", keep=3)
    assert states.newest() is None
    for number in range(7):
        path = states.save(numbered(number))
        assert states.newest() == path
        assert number_of(path) == number
    assert names(states.folder) == ["00000005", "00000006", "00000007", NEWEST]
    subprocess.run(["sha256sum", "-c", "--quiet", "--strict", SUMS], cwd=path, check=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def to_a_link(path: Path) -> None:
    kept = path.with_name("elsewhere")
    path.rename(kept)
    path.symlink_to(kept)


def to_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [flip, cut, Path.unlink, to_a_link, to_a_pipe])
@pytest.mark.parametrize("name", ["state.json", "draft/model", SUMS])
def test_what_is_not_as_it_was_written_is_passed_over_by_name(
    tmp_path: Path, spoil: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it goes; where none is whole it is an error, not a new beginning."""
    states = SavedStates(tmp_path)
    paths = [states.save(numbered(number)) for number in range(2)]
    spoil(paths[1] / name)
    with caplog.at_level(logging.WARNING, "cosched"):
        assert number_of(states.newest()) == 0
    assert str(paths[1]) in caplog.text
    spoil(paths[0] / name)
    with pytest.raises(RunFolderError, match=f"no state in {tmp_path} is whole: .*{paths[0]}"):
        states.newest()
    states.save(numbered(5))
    assert number_of(states.newest()) == 5


def test_a_file_that_nobody_wrote_is_an_alteration(tmp_path: Path) -> None:
    path = SavedStates(tmp_path).save(numbered(0))
    (path / "draft" / "pytorch_model.bin").write_bytes(b"")
    assert damage_of(path) == f"{path}/draft/pytorch_model.bin is none of its files"


@pytest.mark.parametrize("pointer", [b"", b"\xff\xfe", b"../../etc", b"00000009\n", None])
def test_without_a_pointer_the_newest_goes(tmp_path: Path, pointer: bytes | None) -> None:
    states = SavedStates(tmp_path)
    for number in range(2):
        states.save(numbered(number))
    (tmp_path / NEWEST).unlink()
    if pointer is not None:
        (tmp_path / NEWEST).write_bytes(pointer)
    assert number_of(states.newest()) == 1


@pytest.mark.parametrize("at", ["fill", "sync", "pointer"])
def test_a_full_disk_leaves_what_there_was(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said in one message, leaves no half of anything, and the next one is saved again."""
    states = SavedStates(tmp_path)
    first = states.save(numbered(0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    fill = full if at == "fill" else numbered(1)
    with monkeypatch.context() as patch:
        if at == "sync":
            patch.setattr(whole_folder, "_sync_all", full)
        if at == "pointer":
            patch.setattr(SavedStates, "_point_to", lambda *_: refuse())
        with pytest.raises(RunFolderError, match="No space left"):
            states.save(fill)
    assert names(tmp_path) == [first.name, NEWEST]
    assert states.newest() == first
    assert number_of(states.save(numbered(2))) == number_of(states.newest()) == 2


def refuse() -> None:
    raise RunFolderError("newest cannot be written: No space left on device")


def test_one_process_at_a_time_writes_there(tmp_path: Path) -> None:
    """Two servers of one name would remove what the other has just written; one that has ended, however
    it did, does not."""
    program = (
        "import os, sys, pathlib\n"
        "from cosched.telemetry.saved_states import SavedStates\n"
        "SavedStates(pathlib.Path(sys.argv[1])).hold()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False)
    assert (tmp_path / "lock").exists()
    SavedStates(tmp_path).hold()
    with pytest.raises(RunFolderError, match="another process's to write to"):
        SavedStates(tmp_path).hold()


@pytest.mark.slow
@pytest.mark.long
def test_a_writer_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    """Forty times, at random moments: a whole state is there each time, never older than the one whose
    writing was reported last, and nothing that was left half done stays."""
    generator = random.Random(0)
    reported = 0
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.states", str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= reported
        time.sleep(generator.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        reported = int(lines[-1]) if lines else first
        newest = SavedStates(tmp_path).newest()
        if newest is None:  # killed before the first was whole
            assert reported == 0
        else:
            assert reported <= number_of(newest) <= reported + 1
    assert reported > 8  # also where the disk is slow: some were whole
    SavedStates(tmp_path).save(numbered(0))
    assert len(names(tmp_path)) == 3
