"""Policies driven through scripted snapshots, and the statistics that they decide on."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from cosched.build.coscheduler import build_coscheduler
from cosched.coscheduler import Coscheduler
from cosched.engines.embedded.target import Target
from cosched.errors import ConfigError
from cosched.guard.guard import FiniteGuard
from cosched.guard.monitor import Monitor, Scores
from cosched.guard.statistics import BLOCK, Lead
from cosched.loop.budget import WithinTimeShare
from cosched.loop.counters import Counters
from cosched.protocols import ShadowSettings
from cosched.records import (
    Decision,
    ServedBlock,
    Snapshot,
    UpdateResult,
    Verdict,
    VerifyRound,
    WeightVersion,
)
from cosched.registry import POLICIES
from cosched.settings.load import load_config
from cosched.testing.harness import NoEvents
from tests.conftest import make_drafter
from tests.test_core import snapshot

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
TRAINING = sorted({p.name for p in POLICIES.plugins() if p.cls.__module__[:10] == "schedulers"})
TRAINING.remove("never")


def policy(kind: str, **settings: Any) -> Any:
    cls = POLICIES.get(kind)
    return cls(cls.Settings(kind=kind, **settings))


def steps(policy: Any, script: list[dict[str, float]], **always: float) -> list[int]:
    """Micro-steps decided on each snapshot of a script."""
    return [policy.decide(snapshot(**{**always, **seen})).num_steps for seen in script]


def round_of(lengths: list[int], seconds: float = 0.01, **changes: Any) -> VerifyRound:
    """A round of four drafts a request, of which ``length - 1`` were accepted."""
    path = torch.zeros(4, dtype=torch.int64)
    blocks = [ServedBlock(str(i), 0, path, None, n - 1, n) for i, n in enumerate(lengths)]
    fields = {"finished": (), "num_running": len(lengths), **changes}
    return VerifyRound(
        (), tuple(blocks), draft_seconds=seconds / 4, verify_seconds=3 * seconds / 4, **fields
    )


# --- every policy --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINING)
def test_nothing_known_and_nothing_to_do(kind: str) -> None:
    """Before the first round, whatever runs, no policy trains."""
    assert steps(policy(kind), [{"num_running": n} for n in (0, 1, 64)], update_gain=1) == [0] * 3


@pytest.mark.parametrize("kind", ["never", *TRAINING])
def test_a_budget_of_zero_is_refused(kind: str) -> None:
    """No policy takes a share of nothing or of more than all; the message names the key."""
    for share in ("0", "1.5"):
        with pytest.raises(ConfigError, match=rf"adapt\.policy\.max_time_share: .*got {share}"):
            load_config(
                QUICKSTART, [f"adapt.policy.kind={kind}", f"adapt.policy.max_time_share={share}"]
            )


@pytest.mark.parametrize("key", ["budget_ms", "step_ms", "num_steps", "max_running"])
def test_slack_refuses_other_zeros(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapt\.policy\.{key}: .*got 0"):
        load_config(QUICKSTART, ["adapt.policy.kind=slack", f"adapt.policy.{key}=0"])


READY = {
    "num_running": 1, "num_updates": 20, "rounds_since_update": 1000, "tokens_since_update": 9000,
    "requests_since_update": 100, "acceptance_shortfall": 100, "seconds_earned": 100,
    "seconds_drafting": 10, "seconds_verifying": 90, "round_index": 5000, "update_gain": 1.5,
    "micro_step_seconds": 0.05, "recent_round_seconds": 0.02, "recent_acceptance_length": 2.0,
    "expected_tokens_left": 5000,
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINING)
def test_a_spike_of_load_and_the_end_of_a_text(kind: str) -> None:
    """Where there is reason to train, slack alone waits for a spike to pass, because it is the one
    that keeps a latency; and goodput alone does not begin what the text cannot pay back. Counts know
    neither, drift and earned go by what has been lost and won, which load and ends do not change."""
    ready, spike = {}, {"num_running": 64, "num_queued": 50}
    found = steps(policy(kind), [ready, spike, ready, {"expected_tokens_left": 3}], **READY)
    waits = {"slack": [1, 0, 1, 1], "goodput": [1, 1, 1, 0]}
    assert [bool(number) for number in found] == waits.get(kind, [1, 1, 1, 1])


# --- counted cadences ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("{kind: every_n_requests}", "policy.kind = every_n_requests learns from finished"),
        ("{kind: slack, idle_steps: 2}", "policy.idle_steps = 2 are taken when all requests have"),
    ],
)
def test_who_learns_from_finished_requests_keeps_them(policy: str, says: str) -> None:
    said = rf"adapt\.replay\.keep_finished: adapt\.{says}.*got false; use true"
    with pytest.raises(ConfigError, match=said):
        load_config(QUICKSTART, [f"adapt.policy={policy}"])
    load_config(QUICKSTART, [f"adapt.policy={policy}", "adapt.replay.keep_finished=true"])


def test_tokens_are_waited_for() -> None:
    """By all requests together; and once, when all is done."""
    every = policy("every_n_tokens", tokens=100, num_steps=2, idle_steps=3)
    script = [{"tokens_since_update": n} for n in (0, 99, 100, 101)]
    assert steps(every, script, num_running=1) == [0, 0, 2, 2]
    assert steps(every, [{"rounds_since_update": n} for n in (0, 7)]) == [0, 3]


def test_requests_are_waited_for() -> None:
    """Whether others still run or not; what finished before the last update does not count again."""
    every, counters = policy("every_n_requests", requests=2, num_steps=3), Counters()

    def decided(*finished: str, running: int = 1) -> int:
        counters.observe(round_of([2], finished=finished))
        steps = every.decide(counters.snapshot(running, 0, 0)).num_steps
        if steps:
            counters.begin_update(steps)
        return steps

    assert [decided(), decided("a"), decided()] == [0, 0, 0]
    assert [decided("b", running=0), decided(), decided("c"), decided("d", "e")] == [3, 0, 0, 3]
    assert counters.snapshot(1, 0, 0).num_finished == 5


# --- drift ---------------------------------------------------------------------------------


def test_drift_trains_from_onset_to_recovery() -> None:
    """Steady text: no update. A fall: updates. Back at the reference: none again, at once."""
    drift, counters = policy("drift", rounds=4, threshold_tokens=10), Counters()

    def trains(lengths: list[int]) -> list[bool]:
        seen = []
        for length in lengths:
            counters.observe(round_of([length]))
            decision = drift.decide(counters.snapshot(1, 0, 0))
            if decision.num_steps:
                counters.begin_update(decision.num_steps)
            seen.append(bool(decision.num_steps))
        return seen

    assert not any(trains([3, 2, 4] * 30))
    fallen = trains([2] * 40)
    # The recent length takes 3 rounds to leave the tolerance; then 12 rounds, at a little under 0.9
    # tokens each (1 less the tolerance), make 10 tokens.
    assert fallen.index(True) in (14, 15)
    assert sum(fallen) == len(range(fallen.index(True), 40, 4))
    back = trains([4] * 60)
    assert any(back[:10])
    assert not any(back[30:])
    assert counters.shortfall == 0


def test_drift_gives_up_where_training_does_not_help() -> None:
    """The reference follows, so a draft that cannot be had back is not trained for ever."""
    counters = Counters()
    good, bad = round_of([3]), round_of([1])
    for seen in [good] * 500 + [bad] * 12_000:
        counters.observe(seen)
    assert counters.reference == pytest.approx(1.0, abs=0.1)
    assert counters.shortfall == 0


def test_drift_sees_a_slow_decay() -> None:
    """From 3.7 tokens to 1.5 in 16,000 rounds, as one long answer does: seen in its first third."""
    draw, counters = random.Random(0), Counters()
    threshold = policy("drift").settings.threshold_tokens
    rounds = {n: round_of([n]) for n in range(1, 6)}
    for number in range(5_000):
        mean = 3.7 - 2.2 * number / 16_000
        counters.observe(rounds[int(mean) + (draw.random() < mean % 1)])
        if counters.shortfall >= threshold:
            return
    pytest.fail("not seen")


@pytest.mark.parametrize("seed", range(4))
def test_drift_tells_a_fall_from_noise(seed: int) -> None:
    """Its default: 4,000 rounds of noise are no fall; from 1 in 2 to 1 in 5 is seen in 100."""
    draw, counters = random.Random(seed), Counters()
    threshold = policy("drift").settings.threshold_tokens

    def lost(chance: float, num_rounds: int) -> list[bool]:
        seen = []
        for _ in range(num_rounds):
            accepted = next((k for k in range(4) if draw.random() > chance), 4)
            counters.observe(round_of([1 + accepted]))
            seen.append(counters.shortfall >= threshold)
        return seen

    assert not any(lost(0.5, 4000))
    assert any(lost(0.2, 100))


# --- slack ---------------------------------------------------------------------------------


def test_slack_waits_out_a_spike() -> None:
    """Load or a queue stops training; when it is over one update is made, not those put off."""
    slack = policy("slack", max_running=4, budget_ms=5, step_ms=10)
    script = [
        {"num_running": 4, "rounds_since_update": 2},
        {"num_running": 5, "rounds_since_update": 2},
        {"num_running": 64, "rounds_since_update": 500},
        {"num_running": 4, "num_queued": 1, "rounds_since_update": 501},
        {"num_running": 4, "rounds_since_update": 502},
        {"num_running": 4, "rounds_since_update": 0},
        {"num_running": 4, "rounds_since_update": 1},
    ]
    assert steps(slack, script) == [1, 0, 0, 0, 1, 0, 0]


def test_slack_believes_its_guess_until_it_has_measured() -> None:
    """10 ms guessed, then 40 ms and 5 ms for each of 2 publications measured; 5 ms a round."""
    slack = policy("slack", budget_ms=5, step_ms=10, num_steps=2)
    waits = [{"rounds_since_update": n} for n in (3, 4, 16, 17)]
    measured = {"micro_step_seconds": 0.04, "num_updates": 2, "seconds_publishing": 0.01}
    assert steps(slack, waits, num_running=1) == [0, 2, 2, 2]
    assert steps(slack, waits, num_running=1, **measured) == [0, 0, 0, 2]


def test_slack_uses_an_idle_tick_once() -> None:
    script = [{"rounds_since_update": n} for n in (0, 9)]
    assert steps(policy("slack", idle_steps=3), script, micro_step_seconds=100) == [0, 3]


# --- earned --------------------------------------------------------------------------------


def served(
    counters: Counters, seconds: float, gain: float, every: Any, update_seconds: float
) -> tuple[int, int]:
    """Serve one request for so long; updates and rounds. Each update is scored, with noise."""
    updates, rounds, noise, lead = 0, 0, random.Random(0), Lead()
    while seconds > 0:
        counters.observe(round_of([2], seconds=0.02), lead.proven)
        seconds, rounds = seconds - 0.02, rounds + 1
        steps = every.decide(counters.snapshot(1, 0, 0)).num_steps
        if steps:
            counters.begin_update(steps)
            counters.updates += 1
            updates += 1
            counters.update_seconds_total += update_seconds
            # Of 16 rows the mean has a noise of 0.05.
            lead.add([2 - 2 / gain + noise.gauss(0, 0.1) for _ in range(16 // BLOCK)], 16)
    return updates, rounds


def test_what_earns_nothing_is_let_be() -> None:
    """A credit of so many rounds' time, and then a share of the time that nobody misses."""
    every, counters = policy("earned", rounds=8, credit_rounds=40, explore_share=0.005), Counters()
    assert served(counters, 2.0, 1.0, every, 0.1)[0] == 8  # 40 rounds of 0.02 s
    updates, _ = served(counters, 200.0, 1.0, every, 0.1)
    assert updates * 0.1 <= 0.006 * 202
    assert updates >= 9
    dearer = Counters()
    assert served(dearer, 2.0, 1.0, every, 0.2)[0] == 4
    dearest = Counters()
    assert served(dearest, 2.0, 1.0, every, 0.9)[0] <= 1


