"""What updates may cost, whatever the policy says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.records import Decision

if TYPE_CHECKING:
    from cosched.loop.roles import Decider
    from cosched.records import Snapshot


class WithinTimeShare:
    """Any policy, which has to wait until its last update has been paid for, and a pause is over.

    An update may begin when (1 - s) u <= s v: u seconds that the engine waited for the last one,
    publication included, v seconds of drafting and verifying since then, s the share. From the
    beginning of one update to that of any later one, updates then take at most the share s of the
    time, so a long quiet stretch saves nothing up for a burst. While no request is running nobody
    waits, and the policy is free. A guard that has undone a publication wants a pause
    (``Snapshot.pause_rounds``): until it is over nothing is trained, running requests or not.

    Memory needs no cap here, for it does not grow with time. Weights, moments, gradients and
    versions are a fixed number of times the draft. ``adapt.memory.max_tokens`` and ``max_bytes``
    bound what is collected, and ``adapt.replay.window`` what is drawn of a request. The paths of an update are
    ``adapt.replay.anchors`` at most, those of scores ``cosched.guard.guard.LOOKED_AT`` times
    ``adapt.guard.anchors``; logits are held of all their rows (of scores, of one request's), or of
    ``adapt.memory.chunk_rows``.
    """

    def __init__(self, policy: Decider, max_time_share: float) -> None:
        self._policy = policy
        self._share = max_time_share

    def decide(self, snapshot: Snapshot) -> Decision:
        owed = (1 - self._share) * snapshot.last_update_seconds
        unpaid = owed > self._share * snapshot.serving_seconds_since_update
        if snapshot.pause_rounds or (snapshot.num_running and unpaid):
            return Decision(num_steps=0)
        return self._policy.decide(snapshot)
