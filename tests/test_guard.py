"""The shadow guard at work: held-out rows, scores, poison, rollback, and going on where it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosched.build.embedded import Arm, World, build_arm, build_world
from cosched.errors import ConfigError, PublicationError
from cosched.guard.guard import LOOKED_AT, FiniteGuard, ShadowGuard
from cosched.guard.monitor import Monitor
from cosched.guard.scorer import AcceptanceScorer
from cosched.guard.statistics import BLOCK, Evidence
from cosched.loop.publish import InPlacePublisher, checksum
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.protocols import ShadowSettings
from cosched.records import Acceptance, SignalBatch, UpdateResult, Verdict
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import RunFolder
from cosched.testing.harness import (
    collected,
    make_requests,
    make_target,
    serve,
)
from tests.conftest import make_drafter
from tests.test_core import ROW, _round, snapshot

SAMPLED = Path("configs/sampled.yaml")
LEARNT = 1  # version: before, even random labels of far text teach which words it has
POISONED = 100  # rounds
UNDONE_WITHIN = 64  # rounds from the publication of a draft that loses a token a round


# --- rows that no update has had -----------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(ROW, max_size=40),
    st.integers(12, 30),
    st.integers(1, 5),
    st.sampled_from(["delayed", "accepted", "all"]),
)
def test_what_is_held_out_was_in_no_sample(steps, window, held_out, rows) -> None:
    """No row of a held-out path has been taught before, whatever arrives; rows name their place."""
    buffer = ReplayBuffer(
        ReplayLimits(window, 8, 2, 1000, 1 << 20, 12, 12), rows, None, held_out=held_out
    )
    ends: dict[int, int] = {}
    taught: set[float] = set()
    for request, count, teacher, finished, gap in steps:
        start = ends.get(request, 1000 * request) + (7 if gap else 0)
        ends[request] = start + count
        buffer.collect(_round(request, start, count, teacher, finished))
        if finished:
            ends[request] += 100  # its name is used again, and its places are not
        sample = buffer.sample()
        taught |= places(sample)
        out = places(buffer.held_out(held_out))
        assert not out & taught
        if sample is not None and rows == "delayed":
            assert out  # what is trained can be judged


def places(batch: SignalBatch | None) -> set[float]:
    if batch is None:
        return set()
    return set(batch.teacher_RNKX[..., 0][batch.weights_RNK > 0].tolist())


def test_held_out_rows_are_the_newest_and_are_taught_later() -> None:
    """Nothing is lost: the rows that judge an update are in the sample of the next one."""
    buffer = ReplayBuffer(
        ReplayLimits(64, 100, 2, 1000, 1 << 20, 12, 12), "delayed", None, held_out=4
    )
    buffer.collect(_round(0, 0, 20, True, False))
    first = places(buffer.sample())
    assert places(buffer.held_out(4)) == {15.0, 16.0, 17.0, 18.0, 19.0}
    assert first == set(map(float, range(1, 15)))
    buffer.collect(_round(0, 20, 20, True, False))
    assert places(buffer.held_out(100)) == set(map(float, range(15, 40)))
    assert places(buffer.sample()) == set(map(float, range(1, 35)))


def test_evidence_is_given_once() -> None:
    """Rows that have judged a draft do not judge again; to look into a fall they still do."""
    buffer = ReplayBuffer(
        ReplayLimits(64, 100, 2, 1000, 1 << 20, 12, 12), "delayed", None, held_out=8
    )
    buffer.collect(_round(0, 0, 20, True, False))
    buffer.sample()
    assert buffer.held_out(8, once=True, at_least=9) is None  # and nothing has been given by it
    assert anchors(buffer.held_out(8, once=True, at_least=8)) == list(range(11, 19))
    assert buffer.held_out(8, once=True) is None
    assert anchors(buffer.held_out(8)) == list(range(11, 19))
    buffer.collect(_round(0, 20, 3, True, False))
    assert anchors(buffer.held_out(8, once=True)) == [19, 20, 21]


def anchors(batch: SignalBatch | None) -> list[int]:
    assert batch is not None
    return (batch.starts_R[0] + batch.anchors_RN[0]).tolist()


# --- scores --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene() -> tuple[Any, Any, SignalBatch]:
    target = make_target()
    drafter = make_drafter(target)
    requests = make_requests(target, count=3, prompt=9, new=60)
    batch = collected(
        target, drafter, "delayed", None, serve(target, drafter, requests, max_batch=3)
    )
    assert batch is not None
    return target, drafter, batch


def scorer_of(target, drafter, dtype=torch.float32, ranks=None) -> AcceptanceScorer:
    copy = drafter.clone(torch.float32)
    return AcceptanceScorer(copy, target.head, "hidden", dtype, ranks=ranks)


@pytest.mark.parametrize(
    ("acceptance", "temperature"),
    [("greedy", 1.0), ("target_only", 0.7), ("sampled", 0.7), ("sampled", 1.0)],
)
@pytest.mark.parametrize("reduced", [False, True])
def test_scores_are_the_chained_acceptance(
    scene, acceptance: Acceptance, temperature: float, reduced: bool
) -> None:
    """As the engine accepts: of other weights than the network has, anchor by anchor, against loops in
    float64; p is not renormalised over a reduced vocabulary, and afterwards the network is what it was."""
    target, drafter, batch = scene
    other = drafter.clone(torch.float32)
    ids = torch.arange(0, target.vocab_size, 2) if reduced else None
    generator = torch.Generator().manual_seed(0)
    for parameter in other.network().parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    weights = dict(other.network().named_parameters())
    copy = drafter.clone(torch.float32)
    q_logits = other.replay(batch).double()
    if ids is not None:
        copy.target_ids = lambda: ids
        whole, project = q_logits, copy.project
        q_logits, copy.project = whole[..., ids], lambda states: project(states)[..., ids]
    before = checksum(dict(copy.network().named_parameters()))
    scorer = AcceptanceScorer(copy, target.head, "hidden", torch.float32, acceptance, temperature)
    found = scorer.scores(batch, [weights])[0]
    assert checksum(dict(copy.network().named_parameters())) == before

    p_logits = target.head(batch.teacher_RNKX).double()
    expected = []
    for r, n in (batch.weights_RNK[..., 0] > 0).nonzero().tolist():
        length, reached = 1.0, 1.0
        for k in range(drafter.num_draft_tokens):
            p, q = p_logits[r, n, k], q_logits[r, n, k]
            best = int(q.argmax()) if ids is None else int(ids[q.argmax()])
            if acceptance == "greedy":
                reached *= best == int(p.argmax())
            elif acceptance == "target_only":
                reached *= float((p / temperature).softmax(-1)[best])
            else:
                p, q = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
                pairs = zip(p if ids is None else p[ids], q, strict=True)
                reached *= sum(min(float(a), float(b)) for a, b in pairs)
            length += reached
        expected.append(length)
    assert found == pytest.approx(expected, rel=1e-4)  # the network and the head are float32


def test_what_would_be_served_is_scored(scene) -> None:
    """Rounded to the type in which the draft serves: bfloat16 masks what is smaller."""
    target, drafter, batch = scene
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    rounded = {name: p.bfloat16().float() for name, p in weights.items()}
    plain = scorer_of(target, drafter).scores(batch, [weights, rounded])
    as_served = scorer_of(target, drafter, torch.bfloat16).scores(batch, [weights, rounded])
    assert as_served[0] == as_served[1] == plain[1] != plain[0]


def test_ranks_share_the_work_and_have_the_same_scores(scene) -> None:
    """Each scores every second anchor; all get all of them, in the order that one would."""
    target, drafter, batch = scene
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    parts: dict[int, Any] = {}

    class Rank:
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def gather(self, mine: Any) -> list[Any]:
            parts[self.rank] = mine
            return [parts.get(0, mine), parts.get(1, mine)]

    scorers = [scorer_of(target, drafter, ranks=Rank(rank)) for rank in (0, 1)]
    for scorer in scorers:
        scorer.scores(batch, [weights, weights])
    first, second = (scorer.scores(batch, [weights, weights]) for scorer in scorers)
    assert first == second
    alone = scorer_of(target, drafter).scores(batch, [weights])[0]
    assert first[1] == pytest.approx(alone, rel=1e-5)
    assert 0 < len(parts[0][0]) < len(alone)


# --- versions ------------------------------------------------------------------------------


def test_the_version_that_serves_survives_a_file() -> None:
    """The newest ``keep`` are kept; what serves goes into the state, under its number."""
    target = make_target(seed=3)
    network = make_drafter(target).network()
    publisher = InPlacePublisher.of_modules(network, target.model, keep=2)
    for _ in range(6):
        publisher.publish({"norm.weight": network.norm.weight + 1})
    assert sorted(publisher._kept) == [5, 6]
    state = publisher.state()
    again = InPlacePublisher.of_modules(make_drafter(target).network(), target.model)
    again.restore(state, 6)
    assert again.version == 6
    expected = publisher.weights_of(6)["norm.weight"]
    assert torch.equal(again.weights_of(6)["norm.weight"], expected)
    with pytest.raises(PublicationError, match="no weights of version 5"):
        again.restore(state, 5)
    again.publish({"norm.weight": network.norm.weight + 1})
    assert sorted(again._kept) == [7]


# --- what is looked at ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alarm", "num_new", "trained"),
    [
        (False, 3, False),  # a look takes what there is, and only once
        (True, 64, False),  # after a fall at once
        (True, 0, False),  # if there is anything new
        (False, 0, False),
        (False, 20, True),  # an update is judged
        (False, 0, True),  # on what comes
    ],
)
def test_what_is_looked_at(alarm: bool, num_new: int, trained: bool) -> None:
    """Rows count as evidence once: only such are asked for as were never given. What serves, the
    candidate if one waits, and the draft as loaded are scored on the same ones."""
    seen: list[tuple[int, bool]] = []
    asked: list[list[Any]] = []

    def held_out(most: int, once: bool = False, at_least: int = 1) -> Any:
        seen.append((most, once))
        return SimpleNamespace(number=num_new) if num_new >= at_least else None

    def scores(batch: Any, weights: list[Any]) -> list[list[float]]:
        asked.append(weights)
        return [[2.0 - 0.1 * i] * batch.number for i in range(len(weights))]

    guard = ShadowGuard(
        ShadowSettings(),
        SimpleNamespace(scores=scores, busy=False),
        SimpleNamespace(held_out=held_out),
        SimpleNamespace(version=5, weights_of=lambda version: version),
    )
    monitor = guard._monitor
    monitor.looked_at, monitor.fall.tokens = (1000, 20.0) if alarm else (1000 * trained, 0.0)
    at = snapshot(round_index=1000, draft_version=5, serves_loaded=False)
    result = UpdateResult(1, 0, (1.0,), 1, 0.1) if trained else None
    verdict = guard.judge(result, at, candidate=lambda: "new")
    assert seen == [(128, True)]
    assert asked == ([[5, "new", 0] if trained else [5, 0]] if num_new else [])
    blocks = max(1, num_new // BLOCK) if num_new else 0
    assert monitor.worse.num_blocks == monitor.better.num_blocks == blocks
    assert verdict.action == ("wait" if trained else "keep")
    assert monitor.fall.alarmed == (alarm and not num_new)  # it waits for rows
    again = guard.judge(None, at, candidate=lambda: "new")
    assert again == Verdict("keep")
    assert len(seen) == (1 if num_new or trained else 2)


def test_an_update_without_a_finite_step_is_no_candidate() -> None:
    """Nothing is scored for it, and what was known of the candidate stands."""
    guard = ShadowGuard(ShadowSettings(), SimpleNamespace(busy=False), None, None)
    for one in (guard, FiniteGuard()):
        result = UpdateResult(2, 2, (math.nan, math.nan), 1, 0.1)
        verdict = one.judge(result, snapshot(), candidate=lambda: pytest.fail("not asked for"))
        assert (verdict.action, verdict.num_rows) == ("wait", None)
    assert guard._monitor == Monitor()


# --- in a run ------------------------------------------------------------------------------


class Events:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.all.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.all if name == kind]

    @property
    def verdicts(self) -> list[Any]:
        return [event["verdict"] for event in self.of("verdict")]


SOON = "adapt.guard={kind: shadow, anchors: 16, false_publish: 0.5}"  # tests are short
FAR = (
    "workload.prompts=null",
    "workload.documents=tinyworld/documents/translated.jsonl",
    "adapt.loss.kind=jensen_shannon",
    "adapt.trainer.lr=1e-3",
    "adapt.policy.num_steps=4",
)
"""Text of which there is much to learn."""


def world_of(*overrides: str, domain: str = "code", tokens: int = 256, prompts: int = 1) -> World:
    guarded = any(
        override.startswith(("adapt.guard=", "adapt.guard.kind")) for override in overrides
    )
    return build_world(
        load_config(
            SAMPLED,
            [
                f"workload.prompts=tinyworld/prompts/{domain}.jsonl",
                f"workload.max_new_tokens={tokens}",
                f"workload.max_prompts={prompts}",
                "workload.temperature=0",
                "adapt.replay.window=128",
                "adapt.policy.rounds=4",
                *(() if guarded else (SOON,)),
                *overrides,
            ],
        )
    )


def decode(world: World, arm: Arm) -> list[list[int]]:
    return [list(done.tokens) for done in arm.engine.generate(world.requests)]


def poisoned(sample: SignalBatch | None) -> SignalBatch | None:
    """Random labels: every row is taught what the target said at some other place."""
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
def test_a_poisoned_update_is_caught_before_it_serves(monkeypatch) -> None:
    """Random labels once a draft serves, until the guard has seen that they make it worse: no version of
    theirs is published, training starts again from what serves with an empty optimizer, and what
    follows serves."""
    world, events = world_of(*FAR, tokens=600), Events()
    arm = build_arm(world, "adapted", events)
    assert arm.coscheduler is not None
    coscheduler: Any = arm.coscheduler
    buffer, trainer = coscheduler._buffer, coscheduler._trainer
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
    assert sum(worse[-4:]) > 4 * 0.3, worse
    assert [kind for kind, _ in events.all[last:] if kind == "publication"]
    assert not events.of("rollback")
    assert tokens == decode(world, build_arm(world, "plain", Events()))


@pytest.mark.slow
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
    trainer, publisher = coscheduler._trainer, coscheduler._publisher
    loaded = checksum(publisher.weights_of(0))
    honest, load = coscheduler._buffer.sample, trainer.load
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
    monkeypatch.setattr(coscheduler._buffer, "sample", sample)
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
def test_the_default_guard_serves_no_poison(monkeypatch) -> None:
    """On far text, where drafts serve once learning has shown that it pays: of updates on random labels
    for 100 rounds none serves, training starts again from what serves, nothing that serves is undone,
    and what is trained after them may serve."""
    world, events = world_of(*FAR, "adapt.guard={kind: shadow}", tokens=1200), Events()
    arm = build_arm(world, "adapted", events)
    coscheduler: Any = arm.coscheduler
    honest = coscheduler._buffer.sample
    begun: list[tuple[int, int]] = []  # round, version

    def sample() -> SignalBatch | None:
        clean, version = honest(), coscheduler.version
        if clean is None or version < LEARNT:
            return clean
        begun.append((coscheduler.counters.rounds, version))
        return poisoned(clean) if coscheduler.counters.rounds < begun[0][0] + POISONED else clean

    monkeypatch.setattr(coscheduler._buffer, "sample", sample)
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
def test_nothing_is_undone_where_learning_pays() -> None:
    """On foreign text: drafts serve, none is rolled back, and scores say what they bring."""
    world, events = world_of(*FAR, "adapt.guard={kind: shadow}", tokens=600), Events()
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    assert arm.coscheduler is not None
    counters = arm.coscheduler.counters
    assert counters.updates > 25
    assert arm.coscheduler.version == len(events.of("publication")) >= 1
    assert not events.of("rollback")
    coscheduler: Any = arm.coscheduler
    assert coscheduler._guard.standing.lead_tokens > 0
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
def test_an_interrupted_run_is_guarded_the_same(tmp_path: Path) -> None:
    """With a trained version, refusals and evidence behind it, a resumed run has the same figures and
    the same verdicts, to the bit."""

    def config(name: str) -> Any:
        return load_config(
            SAMPLED,
            [
                f"run.dir={tmp_path}",
                f"run.name={name}",
                "arms=[adapted]",
                "workload.max_new_tokens=160",
                "workload.max_prompts=2",
                "adapt.policy.rounds=4",
                SOON,
                "adapt.guard.false_publish=0.9",
            ],
        )

    def verdicts(name: str) -> list[Any]:
        lines = (tmp_path / name / "events.jsonl").read_text().splitlines()
        return [e["verdict"] for e in map(json.loads, lines) if e["kind"] == "verdict"]

    committed = 0

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 200:
            raise KeyboardInterrupt

    for name in ("whole", "cut"):
        RunFolder(tmp_path / name).create()
    expected = Experiment(config("whole")).run(RunFolder(tmp_path / "whole")).arms["adapted"]
    assert Experiment(config("cut")).run(RunFolder(tmp_path / "cut"), interrupt).run["interrupted"]
    again = Experiment(config("cut"))
    found = again.run(RunFolder(tmp_path / "cut"), resume=True).arms["adapted"]
    assert expected.refused_updates > 0
    assert any(v["loaded_score"] for v in verdicts("whole"))
    assert verdicts("cut") == verdicts("whole")
    for field in ("tau", "rounds", "versions", "losses", "refused_updates", "rollbacks"):
        assert getattr(found, field) == getattr(expected, field), field


def test_a_guard_keeps_no_weights_of_its_own() -> None:
    """It compares with what serves and with what was loaded, which are kept in any case."""
    configs = [load_config(SAMPLED, [f"adapt.guard.kind={kind}"]) for kind in ("finite", "shadow")]
    finite, shadow = (footprint(config, *sketch(config)) for config in configs)
    assert shadow.last_good == finite.last_good > 0


def test_scores_are_in_the_footprint() -> None:
    """Of as many rows as a look at what serves takes: the teacher's softmax, and the draft's logits,
    as they are and by the temperature, with theirs. They and the loss are never there together."""

    def sized(*more: str) -> Any:
        config = load_config(SAMPLED, ["adapt.guard={kind: shadow, anchors: 8}", *more])
        return footprint(config, *sketch(config))

    found = sized()
    target, drafter = sketch(load_config(SAMPLED))
    row = drafter.num_draft_tokens * target.vocab_size * 4
    assert found.scores == pytest.approx(4 * LOOKED_AT * 8 * row, rel=0.01)
    for loss, larger in ((0, found.scores), (found.scores + 1, found.scores + 1)):
        assert replace(found, loss=loss).added == replace(found, loss=0, scores=0).added + larger

    assert sized("adapt.memory.chunk_rows=24").scores == pytest.approx(found.scores / 4, rel=0.01)
    of_window = 4 * (1024 - drafter.num_draft_tokens) * row  # of what is kept of one request
    assert sized("adapt.guard.anchors=1000").scores == pytest.approx(of_window, rel=0.01)
    assert sized("arms=[frozen]").scores == 0
    finite = load_config(SAMPLED, ["adapt.guard.kind=finite"])
    assert footprint(finite, *sketch(finite)).scores == 0


def test_the_guard_scores_in_the_chunks_of_the_loss() -> None:
    """Else it would hold logits of all rows beside a loss that does not."""
    arm = build_arm(world_of("adapt.memory.chunk_rows=5"), "adapted", Events())
    coscheduler: Any = arm.coscheduler
    assert coscheduler._guard._scorer._chunk_rows == 5


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapt.guard.kind=sentinel", r"adapt\.guard\.kind: .*'sentinel'; .*finite, shadow"),
        ("adapt.guard.anchors=0", r"adapt\.guard.*anchors|adapt\.guard\.anchors"),
        (
            "adapt.guard={kind: finite, anchors: 3}",
            r"adapt\.guard: .*anchors.*kind finite: nothing else",
        ),
        ("adapt.guard.false_publish=-1", r"adapt\.guard\.false_publish.*-1"),
        ("adapt.guard.false_rollback=1", r"adapt\.guard\.false_rollback.*1"),
        ("adapt.guard.anchor=3", r"adapt\.guard: .*`anchor`; allowed with kind shadow: anchors, "),
        ("adapt.guard.tolerance=0.1", r"`tolerance`; use false_publish instead; allowed"),
        ("adapt.guard.confidence=2", r"`confidence`; use false_publish instead; allowed"),
        ("adapt.guard.doubt=2", r"`doubt`; use false_rollback instead; allowed"),
        ("adapt.guard.patience=3", r"`patience`; use false_rollback instead; allowed"),
        ("adapt.guard.every=2", r"`every`; use anchors .*each update is judged.* instead; allowed"),
        ("adapt.guard.alarm_tokens=2", r"`alarm_tokens`; use check_rounds instead; allowed"),
        ("adapt.guard.check_every=2", r"`check_every`; use check_rounds instead; allowed"),
        ("adapt.guard.cooldown_rounds=2", r"`cooldown_rounds`; use check_rounds instead; allowed"),
        ("adapt.guard.trials=2", r"`trials`; use adapt\.policy .* instead; allowed"),
        ("adapt.guard.prospect_rows=2", r"`prospect_rows`; use adapt\.policy .* instead; allowed"),
        ("adapt.guard.prove_first=false", r"`prove_first`; use kind: finite .* instead; allowed"),
        ("adapt.guard.anchors=2000", r"adapt\.guard\.anchors: 2000.*window = 1024.*at most 1018"),
        (
            "adapt={policy: {kind: earned}, guard: {kind: finite}}",
            r"adapt\.guard\.kind: adapt\.policy\.kind = earned .*got finite; use shadow",
        ),
    ],
)
def test_bad_guards_are_named(override: str, says: str) -> None:
    """The message names the key and what came."""
    with pytest.raises(ConfigError, match=says):
        load_config(SAMPLED, ["adapt.guard.kind=shadow", override])


def test_another_kind_of_guard_leaves_the_old_ones_fields_behind(tmp_path: Path) -> None:
    path = tmp_path / "shadow.yaml"
    text = SAMPLED.read_text().replace("{kind: finite}", "{kind: shadow, anchors: 8}")
    path.write_text(text)
    assert load_config(path).adapt.guard.anchors == 8
    assert (
        load_config(path, ["adapt.guard.kind=finite"]).adapt.guard
        == type(load_config(SAMPLED).adapt.guard)()
    )
