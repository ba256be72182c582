"""What is kept of a served draft: whole folders, and a history."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from cosched.errors import RunFolderError
from cosched.telemetry.history import History
from cosched.telemetry.whole_folder import write_whole
from drafters.checkpoint import write_checkpoint

# --- whole folders --------------------------------------------------------------------------


def fill(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    """It is written beside its place: no reader finds half a checkpoint."""

    def write(path: Path) -> None:
        assert path.parent == tmp_path
        assert path != tmp_path / "new"
        fill(path)
        assert not (tmp_path / "new").exists()

    write_whole(tmp_path / "new", write)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(RunFolderError, match=r"new exists and is not empty; name a new folder$"):
        write_whole(tmp_path / "new", write)


def test_writers_of_one_name_leave_one_folder_and_nothing_else(tmp_path: Path) -> None:
    """Eight saves at once shared one partial folder, and left it behind: a gigabyte each time."""
    together, refusals = threading.Barrier(8), []

    def write(path: Path) -> None:
        fill(path)
        together.wait(10)

    def save() -> None:
        try:
            write_whole(tmp_path / "one", write)
        except RunFolderError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert len(refusals) == 7


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        fill(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFolderError, match="cannot be written: No space left"):
        write_whole(tmp_path / "new", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_of_a_checkpoint_have_the_mode_that_the_user_set(
    tmp_path: Path, mask: int, mode: int
) -> None:
    """Weights were 0600 beside a 0644 configuration: another user's server could not load them."""
    before = os.umask(mask)
    try:
        write_checkpoint(tmp_path / "x", {}, {"a": torch.zeros(2)}, {"b.pt": {}})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x").iterdir()}
    assert modes == {"model.safetensors": mode, "b.pt": mode, "config.json": mode}


# --- history --------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_history_says_when_and_is_bounded(tmp_path: Path) -> None:
    """A server runs for months: two files of a limited size, the newest events always there."""
    now = iter(range(1000))
    history = History(tmp_path / "events.jsonl", lambda: next(now), limit=400)
    for number in range(100):
        history.emit("update", round=number)
    history.close()
    assert names(tmp_path) == ["events.1.jsonl", "events.jsonl"]
    assert all(path.stat().st_size < 500 for path in tmp_path.iterdir())
    kept = lines(tmp_path / "events.1.jsonl") + lines(tmp_path / "events.jsonl")
    assert [event["round"] for event in kept] == list(range(100 - len(kept), 100))
    assert kept[-1] == {"kind": "update", "time": 99, "round": 99}


def test_a_history_goes_on_where_it_was(tmp_path: Path) -> None:
    for number in range(2):
        history = History(tmp_path / "events.jsonl", lambda: 0.0)
        history.emit("update", round=number)
        history.close()
    assert [event["round"] for event in lines(tmp_path / "events.jsonl")] == [0, 1]


def test_a_private_history_is_its_users_alone(tmp_path: Path) -> None:
    """Texts of clients are in one: the next file is as private as the one before it."""
    texts = History(tmp_path / "texts.jsonl", lambda: 0.0, limit=100, private=True)
    for number in range(20):
        texts.emit("text", id=str(number))
    texts.close()
    assert names(tmp_path) == ["texts.1.jsonl", "texts.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_history_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once: an exception here would stop the training."""
    with caplog.at_level(logging.WARNING, "cosched"):
        history = History(tmp_path / "nowhere" / "events.jsonl", lambda: 0.0)
        for number in range(3):
            history.emit("update", round=number)
    assert caplog.text.count("writes events.jsonl no more") == 1
