"""The shadow guard at work: held-out rows, scores, poison, rollback, and going on where it was."""

from __future__ import annotations

import json
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
from cosched.guard.guard import LOOKED_INTO, ShadowGuard
from cosched.guard.monitor import ShadowSettings, Watch
from cosched.guard.scorer import Shadow
from cosched.loop.counters import Totals
from cosched.loop.publish import InPlacePublisher, checksum
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import SignalBatch
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
from tests.test_core import ROW, _round

SAMPLED = Path("configs/sampled.yaml")
LEARNT = 16  # versions: before, even random labels of far text teach which words it has
POISONED = 40  # rounds
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


def shadow_of(target, drafter, dtype=torch.float32, temperature=1.0, ranks=None) -> Shadow:
    copy = drafter.clone(torch.float32)
    return Shadow(copy, target.head, "hidden", dtype, temperature, ranks)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("reduced", [False, True])
def test_scores_are_the_chained_overlap(scene, temperature: float, reduced: bool) -> None:
    """Of other weights than the network has, anchor by anchor, against loops in float64; p is not
    renormalised over a reduced vocabulary, and afterwards the network is what it was."""
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
    shadow = Shadow(copy, target.head, "hidden", torch.float32, temperature)
    found = shadow.scores(batch, [weights])[0]
    assert checksum(dict(copy.network().named_parameters())) == before

    p_logits = target.head(batch.teacher_RNKX).double()
    expected = []
    for r, n in (batch.weights_RNK[..., 0] > 0).nonzero().tolist():
        length, reached = 1.0, 1.0
        for k in range(drafter.num_draft_tokens):
            p, q = p_logits[r, n, k], q_logits[r, n, k]
            if temperature:
                p, q = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
                pairs = zip(p if ids is None else p[ids], q, strict=True)
                reached *= sum(min(float(a), float(b)) for a, b in pairs)
            else:
                best = int(p.argmax()) if ids is None else int(p.argmax()) // 2
                known = ids is None or int(ids[best]) == int(p.argmax())
                reached *= float(q.softmax(-1)[best]) if known else 0.0
            length += reached
        expected.append(length)
    assert found == pytest.approx(expected, rel=1e-4)  # the network and the head are float32


def test_what_would_be_served_is_scored(scene) -> None:
    """Rounded to the type in which the draft serves: bfloat16 masks what is smaller."""
    target, drafter, batch = scene
    weights = {name: p.detach() for name, p in drafter.network().named_parameters()}
    rounded = {name: p.bfloat16().float() for name, p in weights.items()}
    plain = shadow_of(target, drafter).scores(batch, [weights, rounded])
    as_served = shadow_of(target, drafter, torch.bfloat16).scores(batch, [weights, rounded])
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

    shadows = [shadow_of(target, drafter, ranks=Rank(rank)) for rank in (0, 1)]
    for shadow in shadows:
        shadow.scores(batch, [weights, weights])
    first, second = (shadow.scores(batch, [weights, weights]) for shadow in shadows)
    assert first == second
    alone = shadow_of(target, drafter).scores(batch, [weights])[0]
    assert first[1] == pytest.approx(alone, rel=1e-5)
    assert 0 < len(parts[0][0]) < len(alone)


# --- versions ------------------------------------------------------------------------------


def test_a_pinned_version_stays_whatever_comes_after_it() -> None:
    """Beside the newest ``keep``; unpinned it goes with the next publication."""
    target = make_target(seed=3)
    network = make_drafter(target).network()
    publisher = InPlacePublisher.of_modules(network, target.model, keep=2)
    for version in range(1, 7):
        publisher.publish({"norm.weight": network.norm.weight + 1})
        if version == 2:
            publisher.pin(2)
            kept = publisher.weights_of(2)["norm.weight"].clone()
    assert sorted(publisher._kept) == [2, 5, 6]
    assert torch.equal(publisher.weights_of(2)["norm.weight"], kept)
    state = publisher.state()
    again = InPlacePublisher.of_modules(make_drafter(target).network(), target.model)
    again.restore(state, 6, pinned=2)
    assert again.version == 6
    for version in (2, 6):
        expected = publisher.weights_of(version)["norm.weight"]
        assert torch.equal(again.weights_of(version)["norm.weight"], expected)
    with pytest.raises(PublicationError, match="no weights of version 5"):
        again.restore(state, 5, pinned=2)
    publisher.pin(0)
    publisher.publish({"norm.weight": network.norm.weight + 1})
    assert sorted(publisher._kept) == [6, 7]


