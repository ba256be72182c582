"""Whether an update may begin, and whether its candidate may serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.records import Decision, UpdateResult, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from cosched.protocols import Policy
    from cosched.records import Snapshot


class WithinTimeShare:
    """Any policy, which has to wait until its last update has been paid for.

    An update may begin when (1 - s) u <= s v: u seconds that the engine waited for the last one,
    publication included, v seconds of drafting and verifying since then, s the share. From the
    beginning of one update to that of any later one, updates then take at most the share s of the
    time, so a long quiet stretch saves nothing up for a burst. While no request is running nobody
    waits, and the policy is free. What training takes of memory needs no cap here: it is allocated
    once, and rows are bounded by ``adapt.replay``.
    """

    def __init__(self, policy: Policy, max_time_share: float) -> None:
        self._policy = policy
        self._share = max_time_share

    def decide(self, snapshot: Snapshot) -> Decision:
        owed = (1 - self._share) * snapshot.update_seconds
        if snapshot.num_running and owed > self._share * snapshot.serving_seconds_since_update:
            return Decision(num_steps=0)
        return self._policy.decide(snapshot)


class FiniteGuard:
    """Refuses an update none of whose steps was taken; DeepSpeed has skipped the non-finite ones."""

    def judge(self, result: UpdateResult, candidate: Mapping[str, Tensor]) -> Verdict:  # noqa: ARG002
        if result.num_skipped == result.num_steps:
            return Verdict(publish=False, reason="every step was non-finite and skipped")
        return Verdict(publish=True, reason="finite")