def test_what_earns_goes_on_at_full_cadence() -> None:
    every, counters = policy("earned", rounds=8, credit_rounds=128), Counters()
    served(counters, 10.0, 1.5, every, 0.01)
    updates, rounds = served(counters, 20.0, 1.5, every, 0.01)
    assert updates == rounds // 8


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.02, 1.1, 1.5])
@pytest.mark.parametrize("cost", [0.01, 0.1, 1.0])
def test_learning_costs_no_more_than_it_brings(gain: float, cost: float) -> None:
    """Beyond the credit and the small share, however dear updates are and whatever they bring."""
    every, counters = policy("earned", rounds=8, credit_rounds=100, explore_share=0.005), Counters()
    served(counters, 60.0, gain, every, cost)
    saved = max(0.0, gain - 1) * 60
    assert counters.update_seconds_total <= 100 * 0.02 + cost + 0.005 * 61 + 0.5 * saved * 1.05


def test_nothing_is_earned_without_evidence() -> None:
    """A score that could be chance buys no update; nor does a draft that has gone back."""
    counters, monitor = Counters(serves_loaded=False), Monitor()
    settings, seen = ShadowSettings(), counters.snapshot(1, 7, 0)
    seen = msgspec.structs.replace(seen, serves_loaded=False)

    def look(score: float) -> Verdict:
        return monitor.look(Scores([1 + score] * 16, loaded=[1.0] * 16), settings, seen)

    for _ in range(4):
        look(1.0)
    counters.observe(round_of([3], seconds=1.0), monitor.standing.lead_tokens)
    assert counters.earned_seconds == 0
    for score in (0.9, 1.1) * 8:
        look(score)
    counters.observe(round_of([3], seconds=1.0), monitor.standing.lead_tokens)
    earned = counters.earned_seconds
    assert 0.45 < earned < 0.5  # a token of the three, which the draft as loaded would not have had
    while look(-1.0).to is None:
        pass
    counters.observe(round_of([2], seconds=1.0), monitor.standing.lead_tokens)
    assert counters.earned_seconds == earned


