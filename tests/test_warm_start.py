"""The warm start: a learning rate that rises with the tokens since the loaded draft."""

from __future__ import annotations

import msgspec

from cosched.build.embedded import build_arm
from cosched.loop.counters import Counters
from cosched.records import Decision
from cosched.registry import OBJECTIVES
from cosched.testing.harness import Every
from cosched.training.trying import WithObjective
from tests.helpers.guarded_runs import Events, decode, world_of
from tests.helpers.rounds import round_of, snapshot


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
