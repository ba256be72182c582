"""Whether a candidate may serve, and whether what serves may stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.guard.monitor import LEAST_ROWS, Scores
from cosched.records import UpdateResult, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.guard.monitor import ShadowSettings
    from cosched.loop.counters import Totals
    from cosched.loop.roles import Buffer, Publisher, Scorer
    from cosched.records import SignalBatch

LOOKED_INTO = 4  # times as many anchors as judge an update say whether what serves may go on


class FiniteGuard:
    """Refuses an update none of whose steps was taken; DeepSpeed has skipped the non-finite ones."""

    def judge(
        self,
        result: UpdateResult,
        candidate: Mapping[str, Tensor],  # noqa: ARG002  the role's signature
        totals: Totals,  # noqa: ARG002
    ) -> Verdict:
        if result.num_skipped == result.num_steps:
            return Verdict(publish=False, reason="every step was non-finite and skipped")
        return Verdict(publish=True, reason="finite")

    def watch(
        self,
        totals: Totals,  # noqa: ARG002
        candidate: Callable[[], Mapping[str, Tensor]],  # noqa: ARG002
    ) -> Verdict | None:
        """What serves is not watched."""
        return None


class ShadowGuard:
    """Scores candidates, and what serves, on rows that no update has had; ``monitor.py`` decides.

    Without such rows (the request has just ended) a candidate waits for the next update. The last
    good version is pinned in the publisher. Updates on random labels are refused at their first
    judgement; where a gate lets everything pass, a draft that loses a token a round is undone within
    64 rounds (``tests/test_guard.py``).
    """

    def __init__(
        self, settings: ShadowSettings, scorer: Scorer, buffer: Buffer, publisher: Publisher
    ) -> None:
        self._settings = settings
        self._scorer = scorer
        self._buffer = buffer
        self._publisher = publisher

    def judge(
        self, result: UpdateResult, candidate: Mapping[str, Tensor], totals: Totals
    ) -> Verdict:
        finite = FiniteGuard().judge(result, candidate, totals)
        if not finite.publish:
            return finite
        if totals.updates % self._settings.every:
            return Verdict(publish=False, reason="to be judged with the next update")
        batch = self._buffer.held_out(self._settings.anchors, once=True)
        if batch is None:
            return Verdict(publish=False, reason="no held-out rows to score it on")
        watch, version = totals.watch, self._publisher.version
        scores = self._scores(batch, totals, candidate, watch.check_due(self._settings))
        verdict = watch.judge(scores, self._settings, totals.rounds, version)
        self._publisher.pin(watch.good)
        return verdict

    def watch(
        self, totals: Totals, candidate: Callable[[], Mapping[str, Tensor]]
    ) -> Verdict | None:
        watch, settings, round_ = totals.watch, self._settings, totals.rounds
        alarmed = watch.alarmed(settings)
        if not alarmed and not watch.overdue(settings, round_):
            return None
        most, version = LOOKED_INTO * settings.anchors, self._publisher.version
        enough = max(settings.anchors, LEAST_ROWS) if alarmed else 1
        batch = self._buffer.held_out(most, once=True, at_least=enough)
        evidence = batch is not None
        if alarmed and not evidence:  # it cannot wait for rows that were never asked for
            batch = self._buffer.held_out(most)
        if batch is None:
            return None
        waiting = candidate() if watch.trials else None
        scores = self._scores(batch, totals, waiting, waiting is None)
        if alarmed:
            verdict = watch.look_into(scores, settings, round_, version, evidence)
        else:
            verdict = watch.look(scores, settings, round_, version)
        self._publisher.pin(watch.good)
        return verdict

    def _scores(
        self,
        batch: SignalBatch,
        totals: Totals,
        candidate: Mapping[str, Tensor] | None,
        whole: bool,
    ) -> Scores:
        """On the same rows: what serves, the candidate, and if ``whole`` what it could go back to."""
        weights_of, version = self._publisher.weights_of, self._publisher.version
        good = totals.watch.good
        asked = {"serving": weights_of(version)}
        if candidate is not None:
            asked["candidate"] = candidate
        if whole:
            asked["loaded"] = weights_of(0)
            if good not in {0, version}:
                asked["good"] = weights_of(good)
        found = self._scorer.scores(batch, list(asked.values()))
        return Scores(**dict(zip(asked, found, strict=True)))
