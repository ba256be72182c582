"""Runs under the guard: poison, rollback, learning that pays, and going on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.build.embedded import build_arm
from cosched.guard.settings import ShadowSettings
from cosched.guard.statistics import Evidence
from cosched.loop.checksum import checksum
from cosched.records import SignalBatch
from tests.helpers.guarded_runs import FAR, SOON, Events, decode, world_of
from tests.helpers.interruption import CUT, WHOLE, whole_and_cut

LEARNT = 1  # version: before, even random labels of far text teach which words it has
POISONED = 100  # rounds
UNDONE_WITHIN = 64  # rounds from the publication of a draft that loses a token a round


def poisoned(sample: SignalBatch | None) -> SignalBatch | None:
    """Random labels: every row is trained on what the target said at some other place."""
    if sample is None:
        return None
    order = torch.randperm(
        sample.anchors_RN.shape[1], generator=torch.Generator().manual_seed(sample.num_rows)
    )
    return replace(sample, teacher_RNKX=sample.teacher_RNKX[:, order])


def moments(trainer: Any) -> float:
    return sum(
        float(tensor.abs().sum())
        for name, tensor in trainer.state().items()
        if name.startswith("optimizer") and "exp_avg" in name
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_poisoned_update_is_caught_before_it_serves(monkeypatch) -> None:
    """Random labels once a draft serves, until the guard has seen that they make it worse: no version of
    theirs is published, training starts again from what serves with an empty optimizer, and what
    follows serves."""
    world, events = world_of(*FAR, tokens=400), Events()
    arm = build_arm(world, "adapted", events)
    assert arm.coscheduler is not None
    coscheduler: Any = arm.coscheduler
    buffer, trainer = coscheduler.buffer, coscheduler.trainer
    honest, load, loaded = buffer.sample, trainer.load, []
    begun: list[tuple[int, int]] = []  # how many events there were, which version served

    def sample() -> SignalBatch | None:
        clean = honest()
        if clean is None or coscheduler.version < 2 or loaded:
            return clean
        begun.append((len(events.all), coscheduler.version))
        return poisoned(clean)

    def load_and_look(weights: Any) -> None:
        load(weights)
        served = dict(arm.drafter.network().named_parameters())
        same = all(torch.equal(w, served[n]) for n, w in trainer.weights().items())
        loaded.append((len(events.all), same, moments(trainer)))

    monkeypatch.setattr(buffer, "sample", sample)
    monkeypatch.setattr(trainer, "load", load_and_look)
    tokens = decode(world, arm)
    (first, version), (last, same, left) = begun[0], loaded[0]
    assert (same, left) == (True, 0.0)
    during = events.all[first:last]
    assert [kind for kind, _ in during if kind in {"publication", "rollback"}] == []
    verdicts = [fields["verdict"] for kind, fields in during if kind == "verdict"]
    scored = [one for one in verdicts if one.num_rows is not None]
    assert [one.action for one in scored] == ["wait"] * (len(scored) - 1) + ["roll_back"]
    assert scored[-1].to == version
    assert 2 <= len(scored) <= 16
    worse = [one.serving_score - one.candidate_score for one in scored]
    assert sum(worse[-4:]) > 4 * 0.15, worse
    assert [kind for kind, _ in events.all[last:] if kind == "publication"]
    assert not events.of("rollback")
    assert tokens == decode(world, build_arm(world, "plain", Events()))


@pytest.mark.slow
@pytest.mark.long
def test_poison_that_serves_is_undone(monkeypatch) -> None:
    """The gate lets everything pass, and every update from round 60 on is poisoned: within 64 rounds
    of the first the loaded draft serves again, to the bit; the optimizer is empty, the text is the
    target's, nothing is trained until the pause is over, and what then is trained may serve."""
    world = world_of(
        "adapt.policy.num_steps=4",
        "adapt.trainer.lr=1e-3",
        "adapt.guard={kind: shadow, check_rounds: 24}",
        tokens=384,
    )
    events = Events()
    arm = build_arm(world, "adapted", events)
    coscheduler: Any = arm.coscheduler
    trainer, publisher = coscheduler.trainer, coscheduler.publisher
    loaded = checksum(publisher.weights_of(0))
    honest, load = coscheduler.buffer.sample, trainer.load
    rejects, always = Evidence.rejects, ShadowSettings().false_publish
    poisoned_at: list[int] = []
    clean: list[bool] = []

    def sample() -> SignalBatch | None:
        if coscheduler.counters.rounds < 60 or events.of("rollback"):
            return honest()
        poisoned_at.append(coscheduler.counters.rounds)
        return poisoned(honest())

    def load_and_look(weights: Any) -> None:
        load(weights)
        clean.append(moments(trainer) == 0)

    monkeypatch.setattr(
        Evidence, "rejects", lambda self, rate: rate == always or rejects(self, rate)
    )
    monkeypatch.setattr(coscheduler.buffer, "sample", sample)
    monkeypatch.setattr(trainer, "load", load_and_look)
    tokens = decode(world, arm)
    rollback = events.of("rollback")[0]
    assert poisoned_at[0] < rollback["round"] <= poisoned_at[0] + UNDONE_WITHIN
    assert rollback["to"] == 0
    place = [kind for kind, _ in events.all].index("rollback")
    assert events.all[place + 1][0] == "publication"
    assert events.all[place + 1][1]["version"].draft_checksum == loaded
    assert clean[0]
    pause = range(rollback["round"] + 1, rollback["round"] + 24)
    assert not [e for e in events.of("decision") if e["round"] in pause]
    assert [e for e in events.of("decision") if e["round"] >= pause.stop]
    assert tokens == decode(world, build_arm(world, "plain", Events()))