# --- goodput -------------------------------------------------------------------------------

PAYS = {
    "num_running": 1,
    "num_updates": 20,
    "rounds_since_update": 16,
    "recent_acceptance_length": 2.0,
    "recent_round_seconds": 0.1,
    "expected_tokens_left": 10_000,
    "micro_step_seconds": 0.2,
    "update_gain": 1.02,
}


def test_goodput_trains_where_the_formula_says() -> None:
    """t1/t0 = 1.02 > 1 + U / (S C0) with C0 = 0.1 s and S = 256 rounds, so up to U = 0.512 s."""
    script = [{"micro_step_seconds": s} for s in (0.51, 0.513)]
    assert steps(policy("goodput"), script, **PAYS) == [1, 0]
    script = [{"update_gain": g} for g in (0.9, 1.0, 1.0078, 1.0079)]  # 1 + 0.2 / 25.6
    assert steps(policy("goodput"), script, **PAYS) == [0, 0, 0, 1]
    script = [{"seconds_publishing": 20 * s} for s in (0.31, 0.32)]  # each publication counts
    assert steps(policy("goodput"), script, **PAYS) == [1, 0]


def test_goodput_stops_near_the_end_of_the_text() -> None:
    """0.2 s need 100 rounds at a gain of 2 %: 204 tokens at 2.04 a round."""
    script = [{"expected_tokens_left": n} for n in (205, 203, 20, 0)]
    assert steps(policy("goodput"), script, **PAYS) == [1, 0, 0, 0]


