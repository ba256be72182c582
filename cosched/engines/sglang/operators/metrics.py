"""cosched's figures on SGLang's ``/metrics`` page, through the files that its processes share.

Names go by Prometheus' conventions: a prefix, base units in plural, ``_total`` for what only rises, no
unit that a label could change. Every label has a set of values that is bounded: a server that publishes
a thousand versions must not have a thousand series, so drafts are told by their ``age``, the number of
versions since, and their version is a value.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cosched.telemetry.alarms import ALARMS
from cosched.telemetry.tally import VERSIONS_KEPT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.engines.sglang.worker.operator import Status

PREFIX = "cosched_"
TIMES = ("draft", "verify", "update", "publish", "guard", "background")


class Metric(NamedTuple):
    """One metric: its name behind the prefix, what it is, and the label it has beside ``model_name``."""

    name: str
    kind: Literal["gauge", "counter"]
    about: str
    label: str | None = None

    @property
    def shown_as(self) -> str:
        """The name of its series on the page."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


METRICS = (
    Metric("adapting", "gauge", "1 while the draft learns."),
    Metric("failed", "gauge", "1 when training has stopped for good; see /cosched/status."),
    Metric("warned", "gauge", "1 when something is wrong that did not stop training."),
    Metric("alarm", "gauge", "1 while there is that alarm; see /cosched/status.", "alarm"),
    Metric("draft_version", "gauge", "Version that serves; one more with every publication."),
    Metric(
        "acceptance_length_tokens",
        "gauge",
        "Committed by a request in a round, pooled since start.",
    ),
    Metric("recent_acceptance_length_tokens", "gauge", "The same, a moving average over rounds."),
    Metric("frozen_acceptance_length_tokens", "gauge", "Estimate of it with the draft as loaded."),
    Metric("reference_acceptance_length_tokens", "gauge", "Its slow moving average."),
    Metric("last_loss", "gauge", "Loss of the newest update."),
    Metric("starved_decisions", "gauge", "Decisions in a row that found nothing to train on."),
    Metric("guard_log_wealth", "gauge", "Evidence of a guard's test, natural logarithm.", "test"),
    Metric("guard_log_wealth_bound", "gauge", "What it rejects at: then the guard acts.", "test"),
    Metric("guard_lead_tokens", "gauge", "What was learnt scores so much above the loaded draft."),
    Metric("running_requests", "gauge", "Requests in the newest round."),
    Metric("queued_requests", "gauge", "Requests that wait for a place."),
    Metric("replay_tokens", "gauge", "Rows in the replay buffer."),
    Metric("replay_bytes", "gauge", "Bytes that are reserved in it."),
    Metric("replay_limit_bytes", "gauge", "Bytes that it may take."),
    Metric("resident_memory_bytes", "gauge", "Host memory of the scheduler process."),
    Metric("device_memory_bytes", "gauge", "Device memory that its tensors take."),
    Metric("version_number", "gauge", "Draft version, by how many came after it.", "age"),
    Metric("version_request_rounds", "gauge", "Request rounds that it served.", "age"),
    Metric("version_acceptance_length_tokens", "gauge", "Its acceptance length, pooled.", "age"),
    Metric("rounds", "counter", "Verification rounds of a batch."),
    Metric("rounds_by_drafted", "counter", "The same, by tokens drafted for a request.", "tokens"),
    Metric("request_rounds", "counter", "Rounds of a request, by generated position.", "depth"),
    Metric("committed_tokens", "counter", "Tokens committed in them, bonus included.", "depth"),
    Metric("reached_drafts", "counter", "Drafts judged with all before them accepted.", "place"),
    Metric("accepted_drafts", "counter", "Those of them that were accepted.", "place"),
    Metric("updates", "counter", "Updates of the draft."),
    Metric("skipped_steps", "counter", "Training steps skipped because they were not finite."),
    Metric("refused_updates", "counter", "Updates that were scored and did not serve."),
    Metric("rollbacks", "counter", "Times that an earlier version was served again."),
    Metric("evicted_requests", "counter", "Requests dropped from the replay buffer for room."),
    Metric("dropped_rounds", "counter", "Rounds that a side-car trainer did not get."),
    Metric("time_seconds", "counter", "Time spent, by what on.", "kind"),
)

Sample = tuple[str, str | None, float]
"""The name of a metric, the value of its label, and its own."""


