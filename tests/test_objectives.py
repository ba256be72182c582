"""What updates are made with: Hedge, the warm start, trials, and the table of defaults."""

from __future__ import annotations

import itertools
import json
import math
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cosched.build.embedded import build_arm
from cosched.errors import ConfigError
from cosched.loop.counters import TRIALS_KEPT, Counters
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.protocols import Expert, FiniteSettings, LossSettings, ShadowSettings
from cosched.records import Decision, Snapshot
from cosched.registry import DRAFTERS, LOSSES, OBJECTIVES, defaults_for
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config, to_yaml
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import RunFolder
from cosched.testing.harness import (
    Every,
    collected,
    make_requests,
    make_target,
    make_trainer,
    serve,
)
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.scope import parameters_of
from cosched.training.trying import TryingTrainer, WithObjective
from schedulers.defaults import TABLE
from tests.helpers.drafts import make_drafter
from tests.helpers.guarded_runs import SAMPLED, Events, decode, world_of
from tests.helpers.rounds import round_of, snapshot

Gains = tuple[float, ...]


def hedge(num_experts: int = 2, **fields: Any) -> Any:
    cls = OBJECTIVES.get("hedge")
    experts = tuple(Expert() for _ in range(num_experts))
    return cls(cls.Settings(kind="hedge", experts=experts, **fields))


def after(trials: list[Gains], since: int = 0) -> Snapshot:
    """What is known behind these trials, and updates since the last."""
    kept = tuple(trials[-TRIALS_KEPT:])
    return snapshot(num_trials=len(trials), trials=kept, updates_since_trial=since)


def turns(objective: Any, trials: list[Gains]) -> list[int]:
    """The expert that makes the updates behind each of these trials."""
    counts = range(1, len(trials) + 1)
    return [objective.choose(after(trials[:count])).objective for count in counts]


# --- Hedge ---------------------------------------------------------------------------------


def test_trials_come_first_and_every_so_many_updates() -> None:
    """One before anything is known, then every fifth update; one that found no rows is made up for."""
    objective, counters, seen = hedge(every_updates=5), Counters(), []
    for update in range(16):
        choice = objective.choose(counters.snapshot(1, 0, 0))
        seen.append(choice.trial)
        counters.updates += 1
        if choice.trial and update not in {0, 6}:
            counters.note_trial((0.0, 0.0))
    assert [i for i, trial in enumerate(seen) if trial] == [0, 1, 6, 7, 12]


@pytest.mark.parametrize("better", [0, 1, 2])
def test_the_better_expert_wins(better: int) -> None:
    """One is better by 0.1 tokens a trial: with eta 64 the others weigh exp(-6.4 n) behind n trials,
    less than any turn of the golden ratio leaves open (1 / (3 n) or more), so it takes every turn."""
    gain = tuple(0.1 * (i == better) for i in range(3))
    objective = hedge(3, discount=1.0)
    assert turns(objective, [gain] * 60) == [better] * 60
    weight = objective.weights(after([gain] * 2))[better]
    assert weight == pytest.approx(1 / (1 + 2 * math.exp(-12.8)))


def test_a_change_is_followed() -> None:
    """The first is better by 0.1 for 50 trials, then the second: the discounted difference is
    2 * 0.9^m - 1 after m more (times 1 - 0.9^50 at first), below zero from the 7th on."""
    objective = hedge(2, discount=0.9)
    trials = [(0.1, 0.0)] * 50 + [(0.0, 0.1)] * 40
    for more in (0, 6, 7, 12):
        ahead = (1 - 0.9**50) * 0.9**more - (1 - 0.9**more)
        expected = 1 / (1 + math.exp(-64 * ahead))
        assert objective.weights(after(trials[: 50 + more]))[0] == pytest.approx(expected)
    chosen = turns(objective, trials)
    assert set(chosen[:50]) == {0}
    assert set(chosen[50 + 10 :]) == {1}


def test_equal_experts_take_turns() -> None:
    """As often as one another, in any stretch: no third of 90 turns has a third more or less."""
    chosen = turns(hedge(3), [(0.2, 0.2, 0.2)] * 90)
    for begin in range(0, 90, 30):
        counts = [chosen[begin : begin + 30].count(i) for i in range(3)]
        assert all(8 <= count <= 12 for count in counts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.08), min_size=2, max_size=5), st.integers(1, 10_000))