def test_goodput_explores_first_and_later_seldom() -> None:
    """With nothing known it makes its exploratory updates, none of them where no text is left."""
    goodput = policy("goodput", exploratory_updates=2, retry_rounds=500)
    new = {**PAYS, "update_gain": 1.0, "micro_step_seconds": 0.0}
    script = [{"num_updates": n} for n in (0, 1, 2)]
    assert steps(goodput, script, **new) == [1, 1, 0]
    assert steps(goodput, script, **{**new, "expected_tokens_left": 30}) == [0, 0, 0]
    assert steps(goodput, [{"rounds_since_update": n} for n in (15, 499, 500)], **new) == [0, 0, 1]


# --- what they decide on -------------------------------------------------------------------


def test_what_is_left_of_a_text_is_estimated() -> None:
    """As much as has been seen; then committed over finished; never more than is allowed."""
    counters = Counters()

    def left(num_running: int = 2) -> float:
        return counters.snapshot(num_running, 0, 0).expected_tokens_left

    assert left() == 0
    counters.observe(round_of([3, 3]))
    assert left() == 6
    counters.observe(round_of([3, 3], finished=("0", "1", "2")))
    assert left() == 4
    counters.observe(round_of([3, 3], tokens_left=5))
    assert left() == 2.5
    assert left(num_running=0) == 0


def test_costs_and_gains_are_learnt_from_updates() -> None:
    """The first update warms up and is left out; later ones count by the micro-step."""
    counters = Counters()
    for number, (cost, length) in enumerate([(9.0, 2), (0.4, 2), (0.4, 3), (0.4, 3)]):
        for _ in range(200):
            counters.observe(round_of([length]))
        counters.begin_update(num_steps=2)
        counters.update_seconds_total += cost
        counters.publish_seconds += 0.1
        counters.updates += 1
        seen = counters.snapshot(1, 0, 0)
        assert seen.last_update_seconds == pytest.approx(cost + 0.1)
        assert seen.serving_seconds_since_update == 0
        assert seen.micro_step_seconds == pytest.approx(0.2 if number > 1 else 0.0)
        # From 2 to 3 tokens in one of the updates, with a weight of 0.1; then one without a gain.
        expected = [1.0, 1.0, 1.5**0.1, 1.5**0.09][number]
        assert seen.update_gain == pytest.approx(expected, rel=1e-4)


