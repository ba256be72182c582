"""Policies driven through scripted snapshots: each, and when it trains."""

from __future__ import annotations

import random

import pytest

from cosched.errors import ConfigError
from cosched.loop.counters import Counters
from cosched.settings.load import load_config
from cosched.testing.harness import Every
from schedulers.fixed import EveryNRounds, EveryNRoundsSettings
from tests.helpers.paths import QUICKSTART
from tests.helpers.policies import PAYS, TRAINING, policy, steps
from tests.helpers.rounds import round_of, snapshot

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
    "requests_since_update": 100, "acceptance_shortfall": 100, "seconds_earned_here": 100,
    "seconds_drafting": 10, "seconds_verifying": 90, "round_index": 5000, "update_gain": 1.5,
    "micro_step_seconds": 0.05, "recent_round_seconds": 0.02, "recent_acceptance_length": 2.0,
    "expected_tokens_left": 5000, "seconds_serving_here": 100,
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


def test_every_waits_for_its_rounds() -> None:
    policy = EveryNRounds(
        EveryNRoundsSettings(kind="every_n_rounds", rounds=5, num_steps=2, idle_steps=3)
    )

    def steps(rounds_since_update: int, num_running: int = 1) -> int:
        seen = snapshot(rounds_since_update=rounds_since_update, num_running=num_running)
        return policy.decide(seen).num_steps

    assert [steps(n) for n in (0, 4, 5, 9)] == [0, 0, 2, 2]
    assert [steps(n, num_running=0) for n in (0, 1, 9)] == [0, 3, 3]  # once, when all is done
    assert Every(5).decide(snapshot(rounds_since_update=5)).num_steps == 1


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


def test_drift_holds_a_round_against_those_that_drafted_as_much() -> None:
    """A policy of lengths that stops drafting is no fall of the draft; one at the new length is."""
    counters = Counters()
    threshold = policy("drift").settings.threshold_tokens
    for drafted, committed in [(4, 3), (0, 1), (2, 2)] * 100 + [(0, 1)] * 400:
        counters.observe(round_of([committed], drafted=drafted))
        assert counters.shortfall == 0
    assert counters.reference == 1
    for _ in range(60):
        counters.observe(round_of([1], drafted=2))
    assert counters.shortfall >= threshold


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


# --- goodput -------------------------------------------------------------------------------


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