def test_turns_are_in_proportion_to_the_weights(sums: list[float], first: int) -> None:
    """200 turns in a row are within 5 of 200 times the weight (the golden ratio's discrepancy grows
    with the logarithm of their number: an interval's count is off by less than 2.5 at each end)."""
    objective, gains = hedge(len(sums)), tuple(sums)
    known = snapshot(num_trials=1, trials=(gains,))
    chosen = [
        objective.choose(msgspec.structs.replace(known, num_trials=n)).objective
        for n in range(first, first + 200)
    ]
    for expert, weight in enumerate(objective.weights(known)):
        assert abs(chosen.count(expert) - 200 * weight) <= 5


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 5),
    st.floats(0.1, 8),
    st.sampled_from(["random", "turning", "against"]),
    st.integers(1, TRIALS_KEPT),
    st.integers(0, 1000),
)
def test_regret_is_within_the_bound(n: int, eta: float, text: str, count: int, seed: int) -> None:
    """What the weights bring is at most ln(N) / eta + eta T B^2 / 8 behind the best expert, B = 1:
    by chance, when the best one turns at every trial, and when the heaviest is always the worst."""
    draw, objective = random.Random(seed), hedge(n, eta=eta, discount=1.0)
    trials: list[Gains] = []
    brought = 0.0
    for number in range(count):
        weights = objective.weights(after(trials))
        gains = {
            "random": [draw.random() for _ in range(n)],
            "turning": [float(number % n == i) for i in range(n)],
            "against": [float(weight < max(weights)) for weight in weights],
        }[text]
        brought += sum(w * g for w, g in zip(weights, gains, strict=True))
        trials.append(tuple(gains))
    best = max(map(sum, zip(*trials, strict=True)))
    assert best - brought <= math.log(n) / eta + eta * count / 8 + 1e-9


def test_totals_keep_the_newest_trials_and_a_reset_forgets_none() -> None:
    """Bounded however long a server runs; a new request knows what was good; it can be written."""
    counters = Counters()
    for number in range(TRIALS_KEPT + 9):
        counters.note_trial((float(number), -1.0))
    counters.start_anew()
    again = msgspec.json.decode(msgspec.json.encode(counters), type=Counters)
    known = again.snapshot(1, 0, 0)
    assert known == counters.snapshot(1, 0, 0)
    assert (known.num_trials, len(known.trials)) == (TRIALS_KEPT + 9, TRIALS_KEPT)
    assert known.trials[-1] == (TRIALS_KEPT + 8, -1.0)


# --- the warm start ------------------------------------------------------------------------


def test_the_rate_rises_with_the_tokens() -> None:
    """A share t / warm_tokens of the rate, up to all of it; nothing else of a decision changes."""
    fixed = OBJECTIVES.get("fixed")(OBJECTIVES.get("fixed").Settings(kind="fixed"))

    def shares(warm_tokens: int) -> list[float]:
        policy = WithObjective(Every(1, 3), fixed, (), warm_tokens)
        tokens = [1, 64, 128, 256, 9999]
        decisions = [
            policy.decide(snapshot(rounds_since_update=1, tokens_since_loaded=t)) for t in tokens
        ]
        assert all(msgspec.structs.replace(d, rate_share=1) == Decision(3) for d in decisions)
        return [decision.rate_share for decision in decisions]

    assert shares(256) == [1 / 256, 0.25, 0.5, 1.0, 1.0]
    assert shares(0) == [1.0] * 5
    idle = WithObjective(Every(2), fixed, (), 256).decide(snapshot(rounds_since_update=1))
    assert idle == Decision(0)


def test_tokens_are_counted_from_the_loaded_draft() -> None:
    """From the start, a reset, and from when the loaded draft serves again; not from other versions."""
    counters = Counters()

    def seen() -> int:
        counters.observe(round_of([3]))
        return counters.snapshot(1, 0, 0).tokens_since_loaded

    assert [seen(), seen()] == [3, 6]
    counters.start_anew()
    assert seen() == 3
    counters.went_back(0, serving=0)  # a candidate was given up, and the loaded draft served
    assert seen() == 3
    counters.published()
    counters.went_back(4, serving=4)
    counters.went_back(2, serving=4)
    assert seen() == 6
    counters.went_back(0, serving=5)
    assert seen() == 3