def test_a_reset_forgets_the_text_and_not_the_bill() -> None:
    """State per request: the next text is not compared with the last, its updates still cost."""
    counters = Counters(updates=3, step_seconds=0.2, shortfall=20.0, recent_at_update=2.0)
    counters.update_seconds_total = 4.0
    counters.start_anew()
    seen = counters.snapshot(1, 0, 0)
    assert (seen.acceptance_shortfall, seen.rounds_since_update) == (0, 0)
    assert (seen.last_update_seconds, seen.micro_step_seconds) == (4.0, 0.2)


# --- the cap -------------------------------------------------------------------------------


class Costly:
    """A trainer, its buffer, publisher and clock: an update takes 0.7 s, publication 0.3 s."""

    version, busy, num_tokens, now = 0, False, 1, 0.0

    def __init__(self) -> None:
        self.begun: list[float] = []

    def collect(self, round_: VerifyRound) -> int:
        self.now += round_.draft_seconds + round_.verify_seconds
        return 0

    def sample(self) -> Any:
        return SimpleNamespace()

    def weights(self) -> dict[str, Any]:
        return {}

    def update(self, batch: Any, decision: Decision) -> UpdateResult:
        self.begun.append(self.now)
        self.now += 0.7
        return UpdateResult(decision.num_steps, 0, (1.0,), 1, 0.7)

    def publish(self, weights: Any) -> WeightVersion:
        self.now += 0.3
        return WeightVersion(1, "", None, 0.3)


class Always:
    def decide(self, seen: Snapshot) -> Decision:
        return Decision(1, reason="always")


def coscheduler(costly: Any, inner: Any, share: float) -> Coscheduler:
    return Coscheduler(
        costly, WithinTimeShare(inner, share), costly, FiniteGuard(), costly, NoEvents(), False,
        clock=lambda: costly.now,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_updates_stay_within_their_share(share: float) -> None:
    """From the beginning of any update to that of any later one; and all of the share is used."""
    costly = Costly()
    subject = coscheduler(costly, Always(), share)
    for _ in range(5000):
        subject.on_round(round_of([2], seconds=0.05))
    assert len(costly.begun) > 2
    for begun, ended in zip(costly.begun, costly.begun[1:], strict=False):
        # A second for each; a round of 0.05 s more at most, and rounding.
        assert 1 / share - 1e-6 <= ended - begun <= max(1 / share, 1) + 0.05 + 1e-6


def test_a_quiet_time_saves_nothing_up() -> None:
    """After a thousand rounds without one, updates come no closer together than ever."""
    costly = Costly()
    subject = coscheduler(costly, policy("every_n_rounds", rounds=1000), 0.1)
    for _ in range(1000):
        subject.on_round(round_of([2], seconds=0.1))
    subject._policy = WithinTimeShare(Always(), 0.1)
    for _ in range(200):
        subject.on_round(round_of([2], seconds=0.1))
    assert 2 <= len(costly.begun) <= 4


@pytest.mark.parametrize("kind", TRAINING)
def test_the_cap_holds_for_every_policy_that_is_built(kind: str, target: Target) -> None:
    """A state in which each would train: not before the last update is paid for."""
    config = load_config(
        QUICKSTART,
        [
            f"adapt.policy.kind={kind}",
            "adapt.policy.max_time_share=0.25",
            "adapt.guard.kind=shadow",
            "adapt.replay.keep_finished=true",
        ],
    )
    built = build_coscheduler(config, target, make_drafter(target), None, None, NoEvents())
    would = {**PAYS, "rounds_since_update": 100, "tokens_since_update": 1000}
    would |= {
        "acceptance_shortfall": 1000,
        "last_update_seconds": 1.0,
        "requests_since_update": 100,
    }
    would |= {"seconds_earned": 1000.0}
    script = [{"serving_seconds_since_update": s} for s in (0.0, 2.9, 3.1)]
    decided = steps(built._policy, script, **would)
    assert decided[:2] == [0, 0]
    assert decided[2] > 0
