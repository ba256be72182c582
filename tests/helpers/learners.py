"""Learners of the random world, told of rounds that were recorded, and what saves them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from cosched.coscheduler import Coscheduler
from cosched.engines.embedded.target import Target
from cosched.engines.sglang.worker.saving import Saving
from cosched.loop.learner_state import Origin
from cosched.records import VerifyRound
from cosched.settings.sections import CheckpointSettings
from cosched.telemetry.saved_states import SavedStates
from cosched.testing.harness import make_coscheduler, make_requests, make_target, serve
from cosched.training.ranks import Ranks
from tests.helpers.drafts import make_drafter

ORIGIN = Origin(target="t", draft="d", num_ranks=1, settings={"adapt.trainer.lr": 0.001})
ALONE = Ranks(0, [0], torch.device("cpu"))


def write_draft(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


def some_rounds() -> list[VerifyRound]:
    """Of a few texts, one after the other."""
    target = make_target()
    return serve(target, make_drafter(target), make_requests(target, 4, 8, 40))


def learner(target: Target) -> Coscheduler:
    return make_coscheduler(target, make_drafter(target), every=4, lr=1e-2)


def saving(one: Coscheduler, folder: Path, clock: Any = time.monotonic, **settings: Any) -> Saving:
    return Saving(
        one, CheckpointSettings(**settings), ORIGIN, ALONE, SavedStates(folder),
        lambda: write_draft, clock,
    )  # fmt: skip


def tell(one: Coscheduler, rounds: list[VerifyRound]) -> None:
    for round_ in rounds:
        one.on_round(round_)


def saved(folder: Path) -> Path:
    path = SavedStates(folder).newest()
    assert path is not None
    return path


def save_now(one: Coscheduler, folder: Path) -> None:
    beside = saving(one, folder)
    beside.take()
    until_written(beside)


def until_written(one: Saving) -> None:
    end = time.monotonic() + 30
    while one._writing is not None:
        assert time.monotonic() < end
        one.due()
        time.sleep(0.002)