def test_a_request_begins_gently_and_so_does_the_next() -> None:
    """State per request: the shares of the rate are those of the tokens of the request itself."""
    events = Events()
    world = world_of(
        "adapt.objective.warm_tokens=64",
        "adapt.scope.state=per_request",
        "adapt.guard.kind=finite",
        tokens=96,
        prompts=2,
    )
    arm = build_arm(world, "adapted", events)
    decode(world, arm)
    kinds = [kind for kind, _ in events.all]
    reset = kinds.index("reset")
    for part in (events.all[:reset], events.all[reset:]):
        shares = [f["decision"].rate_share for kind, f in part if kind == "decision"]
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.4
        assert shares[-1] == 1.0


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

GOOD, ABSURD = "{lr: 3.0e-4}", "{lr: 30.0}"


def run(*overrides: str, tokens: int = 192, prompts: int = 1) -> tuple[Any, Events, Any]:
    lenient = "adapt.guard={kind: shadow, anchors: 16, false_publish: 0.999}"
    world = world_of(lenient, *overrides, domain="translated", tokens=tokens, prompts=prompts)
    events = Events()
    arm = build_arm(world, "adapted", events)
    return decode(world, arm), events, arm


def experts(*each: str, **fields: Any) -> str:
    more = "".join(f", {name}: {value}" for name, value in fields.items())
    return f"adapt.objective={{kind: hedge, experts: [{', '.join(each)}]{more}}}"


def published(events: Events) -> list[str]:
    return [event["version"].draft_checksum for event in events.of("publication")]


@pytest.fixture(scope="module")
def alone() -> tuple[Any, Events, Any]:
    return run()


@pytest.mark.slow
@pytest.mark.parametrize("good", [0, 1])
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


def test_the_cost_of_trials_is_counted() -> None:
    """All of a trial's updates and scores are time that the engine waited for, so that a share of
    the time bounds them as well."""
    _, events, arm = run(experts(GOOD, "{lr: 1.0e-3}", "{lr: 1.0e-4}", every_updates=1), tokens=64)
    counters = arm.coscheduler.counters
    spent = sum(event["result"].seconds for event in events.of("update"))
    assert counters.updates >= 4
    assert spent < counters.update_seconds_total - counters.guard_seconds


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_any_scope_can_be_tried(kind: str) -> None:
    """Adapters that are merged to be published, too: the good one's versions, to the bit."""
    scope = f"adapt.scope.kind={kind}"
    expected = run(scope, "adapt.trainer.lr=1e-3", tokens=64)[1]
    found = run(scope, experts("{lr: 30}", "{lr: 1.0e-3}", every_updates=2), tokens=64)[1]
    assert published(found) == published(expected) != []


@pytest.mark.slow
def test_an_interrupted_run_chooses_the_same(tmp_path: Path) -> None:
    """What earlier trials brought is kept: a resumed run takes the same experts, to the bit."""

    def config(name: str) -> Config:
        return load_config(
            SAMPLED,
            [
                f"run.dir={tmp_path}",
                f"run.name={name}",
                "arms=[adapted]",
                "workload.max_new_tokens=160",
                "workload.max_prompts=2",
                "adapt.policy.rounds=4",
                "adapt.guard.kind=shadow",
                experts("{lr: 3.0e-4}", "{loss: {kind: reverse_kl}}", "{lr: 1.0e-3}", eta=8),
            ],
        )

    def made(name: str) -> list[Any]:
        lines = (tmp_path / name / "events.jsonl").read_text().splitlines()
        results = [e["result"] for e in map(json.loads, lines) if e["kind"] == "update"]
        return [(r["objective"], r["trial"], r["losses"]) for r in results]

    committed = 0

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 200:
            raise KeyboardInterrupt

    for name in ("whole", "cut"):
        RunFolder(tmp_path / name).create()
    Experiment(config("whole")).run(RunFolder(tmp_path / "whole"))
    assert Experiment(config("cut")).run(RunFolder(tmp_path / "cut"), interrupt).run["interrupted"]
    Experiment(config("cut")).run(RunFolder(tmp_path / "cut"), resume=True)
    assert made("cut") == made("whole")
    assert len({objective for objective, *_ in made("whole")}) > 1


# --- settings ------------------------------------------------------------------------------

TWO = "{lr: 1.0e-3}, {loss: {kind: reverse_kl, position_decay: 0.5}}"


