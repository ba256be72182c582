"""One trainer with several objectives, and trials of them while it serves."""

from __future__ import annotations

import itertools
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from cosched.build.embedded import build_arm
from cosched.records import Decision
from cosched.registry import LOSSES
from cosched.testing.harness import collected, make_requests, make_target, make_trainer, serve
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.scope import parameters_of
from cosched.training.trying import TryingTrainer
from tests.helpers.drafts import make_drafter
from tests.helpers.guarded_runs import Events, decode, world_of
from tests.helpers.interruption import CUT, WHOLE, whole_and_cut
from tests.helpers.objectives import ABSURD, GOOD, experts

# --- one trainer, several objectives -------------------------------------------------------


@pytest.fixture(scope="module")
def scene() -> tuple[Any, Any, Any]:
    target = make_target()
    drafter = make_drafter(target)
    requests = make_requests(target, count=2, prompt=9, new=60)
    rounds = serve(target, drafter, requests, max_batch=2)
    return target, drafter, collected(target, drafter, "delayed", None, rounds)


def make_loss(kind: str) -> Any:
    cls = LOSSES.get(kind)
    return cls(msgspec.convert({"kind": kind}, cls.Settings))


def test_an_objective_is_its_loss_at_its_rate(scene) -> None:
    """Updates with the second loss, at half of twice the rate, are those of a trainer that has that
    loss alone, to the bit; and the first is as if there were no other, one with a reference between."""
    target, drafter, batch = scene
    copy = drafter.clone(torch.float32)
    terms = [{"kind": "forward_kl"}, {"kind": "proximal_kl", "weight": 0.5}]
    cls = LOSSES.get("sum")
    held = cls(msgspec.convert({"kind": "sum", "terms": terms}, cls.Settings))
    losses = [make_loss("forward_kl"), make_loss("reverse_kl"), held]
    several = DeepSpeedTrainer(
        BatchLoss(copy, losses[0], target.head, "hidden", losses[1:]),
        parameters_of(copy, "full"), 1, 1e-3, 1.0,
    )  # fmt: skip
    start = several.state()
    for number in (1, 2, 0):
        alone = make_trainer(target, drafter, loss=losses[number])
        expected = alone.update(batch, Decision(3))
        decision = Decision(3, learning_rate=2e-3, rate_share=0.5, objective=number)
        found = several.update(batch, decision)
        assert (found.losses, found.objective) == (expected.losses, number)
        assert same(several.state(), alone.state())
        several.restore(start)


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_state_before_the_first_step_is_restored(scene, zero_stage: int) -> None:
    """It holds no moments; those of the steps since then must not stay."""
    target, drafter, batch = scene
    trainer = make_trainer(target, drafter, zero_stage)
    before = trainer.state()
    first = trainer.update(batch, Decision(3)).losses
    end = trainer.state()
    trainer.restore(before)
    assert trainer.update(batch, Decision(3)).losses == first
    assert same(trainer.state(), end)


def test_two_states_are_held_whatever_the_number_of_experts(scene) -> None:
    """Also where each expert is better than the one before: the best so far goes first."""
    target, drafter, batch = scene
    copy = drafter.clone(torch.float32)
    losses = [make_loss("forward_kl") for _ in range(4)]
    trainer = DeepSpeedTrainer(
        BatchLoss(copy, losses[0], target.head, "hidden", losses[1:]),
        parameters_of(copy, "full"), 1, 1e-3, 1.0,
    )  # fmt: skip
    made: list[weakref.ref] = []
    held: list[int] = []
    make_state, better = trainer.state, itertools.count(1)

    class State(dict[str, torch.Tensor]):
        """What a weak reference can be made to."""

    def counted() -> State:
        state = State(make_state())
        made.append(weakref.ref(state))
        held.append(sum(one() is not None for one in made))
        return state

    trainer.state = counted
    scorer = SimpleNamespace(scores=lambda rows, weights: [[float(next(better))]])
    buffer = SimpleNamespace(held_out=lambda anchors: batch)
    publisher = SimpleNamespace(version=0, weights_of=lambda version: {})
    trying = TryingTrainer(trainer, [1e-3] * 4, scorer, buffer, publisher, anchors=4)
    assert trying.update(batch, Decision(1, trial=True)).objective == 3
    assert held == [1, 2, 2, 2, 2]


