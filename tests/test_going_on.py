"""What a server has learnt: saved beside its rounds, gone on from to the bit, and refused elsewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cosched.build.resuming import go_on
from cosched.engines.sglang.launcher.resuming import state_to_resume
from cosched.engines.sglang.worker.saving import Saving
from cosched.errors import ConfigError, RunFolderError, TrainingError
from cosched.loop.learner_state import read_state
from cosched.records import VerifyRound
from cosched.settings.learning import learning_settings
from cosched.settings.sections import CheckpointSettings
from cosched.telemetry.saved_states import SavedStates
from cosched.testing.harness import make_target
from tests.helpers.learners import (
    ALONE,
    ORIGIN,
    learner,
    save_now,
    saved,
    saving,
    some_rounds,
    tell,
    until_written,
    write_draft,
)
from tests.helpers.serving import config


@pytest.fixture(scope="module")
def rounds() -> list[VerifyRound]:
    return some_rounds()


def end_of_second(rounds: list[VerifyRound]) -> int:
    """Rounds until two requests have ended: none runs."""
    ends = [number for number, round_ in enumerate(rounds, 1) if round_.finished]
    return ends[1]


def test_the_next_losses_are_those_of_no_end_to_the_bit(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """Weights, moments, counters, version and what serves: all that the next update depends on."""
    at = end_of_second(rounds)
    whole, cut = learner(make_target()), learner(make_target())
    tell(whole, rounds)
    tell(cut, rounds[:at])
    save_now(cut, tmp_path)
    again = learner(make_target())
    go_on(again, saved(tmp_path), ORIGIN, 0)
    assert again.version == cut.version > 2
    assert again.counters.losses == cut.counters.losses
    tell(again, rounds[at:])
    assert len(again.counters.losses) > len(cut.counters.losses) + 3
    assert again.counters.losses == whole.counters.losses
    assert again.version == whole.version
    for name, weight in whole.trainer.weights().items():  # type: ignore[union-attr]
        assert torch.equal(weight, again.trainer.weights()[name])  # type: ignore[union-attr]


def test_without_its_trainer_what_serves_is_gone_on_from(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """A trainer that is lost takes its optimizer with it, not what was published."""
    one = learner(make_target())
    beside = saving(one, tmp_path)
    tell(one, rounds[: end_of_second(rounds)])

    def lost() -> Any:
        raise TrainingError("the process that trains has ended by itself")

    one.trainer.state = lost  # type: ignore[union-attr, method-assign]
    beside.end(trains=True)
    assert beside.trouble is None
    state = read_state(saved(tmp_path))
    assert not state.trains
    assert state.version == one.version
    again = learner(make_target())
    go_on(again, saved(tmp_path), ORIGIN, 0)
    served = one.publisher.weights_of(one.version)  # type: ignore[union-attr]
    for name, weight in again.trainer.weights().items():  # type: ignore[union-attr]
        assert torch.equal(weight, served[name])


def test_it_is_due_after_so_many_updates_or_minutes(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """And not while nothing is new, nor between an update and what comes of it."""
    now = [0.0]
    one = learner(make_target())
    by_updates = saving(one, tmp_path / "a", every_updates=3)
    by_minutes = saving(one, tmp_path / "b", lambda: now[0], every_minutes=2.0)
    never = saving(one, tmp_path / "c")
    now[0] = 600.0
    assert not by_minutes.due()  # nothing is learnt
    taken = []
    for round_ in rounds[:80]:
        one.on_round(round_)
        if by_updates.due():
            by_updates.take()
            taken.append(one.counters.updates)
            until_written(by_updates)
        assert not never.due()
    assert taken == list(range(3, one.counters.updates + 1, 3))
    assert len(taken) > 2
    assert by_minutes.due()
    by_minutes.take()
    until_written(by_minutes)
    assert not by_minutes.due()
    one.on_round(rounds[80])
    now[0] += 119.0
    assert not by_minutes.due()
    before = one.counters.update_seconds_total
    by_updates.take()
    assert one.counters.update_seconds_total > before  # charged to learning


def test_rounds_do_not_wait_for_the_disk(rounds: list[VerifyRound], tmp_path: Path) -> None:
    """What is written is what was taken, whatever is learnt meanwhile."""
    one, go = learner(make_target()), threading.Event()

    def slow_disk() -> Callable[[Path], None]:
        return lambda path: (go.wait(30), write_draft(path))[1]

    states = SavedStates(tmp_path)
    beside = Saving(one, CheckpointSettings(every_updates=1), ORIGIN, ALONE, states, slow_disk)
    tell(one, rounds[:20])
    assert beside.due()
    beside.take()
    losses, version = list(one.counters.losses), one.version
    weights = {n: w.clone() for n, w in one.trainer.weights().items()}  # type: ignore[union-attr]
    tell(one, rounds[20:40])
    assert one.version > version
    assert not beside.due()  # one at a time
    go.set()
    until_written(beside)
    state = read_state(saved(tmp_path))
    assert (state.version, state.counters.losses) == (version, losses)
    again = learner(make_target())
    go_on(again, saved(tmp_path), ORIGIN, 0)
    for name, weight in again.trainer.weights().items():  # type: ignore[union-attr]
        assert torch.equal(weight, weights[name])


def test_a_full_disk_is_a_trouble_until_there_is_room(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """It stops no learning, is tried again when it is due again, and in any case at the end."""
    full = [True]

    def write(path: Path) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write_draft(path)

    one = learner(make_target())
    settings = CheckpointSettings(every_updates=2)
    states = SavedStates(tmp_path)
    trying = Saving(one, settings, ORIGIN, ALONE, states, lambda: write)
    tell(one, rounds[:20])
    assert trying.due()
    trying.take()
    until_written(trying)
    assert "is not saved" in (trying.trouble or "")
    assert "No space left on device" in (trying.trouble or "")
    assert not trying.due()
    tell(one, rounds[20:40])
    assert trying.due()
    full[0] = False
    trying.end(trains=True)
    assert trying.trouble is None
    assert read_state(saved(tmp_path)).version == one.version
    trying.end(trains=True)
    assert len(list(tmp_path.glob("0*"))) == 1  # nothing new


def test_no_copy_is_a_trouble_too(rounds: list[VerifyRound], tmp_path: Path) -> None:
    """The device's memory is for requests."""

    def no_room() -> Any:
        raise RuntimeError("CUDA out of memory")

    one = learner(make_target())
    trying = Saving(one, CheckpointSettings(), ORIGIN, ALONE, SavedStates(tmp_path), no_room)
    tell(one, rounds[:20])
    trying.take()
    assert "CUDA out of memory" in (trying.trouble or "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "u"},
            r"target\.path: .* other weights \(checksum t\) than are there now \(u\)",
        ),
        ({"draft": "e"}, r"drafter\.path: .* \(checksum d\) than are there now \(e\)"),
        ({"num_ranks": 2}, r"tp_size: 1 ranks learnt .*, now there are 2"),
        (
            {"settings": {"adapt.trainer.lr": 0.01}},
            r"adapt\.trainer\.lr: .* was learnt with 0\.001, and now it is 0\.01; set it as it was",
        ),
        ({"settings": {}}, r"adapt\.trainer\.lr: .* and now it is null"),
    ],
)
def test_other_learning_is_refused(
    rounds: list[VerifyRound], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Which key, what it was, what it is; nothing of it has been loaded by then."""
    one = learner(make_target())
    tell(one, rounds[:20])
    save_now(one, tmp_path)
    again = learner(make_target())
    with pytest.raises(ConfigError, match=message):
        go_on(again, saved(tmp_path), msgspec.structs.replace(ORIGIN, **changes), 0)
    assert again.counters.updates == again.version == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a saved state"),
        (b"[]", "is not a saved state"),
        (b'{"form": 1}', "is not a saved state: .*version"),
        (b'{"form": 99}', "has the form 99; this cosched reads 1"),
        (b"\x80\x04\x95", "is not a saved state"),
    ],
)
def test_a_file_of_something_else_is_one_message(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "state.json").write_bytes(data)
    with pytest.raises(RunFolderError, match=message):
        read_state(tmp_path)


def test_what_matters_to_learning_is_compared_and_nothing_else() -> None:
    """A server may be moved, publish otherwise, and save as it likes."""
    usual = learning_settings(config())
    for word in ("adapt.publish.keep=3", "adapt.checkpoint.keep=5", "adapt.trainer.restarts=1",
                 "run.name=other", "engine.num_threads=1"):  # fmt: skip
        assert learning_settings(config(word)) == usual, word
    for word in ("adapt.trainer.lr=0.5", "adapt.replay.window=7", "adapt.guard.kind=shadow",
                 "adapt.policy.rounds=99", "adapt.loss.position_decay=0.1", "adapt.scope.kind=tail",
                 "drafter.num_draft_tokens=2", "engine.dtype=bfloat16"):  # fmt: skip
        assert learning_settings(config(word)) != usual, word


# --- serve --resume -------------------------------------------------------------------------


def test_what_an_earlier_start_saved_last_is_gone_on_from(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """Each learning has a folder of its own; a start that has learnt nothing yet, or whose states are
    damaged, is passed over; of one that learnt otherwise the key is named."""
    ours = config(f"run.dir={tmp_path}")
    assert state_to_resume(ours) is None
    origin = msgspec.structs.replace(ORIGIN, settings=learning_settings(ours))
    one = learner(make_target())
    tell(one, rounds[:20])
    folders = [ours.run_folder.absolute() / start / "state" for start in ("a", "b", "c")]
    for folder in folders:
        states = SavedStates(folder)
        beside = Saving(one, CheckpointSettings(), origin, ALONE, states, lambda: write_draft)
        beside.take()
        until_written(beside)
    (ours.run_folder / "nothing-learnt").mkdir()
    for time_, folder in zip((20, 30, 10), folders, strict=True):
        for path in folder.iterdir():
            os.utime(path, (time_, time_))
    assert state_to_resume(ours) == folders[1] / "00000001"
    with pytest.raises(ConfigError, match=r"adapt\.trainer\.lr: .*learnt with .* now it is 0\.5"):
        state_to_resume(config(f"run.dir={tmp_path}", "adapt.trainer.lr=0.5"))
    for folder, left in zip((folders[1], folders[0]), (folders[0], folders[2]), strict=True):
        (folder / "00000001" / "state.json").write_text("{}")
        assert state_to_resume(ours) == left / "00000001"
    (folders[2] / "00000001" / "SHA256SUMS").unlink()
    with pytest.raises(RunFolderError, match=r"--resume: no state in .* is whole"):
        state_to_resume(ours)


@pytest.mark.parametrize(
    ("word", "new"),
    [
        ("save_every=3", "adapt.checkpoint.every_updates"),
        ("save_at_end=false", "adapt.checkpoint.at_end"),
        ("saves_kept=4", "adapt.checkpoint.keep"),
    ],
)
def test_what_was_called_otherwise_is_named(word: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"use {new} instead"):
        config(f"adapt.publish.{word}")


@pytest.mark.parametrize("word", ["keep=0", "every_updates=0", "every_minutes=0", "at_end=2"])
def test_what_is_saved_has_bounds(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapt\.checkpoint\.{word.partition('=')[0]}: "):
        config(f"adapt.checkpoint.{word}")
