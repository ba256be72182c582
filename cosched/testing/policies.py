"""What every policy owes: a pure function of the snapshot, made of numbers alone."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest

from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from cosched.testing.registered import registered

if TYPE_CHECKING:
    from cosched.protocols import Policy
    from cosched.registry import Plugin

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "deepspeed"):
    sys.modules[name] = None  # importing it raises
import importlib, msgspec
module, name, ask, home, seen = sys.argv[1:]
cls = getattr(importlib.import_module(module), name)
settings, snapshot = msgspec.json.decode(sys.stdin.buffer.read(), type=list[msgspec.Raw])
snapshot = msgspec.json.decode(snapshot, type=getattr(importlib.import_module(home), seen))
getattr(cls(msgspec.json.decode(settings, type=cls.Settings)), ask)(snapshot)
"""


class PolicyContract:
    """Every registered policy, or those in ``names``."""

    names: ClassVar[tuple[str, ...] | None] = None

    def settings(self, plugin: Plugin) -> list[Any]:
        """What to test a policy with; override it where a policy has settings worth more cells."""
        return [plugin.cls.Settings(kind=plugin.name)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases = [
            pytest.param((plugin, settings), id=f"{plugin.name}{number or ''}")
            for plugin in registered(POLICIES, self.names)
            for number, settings in enumerate(self.settings(plugin))
        ]
        metafunc.parametrize("case", cases)

    def test_it_is_pure(self, case: tuple[Plugin, Any]) -> None:
        """The same snapshot gives the same decision, whatever was asked before and of whom."""
        plugin, settings = case
        assert plugin.summary
        policy: Policy = plugin.cls(settings)
        snapshots = [random_snapshot(seed) for seed in range(200)]
        decisions = [policy.decide(snapshot) for snapshot in snapshots]
        assert [policy.decide(snapshot) for snapshot in reversed(snapshots)] == decisions[::-1]
        other: Policy = plugin.cls(settings)
        assert [other.decide(snapshot) for snapshot in snapshots[100:]] == decisions[100:]

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

    def test_it_does_without_a_tensor_library(self, case: tuple[Plugin, Any]) -> None:
        """It is imported and decides where neither torch nor numpy can be imported."""
        ask_without_torch(*case, "decide", random_snapshot(0))


def ask_without_torch(plugin: Plugin, settings: Any, ask: str, snapshot: msgspec.Struct) -> None:
    """Make a plugin of these settings in a process of its own, and ask it about a snapshot."""
    classes = plugin.cls, type(snapshot)
    one, other = ([cls.__module__, cls.__qualname__] for cls in classes)
    words = [*one, ask, *other]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        input=msgspec.json.encode([settings, snapshot]),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr.decode()


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
        seconds_earned=draw.uniform(0, 100) if updates else 0.0,
        num_queued=draw.choice([0, draw.randrange(100)]),
        num_finished=(finished := draw.choice([0, draw.randrange(1000)])),
        requests_since_update=draw.randint(0, finished),
        tokens_since_loaded=draw.randint(0, committed),
        updates_since_trial=draw.randint(0, updates),
        serves_loaded=draw.random() < 0.5,
        pause_rounds=draw.choice([0, 0, draw.randrange(512)]),
        num_trials=trials,
        trials=tuple(
            tuple(draw.gauss(0, 0.1) for _ in range(num_experts)) for _ in range(min(trials, 64))
        ),
    )
