"""cosched's figures on SGLang's ``/metrics`` page, through the files that its processes share."""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosched.engines.sglang.worker.operator import Status

GAUGES = {
    "draft_version": "Version of the draft that serves; rises by one with every publication.",
    "acceptance_length": "Tokens committed per request and round, bonus included, pooled.",
    "recent_acceptance_length": "The same, as a moving average over rounds.",
    "starved_decisions": "Decisions in a row that found nothing to train on.",
    "last_loss": "Loss of the newest update.",
}
COUNTERS = {
    "rounds": "Verification rounds.",
    "updates": "Updates of the draft.",
    "skipped_steps": "Training steps that were skipped because a loss or gradient was not finite.",
    "refused_updates": "Updates that were scored and did not serve.",
    "rollbacks": "Times that an earlier version was served again, by the guard or by hand.",
    "evicted_requests": "Requests whose rows were dropped from the replay buffer for want of room.",
    "dropped_rounds": "Rounds that a side-car trainer did not get.",
}
KINDS = ("draft", "verify", "update", "publish", "guard", "background")


class Metrics:
    """Shows statuses as metrics; made in the one scheduler process that reports."""

    def __init__(self, model_name: str) -> None:
        # Imported here: it reads PROMETHEUS_MULTIPROC_DIR, which SGLang sets before it starts us.
        from prometheus_client import Counter, Gauge

        self._counted: dict[str, float] = {}
        labels = ("model_name",)

        def gauge(name: str, documentation: str) -> Any:
            made = Gauge(f"cosched:{name}", documentation, labels, multiprocess_mode="mostrecent")
            return made.labels(model_name)

        def counter(name: str, documentation: str) -> Any:
            return Counter(f"cosched:{name}", documentation, labels).labels(model_name)

        self._gauges = {name: gauge(name, text) for name, text in GAUGES.items()}
        self._adapting = gauge("adapting", "1 while the draft learns.")
        self._failed = gauge("failed", "1 when training stopped for good; see /cosched/status.")
        self._warned = gauge("warned", "1 when something is wrong; see /cosched/status.")
        self._counters = {name: counter(name, text) for name, text in COUNTERS.items()}
        seconds = Counter("cosched:seconds", "Time spent, by what on.", (*labels, "kind"))
        self._seconds = {kind: seconds.labels(model_name, kind) for kind in KINDS}
        about = "Verification rounds, by how many tokens they drafted for each request."
        rounds = Counter("cosched:rounds_by_drafted", about, (*labels, "tokens"))
        self._of_length = functools.partial(rounds.labels, model_name)

    def show(self, status: Status) -> None:
        for name, gauge in self._gauges.items():
            value = getattr(status, name)
            if value is not None:
                gauge.set(value)
        self._adapting.set(status.adapting)
        self._failed.set(status.failure is not None)
        self._warned.set(status.warning is not None)
        for name, counter in self._counters.items():
            self._count(name, counter, getattr(status, name))
        for kind, counter in self._seconds.items():
            self._count(kind, counter, getattr(status, f"{kind}_seconds"))
        for tokens, total in enumerate(status.rounds_by_drafted):
            self._count(f"drafted {tokens}", self._of_length(tokens), total)

    def _count(self, name: str, counter: Any, total: float) -> None:
        """Counters only rise: what came since the last status is added."""
        counter.inc(max(0.0, total - self._counted.get(name, 0.0)))
        self._counted[name] = total
