"""A trainer of which it is known how long it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cosched.records import Decision, UpdateResult, VerifyRound, WeightVersion


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