# --- what is looked at ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alarm", "num_new", "asked", "evidence"),
    [
        (False, 3, [(True, 1)], 3),  # a look takes what there is, and only once
        (True, 64, [(True, 32)], 64),  # after a fall too, where it is enough
        (True, 31, [(True, 32), (False, 1)], 0),  # else all that no update has had, as no evidence
        (False, 0, [(True, 1)], 0),
    ],
)
def test_what_is_looked_at(
    alarm: bool, num_new: int, asked: list[tuple[bool, int]], evidence: int
) -> None:
    """Rows count as evidence once; a fall is looked into all the same. 100 rows are untaught."""
    seen: list[tuple[bool, int]] = []

    def held_out(most: int, once: bool = False, at_least: int = 1) -> Any:
        assert most == 128
        seen.append((once, at_least))
        number = num_new if once else 100
        return SimpleNamespace(number=number) if number >= at_least else None

    def scores(batch: Any, weights: list[Any]) -> list[list[float]]:
        return [[2.0 - 0.1 * i] * batch.number for i in range(len(weights))]

    guard = ShadowGuard(
        ShadowSettings(),
        SimpleNamespace(scores=scores),
        SimpleNamespace(held_out=held_out),
        SimpleNamespace(version=5, weights_of=lambda version: version, pin=lambda _: None),
    )
    totals = Totals(rounds=1000, watch=Watch(at_loaded=False, good=0, looked_at=1000))
    if alarm:
        totals.watch.fall, totals.watch.falling = 20.0, 20
    else:
        totals.watch.looked_at = 0
    verdict = guard.watch(totals, candidate=lambda: pytest.fail("no candidate waits"))
    assert seen == asked
    assert totals.watch.evidence.weight == evidence
    assert (verdict is None) == (not alarm and num_new == 0)
    assert totals.watch.fall == 0
    assert guard.watch(totals, candidate=dict) is None or not evidence


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


EACH = "adapt.guard={kind: shadow, anchors: 16, every: 1, prove_first: false}"


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
                *(() if guarded else (EACH,)),
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
    """Random labels from the 5th update to the 8th: no version of theirs is published, the fourth
    refusal starts again from what serves with an empty optimizer, and what follows serves."""
    world, events = world_of("adapt.policy.num_steps=4", "adapt.trainer.lr=1e-3"), Events()
    arm = build_arm(world, "adapted", events)
    assert arm.coscheduler is not None
    coscheduler: Any = arm.coscheduler
    buffer, trainer = coscheduler._buffer, coscheduler._trainer
    honest, load, loaded = buffer.sample, trainer.load, []

    def sample() -> SignalBatch | None:
        clean = honest()
        return poisoned(clean) if 4 <= coscheduler.totals.updates < 8 else clean

    def load_and_look(weights: Any) -> None:
        load(weights)
        served = dict(arm.drafter.network().named_parameters())
        same = all(torch.equal(w, served[n]) for n, w in trainer.weights().items())
        loaded.append((coscheduler.totals.updates, same, moments(trainer)))

    monkeypatch.setattr(buffer, "sample", sample)
    monkeypatch.setattr(trainer, "load", load_and_look)
    tokens = decode(world, arm)
    verdicts = events.verdicts
    before = sum(v.publish for v in verdicts[:4])
    assert before >= 2
    assert [v.publish for v in verdicts[4:9]] == [False] * 4 + [True]
    assert all(v.candidate_score < v.serving_score - 0.5 for v in verdicts[4:8])
    assert (verdicts[7].back_to, verdicts[7].num_rows) == (before, 16)
    assert loaded[0] == (8, True, 0.0)
    assert coscheduler.version == sum(v.publish for v in verdicts)
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
        "adapt.guard={kind: shadow, tolerance: 1000, check_every: 1000, cooldown_rounds: 24,"
        " prove_first: false, check_rounds: 100000}",
        tokens=384,
    )
    events = Events()
    arm = build_arm(world, "adapted", events)
    coscheduler: Any = arm.coscheduler
    trainer, publisher = coscheduler._trainer, coscheduler._publisher
    loaded = checksum(publisher.weights_of(0))
    honest, load = coscheduler._buffer.sample, trainer.load
    poisoned_at: list[int] = []
    clean: list[bool] = []

    def sample() -> SignalBatch | None:
        if coscheduler.totals.rounds < 60 or events.of("rollback"):
            return honest()
        poisoned_at.append(coscheduler.totals.rounds)
        return poisoned(honest())

    def load_and_look(weights: Any) -> None:
        load(weights)
        clean.append(moments(trainer) == 0)

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
    """On far text, where drafts serve once learning has shown that it pays: updates on random labels
    for 40 rounds are all refused, the fourth refusal starts again from what serves, and what is
    taught after them may serve."""
    world, events = (
        world_of(
            "workload.prompts=null",
            "workload.documents=tinyworld/documents/translated.jsonl",
            "adapt.loss.kind=jensen_shannon",
            "adapt.trainer.lr=1e-3",
            "adapt.policy.num_steps=4",
            "adapt.guard={kind: shadow, cooldown_rounds: 16}",  # tries again soon
            tokens=600,
        ),
        Events(),
    )
    arm = build_arm(world, "adapted", events)
    coscheduler: Any = arm.coscheduler
    honest = coscheduler._buffer.sample
    begun: list[tuple[int, int]] = []  # round, version

    def sample() -> SignalBatch | None:
        clean, version = honest(), coscheduler.version
        if clean is None or version < LEARNT:
            return clean
        begun.append((coscheduler.totals.rounds, version))
        return poisoned(clean) if coscheduler.totals.rounds < begun[0][0] + POISONED else clean

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
    assert [v.back_to for v in judged[:4]] == [None, None, None, version]


