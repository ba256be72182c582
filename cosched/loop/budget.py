"""Whether an update may begin: the share of the engine's time that updates may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.records import Decision

if TYPE_CHECKING:
    from cosched.protocols import Policy
    from cosched.records import Snapshot


class WithinTimeShare:
    """Any policy, which has to wait until its last update has been paid for.

    An update may begin when (1 - s) u <= s v: u seconds that the engine waited for the last one,
    publication included, v seconds of drafting and verifying since then, s the share. From the
    beginning of one update to that of any later one, updates then take at most the share s of the
    time, so a long quiet stretch saves nothing up for a burst. While no request is running nobody
    waits, and the policy is free.

    Memory needs no cap here, for it does not grow with time. Weights, moments, gradients and
    versions are a fixed number of times the draft. ``adapt.replay.max_tokens`` and ``max_bytes``
    bound what is collected, and ``window`` what is drawn of a request. The paths of an update are
    ``adapt.replay.anchors`` at most, those of scores ``LOOKED_INTO`` (``cosched.guard.guard``) times
    ``adapt.guard.anchors``; logits are held of all their rows (of scores, of one request's), or of
    ``adapt.loss.chunk_rows``.
    """

    def __init__(self, policy: Policy, max_time_share: float) -> None:
        self._policy = policy
        self._share = max_time_share

    def decide(self, snapshot: Snapshot) -> Decision:
        owed = (1 - self._share) * snapshot.update_seconds
        if snapshot.num_running and owed > self._share * snapshot.serving_seconds_since_update:
            return Decision(num_steps=0)
        return self._policy.decide(snapshot)
