"""What a scheduler's process saves between two rounds, alone and with other ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cosched.coscheduler import Coscheduler
from cosched.engines.sglang.worker.adaptation import Adaptation
from cosched.engines.sglang.worker.collector import RoundCollector
from cosched.engines.sglang.worker.operator import NullOperator
from cosched.engines.sglang.worker.saving import Saving
from cosched.loop.learner_state import read_state, read_tensors
from cosched.records import VerifyRound
from cosched.settings.sections import CheckpointSettings
from cosched.telemetry.saved_states import SavedStates
from cosched.telemetry.tally import Tally
from cosched.testing.harness import make_target
from cosched.training.ranks import Ranks
from tests.helpers.learners import (
    ALONE,
    ORIGIN,
    learner,
    saved,
    saving,
    some_rounds,
    tell,
    until_written,
    write_draft,
)


@pytest.fixture(scope="module")
def rounds() -> list[VerifyRound]:
    return some_rounds()


class Events:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.said.append((kind, fields))


def adaptation(one: Coscheduler, saves: Saving, events: Events, **more: Any) -> Adaptation:
    return Adaptation(
        algorithm="COSCHED_EAGLE3", coscheduler=one, collector=RoundCollector(), ranks=ALONE,
        watches=True, window=64, save=lambda _path: None, operator=NullOperator(), sink=events,
        tally=Tally(lambda: 0.0), saving=saves, **more,
    )  # fmt: skip


def test_between_two_rounds_it_is_taken_and_what_is_wrong_is_said_once(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """A disk that is full, and a trainer that is lost, are warnings until they are over: in the status,
    which metrics show, in the log and in the history."""
    one, events, lost = learner(make_target()), Events(), ["the trainer is lost"]
    blocked = tmp_path / "state"
    blocked.write_text("no folder can be made here")
    saves = saving(one, blocked, every_updates=4)
    served = adaptation(one, saves, events, trouble=lambda: lost[0] if lost else None)
    for round_ in rounds[:40]:
        served._ready.append(round_)
        served.step()
    end = time.monotonic() + 30
    while "not saved" not in (served.status().warning or ""):
        assert time.monotonic() < end
        served.step()
    status = served.status()
    assert status.warning is not None
    assert status.warning.startswith("the trainer is lost; what was learnt is not saved: ")
    assert status.failure is None
    said = [fields["reason"] for kind, fields in events.said if kind == "warning"]
    assert said == ["the trainer is lost", status.warning]
    lost.clear()
    blocked.unlink()
    for round_ in rounds[40:80]:
        served._ready.append(round_)
        served.step()
    while served.status().warning is not None:
        assert time.monotonic() < end
        served.step()
    served.ending()
    assert read_state(saved(blocked)).version == one.version


def test_an_end_that_cannot_be_saved_is_an_end_all_the_same(
    rounds: list[VerifyRound], tmp_path: Path
) -> None:
    """An exception in the hook would keep SGLang from ending."""
    one = learner(make_target())
    tell(one, rounds[:20])

    def broken() -> Any:
        raise AssertionError("a mistake")

    saves = Saving(one, CheckpointSettings(), ORIGIN, ALONE, SavedStates(tmp_path), broken)
    served = adaptation(one, saves, Events())
    one.counters.updates += 1
    served.ending()
    assert list(tmp_path.glob("0*")) == []


class Rank(Ranks):
    """One of two, who knows what the other has to say."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        super().__init__(rank, [0], torch.device("cpu"))
        self.others = others

    def gather(self, mine: Any) -> list[Any]:
        self.others.append(mine)
        return list(reversed(self.others))


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_save_together(rounds: list[VerifyRound], tmp_path: Path, fails: bool) -> None:
    """ZeRO divides the optimizer: rank 0 writes what each of them holds. Where one has no memory for a
    copy nothing is written, and none waits for it."""
    said: list[Any] = []
    ranks = [learner(make_target()) for _ in range(2)]
    tell(ranks[0], rounds[:20])
    tell(ranks[1], rounds[20:40])
    origin = msgspec.structs.replace(ORIGIN, num_ranks=2)
    if fails:
        ranks[1].state = broken_state  # type: ignore[method-assign]
    settings = CheckpointSettings()
    Saving(ranks[1], settings, origin, Rank(1, said), None, lambda: write_draft).take()
    first = Saving(
        ranks[0], settings, origin, Rank(0, said), SavedStates(tmp_path), lambda: write_draft
    )
    first.take()
    if fails:
        assert "no memory for rank 1" in (first.trouble or "")
        assert SavedStates(tmp_path).newest() is None
        return
    until_written(first)
    for rank, one in enumerate(ranks):
        held = read_tensors(saved(tmp_path), rank)
        for name, tensor in one.trainer.state().items():  # type: ignore[union-attr]
            if name.startswith("optimizer."):
                assert torch.equal(held[name], tensor), (rank, name)


def broken_state(_trains: bool) -> Any:
    raise MemoryError("no memory for rank 1")
