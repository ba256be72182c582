"""What every policy owes: a pure function of the snapshot, made of numbers alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from cosched.testing.choosing import ChoosingContract

if TYPE_CHECKING:
    from cosched.protocols import Policy
    from cosched.registry import Plugin


class PolicyContract(ChoosingContract):
    """Every registered policy, or those in ``names``."""

    registry = POLICIES
    ask = "decide"

    def snapshot(self, seed: int) -> Snapshot:
        return random_snapshot(seed)

    def test_what_it_says_of_itself_is_so(self, case: tuple[Plugin, Any]) -> None:
        """Its capabilities are what they are declared as, and one that never trains never does."""
        plugin, settings = case
        policy: Policy = plugin.cls(settings)
        said = (policy.trains, policy.needs_scores, policy.needs_finished)
        assert all(isinstance(one, bool) for one in said)
        assert isinstance(policy.idle_steps, int)
        assert policy.idle_steps >= 0
        decisions = [policy.decide(random_snapshot(seed)) for seed in range(500)]
        assert policy.trains or not any(decision.num_steps for decision in decisions)

    def test_decisions_make_sense(self, case: tuple[Plugin, Any]) -> None:
        """Steps are not negative, a learning rate is positive, and training is explained."""
        plugin, settings = case
        policy: Policy = plugin.cls(settings)
        for seed in range(500):
            decision = policy.decide(random_snapshot(seed))
            assert isinstance(decision, Decision)
            assert decision.num_steps >= 0
            assert decision.learning_rate is None or decision.learning_rate > 0
            assert decision.reason or not decision.num_steps


def random_snapshot(seed: int, num_experts: int = 2) -> Snapshot:
    """A state that a run might be in; zeros now and then, as at its start."""
    draw = random.Random(seed)
    rounds = draw.choice([0, draw.randrange(10), draw.randrange(100_000)])
    drafted = 4 * rounds
    accepted = draw.randint(0, drafted)
    committed = rounds + accepted
    updates = draw.randint(0, rounds)
    trials = draw.choice([0, draw.randint(0, updates)])
    return Snapshot(
        round_index=rounds,
        num_running=draw.randrange(64),
        num_committed=committed,
        num_drafted=drafted,
        num_accepted=accepted,
        recent_acceptance_length=draw.uniform(1, 5) if rounds else 0.0,
        rounds_since_update=draw.randint(0, rounds),
        tokens_since_update=draw.randint(0, committed),
        num_updates=updates,
        draft_version=draw.randint(0, updates),
        buffered_tokens=draw.choice([0, draw.randrange(65_536)]),
        seconds_drafting=draw.uniform(0, 100),
        seconds_verifying=draw.uniform(0, 1000),
        seconds_updating=draw.uniform(0, 100) if updates else 0.0,
        seconds_publishing=draw.uniform(0, 10) if updates else 0.0,
        recent_round_seconds=draw.uniform(0.001, 1) if rounds else 0.0,
        reference_acceptance_length=draw.uniform(1, 5) if rounds else 0.0,
        acceptance_shortfall=draw.choice([0.0, draw.uniform(0, 100)]) if rounds else 0.0,
        last_update_seconds=draw.uniform(0, 2) if updates else 0.0,
        serving_seconds_since_update=draw.uniform(0, 100),
        micro_step_seconds=draw.uniform(0, 0.5) if updates > 2 else 0.0,
        update_gain=draw.uniform(0.8, 1.3) if updates > 1 else 1.0,
        expected_tokens_left=draw.uniform(0, 5000) if rounds else 0.0,
        forgets=draw.random() < 0.5,
        updates_since_reset=draw.randint(0, updates),
        seconds_earned=(earned := draw.uniform(0, 100) if updates else 0.0),
        seconds_serving_here=draw.uniform(0, 1000),
        seconds_learning_here=draw.uniform(0, 100) if updates else 0.0,
        seconds_earned_here=draw.uniform(0, earned),
        level=draw.randrange(5),
        recent_drafted_tokens=draw.uniform(0, 8) if rounds else 0.0,
        num_queued=draw.choice([0, draw.randrange(100)]),
        num_finished=(finished := draw.choice([0, draw.randrange(1000)])),
        requests_since_update=draw.randint(0, finished),
        tokens_since_loaded=draw.randint(0, committed),
        updates_since_trial=draw.randint(0, updates),
        serves_loaded=draw.random() < 0.5,
        pause_rounds=draw.choice([0, 0, draw.randrange(512)]),
        lead_tokens=draw.choice([0.0, draw.uniform(0, 2)]),
        num_trials=trials,
        trials=tuple(
            tuple(draw.gauss(0, 0.1) for _ in range(num_experts)) for _ in range(min(trials, 64))
        ),
    )