@pytest.mark.slow
def test_nothing_is_undone_where_learning_pays() -> None:
    """On foreign text: most updates serve, none is rolled back, and scores say what they bring."""
    world, events = (
        world_of("workload.temperature=1", domain="translated", tokens=224),
        Events(),
    )
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    assert arm.coscheduler is not None
    totals = arm.coscheduler.totals
    assert totals.updates > 25
    assert arm.coscheduler.version > 0.9 * totals.updates
    assert not events.of("rollback")
    assert totals.watch.evidence.mean > 0
    assert 0 < totals.guard_seconds < totals.update_seconds


def test_every_second_update_is_judged_with_the_one_before() -> None:
    world, events = world_of("adapt.guard.every=2", tokens=128), Events()
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    scored = [v.num_rows is not None for v in events.verdicts if v.candidate_score or v.publish < 1]
    assert scored[:6] == [False, True] * 3
    assert arm.coscheduler is not None
    assert arm.coscheduler.version <= arm.coscheduler.totals.updates / 2


@pytest.mark.slow
def test_updates_in_the_background_are_judged() -> None:
    """When they are finished, on the rows that have come since as well."""
    world, events = world_of("adapt.trainer.background=true"), Events()
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    scored = [v for v in events.verdicts if v.num_rows is not None]
    assert scored
    assert len(scored) >= len(events.verdicts) - 2  # the request may have ended meanwhile
    assert len(events.of("publication")) == sum(v.publish for v in scored)


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
    assert [(v.publish, v.candidate_score) for v in verdicts["both"]] == [
        (v.publish, v.candidate_score) for v in verdicts["second"]
    ]


@pytest.mark.slow
def test_an_interrupted_run_is_guarded_the_same(tmp_path: Path) -> None:
    """With a last good version, refusals and evidence behind it, a resumed run has the same figures
    and the same verdicts, to the bit."""

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
                EACH,
                "adapt.guard={tolerance: 0.005, check_every: 2, patience: 2}",
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


def test_the_last_good_version_is_in_the_footprint() -> None:
    """One version more is kept than ``adapt.publish.keep`` says."""
    configs = [load_config(SAMPLED, [f"adapt.guard.kind={kind}"]) for kind in ("finite", "shadow")]
    finite, shadow = (footprint(config, *sketch(config)) for config in configs)
    assert shadow.last_good - finite.last_good == 4 * shadow.num_trained > 0


def test_scores_are_in_the_footprint() -> None:
    """Of as many rows as a look at what serves takes: the teacher's softmax, and the draft's logits,
    as they are and by the temperature, with theirs. They and the loss are never there together."""

    def sized(*more: str) -> Any:
        config = load_config(SAMPLED, ["adapt.guard={kind: shadow, anchors: 8}", *more])
        return footprint(config, *sketch(config))

    found = sized()
    target, drafter = sketch(load_config(SAMPLED))
    row = drafter.num_draft_tokens * target.vocab_size * 4
    assert found.scores == pytest.approx(4 * LOOKED_INTO * 8 * row, rel=0.01)
    for loss, larger in ((0, found.scores), (found.scores + 1, found.scores + 1)):
        assert replace(found, loss=loss).added == replace(found, loss=0, scores=0).added + larger

    assert sized("adapt.loss.chunk_rows=24").scores == pytest.approx(found.scores / 4, rel=0.01)
    of_window = 4 * (1024 - drafter.num_draft_tokens) * row  # of what is kept of one request
    assert sized("adapt.guard.anchors=1000").scores == pytest.approx(of_window, rel=0.01)
    assert sized("arms=[frozen]").scores == 0
    finite = load_config(SAMPLED, ["adapt.guard.kind=finite"])
    assert footprint(finite, *sketch(finite)).scores == 0


def test_the_guard_scores_in_the_chunks_of_the_loss() -> None:
    """Else it would hold logits of all rows beside a loss that does not."""
    arm = build_arm(world_of("adapt.loss.chunk_rows=5"), "adapted", Events())
    coscheduler: Any = arm.coscheduler
    assert coscheduler._guard._scorer._chunk_rows == 5


# --- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapt.guard.kind=sentinel", r"adapt\.guard\.kind: .*'sentinel'; .*finite, shadow"),
        ("adapt.guard.anchors=0", r"adapt\.guard.*anchors|adapt\.guard\.anchors"),
        (
            "adapt.guard={kind: finite, every: 3}",
            r"adapt\.guard: .*every.*kind finite: nothing else",
        ),
        ("adapt.guard.tolerance=-1", r"adapt\.guard\.tolerance.*-1"),
        ("adapt.guard.patient=3", r"adapt\.guard: .*patient.*allowed with kind shadow: .*patience"),
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
