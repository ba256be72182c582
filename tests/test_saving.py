"""What is kept of a served draft: whole checkpoints, saved unasked, and a history."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from cosched.engines.sglang.worker.autosave import Autosave
from cosched.errors import ConfigError, RunFolderError
from cosched.telemetry.history import History
from cosched.telemetry.whole_folder import write_whole
from drafters.checkpoint import write_checkpoint
from tests.helpers.serving import config

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


# --- saved unasked --------------------------------------------------------------------------


def autosave(folder: Path, every: int = 0, at_end: bool = True, keep: int = 2) -> Autosave:
    return Autosave(folder, lambda path: write_whole(path, fill), every, at_end, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_so_many_publications_are_saved_and_the_newest_kept(tmp_path: Path) -> None:
    """Folders that somebody named stay."""
    fill(tmp_path / "auto-of-mine")
    saving = autosave(tmp_path, every=4)
    for version in range(1, 20):
        saving.look(version)
        saving.look(version)  # most rounds publish nothing
    assert names(tmp_path) == ["auto-12", "auto-16", "auto-of-mine"]
    saving.end(19)
    assert names(tmp_path) == ["auto-16", "auto-19", "auto-of-mine"]


def test_by_default_only_the_end_is_saved(tmp_path: Path) -> None:
    """Requests would wait for it at any other time."""
    publish = config().adapt.publish
    assert (publish.save_at_end, publish.save_every, publish.saves_kept) == (True, 0, 2)
    saving = autosave(tmp_path)
    for version in range(1, 500):
        saving.look(version)
    assert names(tmp_path) == []
    saving.end(499)
    saving.end(499)
    assert names(tmp_path) == ["auto-499"]


def test_nothing_is_saved_that_is_not_asked_for(tmp_path: Path) -> None:
    autosave(tmp_path, at_end=False).end(7)
    autosave(tmp_path).end(0)  # nothing has been learnt
    assert names(tmp_path) == []


def test_a_full_disk_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next one is tried again."""
    failing = [True]

    def save(path: Path) -> None:
        if failing[0]:
            raise RunFolderError(f"{path} cannot be written: No space left on device")
        fill(path)

    saving = Autosave(tmp_path, save, every=2, at_end=True, keep=2)
    with caplog.at_level(logging.WARNING, "cosched"):
        saving.look(2)
    assert "version 2 of the draft is not saved" in caplog.text
    saving.look(3)
    failing[0] = False
    saving.look(3)
    assert names(tmp_path) == []
    saving.look(4)
    assert names(tmp_path) == ["auto-4"]


def test_what_could_not_be_saved_is_saved_at_the_end(tmp_path: Path) -> None:
    """Though nothing has been published since."""
    disk = [RunFolderError("No space left on device")]

    def save(path: Path) -> None:
        if disk:
            raise disk.pop()
        fill(path)

    saving = Autosave(tmp_path, save, every=2, at_end=True, keep=2)
    saving.look(2)
    assert names(tmp_path) == []
    saving.end(2)
    saving.end(2)
    assert names(tmp_path) == ["auto-2"]


@pytest.mark.parametrize("word", ["saves_kept=0", "save_every=-1", "save_at_end=2"])
def test_what_is_saved_has_bounds(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapt\.publish\.{word.partition('=')[0]}: "):
        config(f"adapt.publish.{word}")


# --- history --------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_a_history_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once: an exception here would stop the training."""
    with caplog.at_level(logging.WARNING, "cosched"):
        history = History(tmp_path / "nowhere" / "events.jsonl", lambda: 0.0)
        for number in range(3):
            history.emit("update", round=number)
    assert caplog.text.count("keeps no history") == 1