def test_an_expert_says_only_what_is_its_own(tmp_path: Path) -> None:
    """The rest is as in ``adapt``; the written configuration has all of it, and is read the same."""
    config = load_config(
        SAMPLED,
        [
            "adapt.guard.kind=shadow",
            f"adapt.objective={{kind: hedge, warm_tokens: 256, experts: [{TWO}]}}",
            "adapt.loss={kind: top_k_cross_entropy, k: 8, position_decay: 0.7}",
        ],
    )
    first, second = config.experts
    assert first == (config.loss_settings, 1e-3)
    assert second == (LossSettings(kind="reverse_kl", position_decay=0.5), 3e-4)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    written = yaml.safe_load(path.read_text())["adapt"]["objective"]
    assert [expert["lr"] for expert in written["experts"]] == [1e-3, 3e-4]
    assert written["experts"][0]["loss"]["k"] == 8
    again = load_config(path)
    assert (again.experts, to_yaml(again)) == (config.experts, to_yaml(config))


def test_a_variant_has_its_own_objective() -> None:
    config = load_config(
        SAMPLED,
        [
            "arms=[frozen,tried]",
            f"variants.tried.objective={{kind: hedge, experts: [{TWO}]}}",
            "variants.tried.guard.kind=shadow",
        ],
    )
    assert config.for_arm("frozen").experts == ()
    assert [rate for _, rate in config.for_arm("tried").experts] == [1e-3, 3e-4]
    with pytest.raises(ConfigError, match=r"variants\.tried\.guard\.kind: .*use shadow"):
        load_config(
            SAMPLED,
            ["arms=[tried]", f"variants.tried.objective={{kind: hedge, experts: [{TWO}]}}"],
        )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapt.objective.kind=bandit"], r"adapt\.objective\.kind: .*'bandit'.*fixed, hedge"),
        (["adapt.objective.warm_tokens=-1"], r"adapt\.objective\.warm_tokens: .*got -1"),
        (
            ["adapt.objective.experts=[]"],
            r"adapt\.objective: .*`experts`.*allowed here: kind, warm",
        ),
        (["adapt.objective.kind=hedge"], r"adapt\.objective: .*`experts`"),
        ([experts()], r"adapt\.objective\.experts: .*length >= 2"),
        ([experts(GOOD)], r"adapt\.objective\.experts: .*length >= 2"),
        ([experts(GOOD, "{rate: 1}")], r"adapt\.objective\.experts\[1\]: .*`rate`; .*: loss, lr"),
        ([experts(GOOD, "{lr: 0}")], r"adapt\.objective\.experts\[1\]\.lr: .*> 0.*got 0"),
        (
            [experts(GOOD, "{loss: {kind: hope}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.kind: .*'hope'; there are: .*forward_kl",
        ),
        (
            [experts(GOOD, "{loss: {position_decay: 2}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.position_decay: .*got 2",
        ),
        (
            [experts(GOOD, "{loss: {kind: proximal_kl}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.kind: 'proximal_kl' does not look",
        ),
        (
            [experts(GOOD, "{loss: {rows: accepted}}")],
            r"adapt\.objective\.experts\[1\]\.loss\.rows: .*'accepted'; use 'delayed'",
        ),
        ([experts(GOOD, GOOD, eta=0)], r"adapt\.objective\.eta: .*got 0"),
        ([experts(GOOD, GOOD, discount=1.1)], r"adapt\.objective\.discount: .*got 1\.1"),
        (
            [experts(GOOD, GOOD), "adapt.guard.kind=finite"],
            r"adapt\.guard\.kind: adapt\.objective\.kind = hedge .*got finite; use shadow",
        ),
        (
            [experts(GOOD, GOOD), "adapt.trainer.background=true"],
            r"adapt\.trainer\.background: adapt\.objective\.kind = hedge .*use false",
        ),
        (
            [
                experts(GOOD, GOOD),
                "adapt.scope={kind: lora, state: per_request}",
                "engine.max_batch=2",
            ],
            r"adapt\.scope\.state: adapt\.objective\.kind = hedge .*per_request; use shared",
        ),
    ],
)
def test_bad_objectives_are_named(overrides: list[str], says: str) -> None:
    """The message names the key, what came and what is allowed."""
    with pytest.raises(ConfigError, match=says):
        load_config(SAMPLED, ["adapt.guard.kind=shadow", *overrides])


def test_trials_are_in_the_footprint() -> None:
    """Two states of the trainer, weights and moments; and the copy that any of the losses needs."""
    held = "{loss: {kind: sum, terms: [{kind: forward_kl}, {kind: proximal_kl}]}}"
    configs = [
        load_config(SAMPLED, ["adapt.guard.kind=shadow", *more])
        for more in ([], [experts(GOOD, held)])
    ]
    fixed, tried = (footprint(config, *sketch(config)) for config in configs)
    assert (fixed.trials, fixed.reference) == (0, 0)
    assert tried.trials == 2 * 12 * tried.num_trained > 0
    assert tried.reference == 4 * tried.num_trained
    assert tried.added > fixed.added + tried.trials


# --- defaults by how a drafter drafts ------------------------------------------------------


def bare(tmp_path: Path, drafter: str, adapt: str = "{}") -> Path:
    path = tmp_path / "bare.yaml"
    path.write_text(
        f"run: {{name: bare}}\ntarget: {{path: tinyworld/target}}\n"
        f"drafter: {{kind: {drafter}, path: tinyworld/{drafter}}}\n"
        f"workload: {{prompts: tinyworld/prompts/code.jsonl}}\nadapt: {adapt}\n"
    )
    return path


@pytest.mark.parametrize("drafter", ["eagle3", "dflash", "pard"])
def test_what_a_file_leaves_out_goes_by_the_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """The row of its type and no other; written out where the run keeps its settings."""
    row = {
        "policy": {"kind": "every_n_tokens", "tokens": 7},
        "loss": {"kind": "top_k_cross_entropy", "k": 5},
        "trainer": {"lr": 0.125},
        "replay": {"anchors": 9},
        "guard": {"kind": "shadow", "check_rounds": 2},
    }
    for kind in set(TABLE) - {"none"}:
        mine = kind == DRAFTERS.get(drafter).draft_type
        monkeypatch.setitem(TABLE, kind, row if mine else {"trainer": {"lr": 99.0}})
    config = load_config(bare(tmp_path, drafter))
    assert (config.policy_settings.tokens, config.loss_settings.k) == (7, 5)
    assert (config.adapt.trainer.lr, config.adapt.replay.anchors) == (0.125, 9)
    assert yaml.safe_load(to_yaml(config))["adapt"]["policy"]["tokens"] == 7
    said = (
        "{policy: {num_steps: 3}, loss: {kind: reverse_kl}, guard: {anchors: 7}, "
        "trainer: {zero_stage: 0}, replay: {window: 99}}"
    )
    config = load_config(bare(tmp_path, drafter, said), ["adapt.replay.anchors=3"])
    policy, guard = config.policy_settings, config.adapt.guard
    assert (policy.kind, policy.tokens, policy.num_steps) == ("every_n_tokens", 7, 3)
    assert config.loss_settings == LossSettings(kind="reverse_kl")
    assert guard == ShadowSettings(anchors=7, check_rounds=2)
    assert (config.adapt.trainer.lr, config.adapt.trainer.zero_stage) == (0.125, 0)
    assert (config.adapt.replay.anchors, config.adapt.replay.window) == (3, 99)
    changed = ["adapt.policy.kind=every_n_rounds", "adapt.guard.kind=finite"]
    config = load_config(bare(tmp_path, drafter, said), changed)
    policy = config.policy_settings
    assert (policy.kind, policy.rounds, policy.num_steps) == ("every_n_rounds", 16, 3)
    assert config.adapt.guard == FiniteSettings()
    config = load_config(bare(tmp_path, drafter), ["variants.fast.trainer.lr=0.5"])
    fast = config.for_arm("fast")
    assert (fast.adapt.trainer.lr, fast.policy_settings.tokens) == (0.5, 7)


@pytest.mark.parametrize("draft_type", sorted(TABLE))
def test_every_row_of_the_table_is_allowed(tmp_path: Path, draft_type: str) -> None:
    """It loads as it stands, and a caller cannot change it."""
    kinds = {plugin.cls.draft_type: plugin.name for plugin in DRAFTERS.plugins()}
    if draft_type not in kinds:
        assert TABLE[draft_type].keys() == {"guard"}  # nothing is trained
        return
    config = load_config(bare(tmp_path, kinds[draft_type]))
    assert config.loss_settings.kind == TABLE[draft_type]["loss"]["kind"]
    defaults_for(kinds[draft_type])["trainer"]["lr"] = 1.0
    assert TABLE[draft_type]["trainer"]["lr"] != 1.0


def test_a_drafter_that_does_not_say_how_it_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DRAFTERS.get("eagle3"), "draft_type", "tree")
    with pytest.raises(ConfigError, match=r"drafter\.kind: .*'eagle3'.*'tree'.*chain, block"):
        load_config(bare(tmp_path, "eagle3"))