@pytest.mark.slow
@pytest.mark.long
def test_the_default_guard_serves_no_poison(monkeypatch) -> None:
    """On far text, where drafts serve once learning has shown that it pays: of updates on random labels
    for 100 rounds none serves, training starts again from what serves, nothing that serves is undone
    in some 560 rounds, and what is trained after them may serve."""
    world, events = world_of(*FAR, "adapt.guard={kind: shadow}", tokens=840), Events()
    arm = build_arm(world, "adapted", events)
    coscheduler: Any = arm.coscheduler
    honest = coscheduler.buffer.sample
    begun: list[tuple[int, int]] = []  # round, version

    def sample() -> SignalBatch | None:
        clean, version = honest(), coscheduler.version
        if clean is None or version < LEARNT:
            return clean
        begun.append((coscheduler.counters.rounds, version))
        return poisoned(clean) if coscheduler.counters.rounds < begun[0][0] + POISONED else clean

    monkeypatch.setattr(coscheduler.buffer, "sample", sample)
    decode(world, arm)
    start, version = begun[0]
    during = [e for e in events.of("publication") if start <= e["round"] < start + POISONED]
    after = [e for e in events.of("publication") if e["round"] >= start + POISONED]
    assert version == LEARNT
    assert (len(during), len(events.of("rollback"))) == (0, 0)
    assert after
    verdicts = [e["verdict"] for e in events.of("verdict") if start < e["round"] < start + POISONED]
    judged = [v for v in verdicts if v.candidate_score is not None]
    assert version in {v.to for v in judged}


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_undone_where_learning_pays() -> None:
    """On foreign text: drafts serve, none is rolled back, and scores say what they bring: of some 110
    looks 25 publish."""
    own = ("adapt.guard={kind: shadow}", "adapt.policy.num_steps=2")
    world, events = world_of(*FAR, *own, tokens=600), Events()
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    assert arm.coscheduler is not None
    counters = arm.coscheduler.counters
    assert counters.updates > 25
    assert arm.coscheduler.version == len(events.of("publication")) >= 1
    assert not events.of("rollback")
    coscheduler: Any = arm.coscheduler
    assert coscheduler.guard.standing.lead_tokens > 0
    assert counters.earned_seconds > 0
    assert 0 < counters.guard_seconds < counters.update_seconds_total


def test_each_update_is_judged() -> None:
    """On what has come since the last one was, however little that is."""
    world, events = world_of(tokens=128), Events()
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    kinds = [kind for kind, _ in events.all if kind in {"update", "verdict"}]
    assert len(kinds) > 10
    assert kinds == ["update", "verdict"] * (len(kinds) // 2)
    rows = [verdict.num_rows for verdict in events.verdicts]
    assert all(rows)
    assert sum(rows) < 128  # none of them twice


@pytest.mark.slow
@pytest.mark.long
def test_updates_in_the_background_are_judged() -> None:
    """When they are finished, on the rows that have come since as well."""
    world, events = world_of("adapt.trainer.background=true"), Events()
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    scored = [v for v in events.verdicts if v.num_rows is not None]
    assert scored
    assert len(scored) >= len(events.verdicts) - 2  # the request may have ended meanwhile
    assert len(events.of("publication")) == sum(v.action == "publish" for v in scored)


@pytest.mark.slow
def test_state_per_request_forgets_what_was_watched() -> None:
    """The second request's verdicts are those of its own, as if it were the first."""
    verdicts = {}
    for order in ("both", "second"):
        world, events = (
            world_of("adapt.scope.state=per_request", tokens=96, prompts=2),
            Events(),
        )
        if order == "second":
            world.requests.pop(0)
        arm = build_arm(world, "adapted", events)
        decode(world, arm)
        resets = [i for i, (kind, _) in enumerate(events.all) if kind == "reset"]
        begin = resets[0] if order == "both" else 0
        verdicts[order] = [f["verdict"] for k, f in events.all[begin:] if k == "verdict"]
    assert len(verdicts["second"]) > 5
    assert [(v.action, v.candidate_score) for v in verdicts["both"]] == [
        (v.action, v.candidate_score) for v in verdicts["second"]
    ]


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_is_guarded_the_same(tmp_path: Path) -> None:
    """With a trained version, refusals and evidence behind it, a resumed run has the same figures and
    the same verdicts, to the bit."""

    def verdicts(name: str) -> list[Any]:
        lines = (tmp_path / name / "events.jsonl").read_text().splitlines()
        return [e["verdict"] for e in map(json.loads, lines) if e["kind"] == "verdict"]

    expected, found = whole_and_cut(tmp_path, SOON, "adapt.guard.false_publish=0.9")
    assert expected.refused_updates > 0
    assert any(v["loaded_score"] for v in verdicts(WHOLE))
    assert verdicts(CUT) == verdicts(WHOLE)
    for field in ("tau", "rounds", "versions", "losses", "refused_updates", "rollbacks"):
        assert getattr(found, field) == getattr(expected, field), field