# --- trials while it serves ----------------------------------------------------------------


def run(*overrides: str, tokens: int = 192, prompts: int = 1) -> tuple[Any, Events, Any]:
    lenient = "adapt.guard={kind: shadow, anchors: 16, false_publish: 0.999}"
    world = world_of(lenient, *overrides, domain="translated", tokens=tokens, prompts=prompts)
    events = Events()
    arm = build_arm(world, "adapted", events)
    return decode(world, arm), events, arm


def published(events: Events) -> list[str]:
    return [event["version"].draft_checksum for event in events.of("publication")]


@pytest.fixture(scope="module")
def alone() -> tuple[Any, Events, Any]:
    return run()


@pytest.mark.slow
@pytest.mark.parametrize("good", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_absurd_expert_leaves_no_trace(alone, good: int) -> None:
    """One at a rate that ruins a draft in a step: wherever it stands, it is tried, never taken, and
    every version that serves is the good one's alone, to the bit; so is the trainer at the end."""
    text, events, arm = run(
        experts(*([GOOD, ABSURD] if good == 0 else [ABSURD, GOOD]), every_updates=3)
    )
    results = [event["result"] for event in events.of("update")]
    trials = [result.trial for result in results if result.trial]
    assert len(results) > 8
    assert [bool(result.trial) for result in results] == [i % 3 == 0 for i in range(len(results))]
    assert all(trial[good] > trial[1 - good] + 0.3 for trial in trials)
    assert {result.objective for result in results} == {good}
    assert {event["decision"].objective for event in events.of("decision")[1:]} == {good}
    assert arm.coscheduler.counters.num_trials == len(trials)
    assert text == alone[0]
    assert published(events) == published(alone[1])
    assert len(published(events)) > 5
    state, expected = (one.coscheduler.state()[2] for one in (arm, alone[2]))
    assert same(state, expected)


@pytest.mark.slow
def test_the_cost_of_trials_is_counted() -> None:
    """All of a trial's updates and scores are time that the engine waited for, so that a share of
    the time bounds them as well."""
    _, events, arm = run(experts(GOOD, "{lr: 1.0e-3}", "{lr: 1.0e-4}", every_updates=1), tokens=64)
    counters = arm.coscheduler.counters
    spent = sum(event["result"].seconds for event in events.of("update"))
    assert counters.updates >= 4
    assert spent < counters.update_seconds_total - counters.guard_seconds


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_any_scope_can_be_tried(kind: str) -> None:
    """Adapters that are merged to be published, too: the good one's versions, to the bit."""
    scope = f"adapt.scope.kind={kind}"
    expected = run(scope, "adapt.trainer.lr=1e-3", tokens=64)[1]
    found = run(scope, experts("{lr: 30}", "{lr: 1.0e-3}", every_updates=2), tokens=64)[1]
    assert published(found) == published(expected) != []


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_chooses_the_same(tmp_path: Path) -> None:
    """What earlier trials brought is kept: a resumed run takes the same experts, to the bit."""

    def made(name: str) -> list[Any]:
        lines = (tmp_path / name / "events.jsonl").read_text().splitlines()
        results = [e["result"] for e in map(json.loads, lines) if e["kind"] == "update"]
        return [(r["objective"], r["trial"], r["losses"]) for r in results]

    whole_and_cut(
        tmp_path,
        "adapt.guard.kind=shadow",
        experts("{lr: 3.0e-4}", "{loss: {kind: reverse_kl}}", "{lr: 1.0e-3}", eta=8),
    )
    assert made(CUT) == made(WHOLE)
    assert len({objective for objective, *_ in made(WHOLE)}) > 1