def samples(status: Status) -> Iterator[Sample]:
    """All that a status says."""
    yield "adapting", None, status.adapting
    yield "failed", None, status.failure is not None
    yield "warned", None, status.warning is not None
    for name in ALARMS:
        yield "alarm", name, name in status.alarms
    plain = {
        "draft_version": status.draft_version,
        "acceptance_length_tokens": status.acceptance_length,
        "recent_acceptance_length_tokens": status.recent_acceptance_length,
        "frozen_acceptance_length_tokens": status.frozen_acceptance_length,
        "reference_acceptance_length_tokens": status.reference_acceptance_length,
        "last_loss": status.last_loss,
        "starved_decisions": status.starved_decisions,
        "running_requests": status.num_running,
        "queued_requests": status.num_queued,
        "replay_tokens": status.replay_tokens,
        "replay_bytes": status.replay_bytes,
        "replay_limit_bytes": status.replay_max_bytes,
        "resident_memory_bytes": status.resident_bytes,
        "device_memory_bytes": status.device_bytes,
        "rounds": status.rounds,
        "updates": status.updates,
        "skipped_steps": status.skipped_steps,
        "refused_updates": status.refused_updates,
        "rollbacks": status.rollbacks,
        "evicted_requests": status.evicted_requests,
        "dropped_rounds": status.dropped_rounds,
    }
    yield from ((name, None, value) for name, value in plain.items() if value is not None)
    for kind in TIMES:
        yield "time_seconds", kind, getattr(status, f"{kind}_seconds")
    for tokens, number in enumerate(status.rounds_by_drafted):
        yield "rounds_by_drafted", str(tokens), number
    yield from _of_guard(status)
    yield from _of_rounds(status)


def _of_guard(status: Status) -> Iterator[Sample]:
    if (guard := status.guard) is None:
        return
    for test in ("better", "worse"):
        yield "guard_log_wealth", test, getattr(guard, test)
        yield "guard_log_wealth_bound", test, getattr(guard, f"{test}_bound")
    if guard.lead_tokens is not None:
        yield "guard_lead_tokens", None, guard.lead_tokens


def _of_rounds(status: Status) -> Iterator[Sample]:
    figures = status.figures
    for depth in figures.depths:
        yield "request_rounds", depth.label, depth.rounds
        yield "committed_tokens", depth.label, depth.committed
    for number, place in enumerate(figures.total.places, 1):
        yield "reached_drafts", str(number), place.reached
        yield "accepted_drafts", str(number), place.accepted
    trained = [one for one in figures.versions if one.version]
    ages = [(str(age), one) for age, one in enumerate(reversed(trained[-VERSIONS_KEPT:]))]
    ages += [("loaded", one) for one in figures.versions if not one.version]
    for age, one in ages:
        yield "version_number", age, one.version
        yield "version_request_rounds", age, one.rounds
        yield "version_acceptance_length_tokens", age, one.committed / one.rounds


class Metrics:
    """Shows statuses as metrics; made in the one scheduler process that reports.

    Of several data-parallel replicas each does, with its number as ``dp_rank``, as SGLang's own metrics have.
    """

    def __init__(self, model_name: str, replica: int | None = None, registry: Any = None) -> None:
        # Imported here: it reads PROMETHEUS_MULTIPROC_DIR, which SGLang sets before it starts us.
        from prometheus_client import REGISTRY, Counter, Gauge

        self._common = {"model_name": model_name}
        if replica is not None:
            self._common["dp_rank"] = str(replica)
        self._counted: dict[tuple[str, str | None], float] = {}
        self._children: dict[tuple[str, str | None], Any] = {}
        self._counters = {one.name for one in METRICS if one.kind == "counter"}
        self._metrics: dict[str, Any] = {}
        for one in METRICS:
            name = f"{PREFIX}{one.name}"
            labels = (*self._common, *([] if one.label is None else [one.label]))
            where: dict[str, Any] = {"registry": registry or REGISTRY}
            self._metrics[one.name] = (
                Counter(name, one.about, labels, **where)
                if one.kind == "counter"
                else Gauge(name, one.about, labels, multiprocess_mode="mostrecent", **where)
            )

    def show(self, status: Status) -> None:
        """What is not known any more is shown as such: a gauge would keep what it was, and raise alerts."""
        gone = {key for key in self._children if key[0] not in self._counters}
        for name, label, value in samples(status):
            child = self._child(name, label)
            gone.discard((name, label))
            if name in self._counters:
                self._count((name, label), child, value)
            else:
                child.set(value)
        for key in gone:
            self._children[key].set(math.nan)

    def _child(self, name: str, label: str | None) -> Any:
        """The series; kept, because to look one up by its labels costs more than to set it."""
        child = self._children.get((name, label))
        if child is None:
            values = [*self._common.values(), *([] if label is None else [label])]
            child = self._children[name, label] = self._metrics[name].labels(*values)
        return child

    def _count(self, key: tuple[str, str | None], counter: Any, total: float) -> None:
        """Counters only rise: what came since the last status is added."""
        if more := max(0.0, total - self._counted.get(key, 0.0)):
            counter.inc(more)
        self._counted[key] = total
