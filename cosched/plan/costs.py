"""What rounds, updates and hand-overs take, for one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosched.errors import ConfigError
from cosched.plan.figures import Figure, missing
from cosched.plan.learning_costs import cadence, exposed, first_version, per_version, updates
from cosched.plan.run import round_costs

if TYPE_CHECKING:
    from cosched.plan.run import Run
    from cosched.plan.subject import Subject

# benchmarks/bench_sidecar.py on two cores: 16.8 MB are copied in 1.3 ms, and taken in 3.2 ms later.
COPY_BYTES_PER_S, INTAKE_BYTES_PER_S = 13e9, 5.2e9
# Of a round besides, in Python: 0.06 and 0.12 ms (benchmarks/bench_plan.py intake), and a share for the socket.
HANDOVER_S, INTAKE_S = 1e-4, 2e-4
SOCKET_GB_PER_S, NETWORK_GB_PER_S = 2.0, 1.25  # a socket of one machine; 10 Gbit/s
PUBLISH_BYTES_PER_S = 1e9  # of weights that a server reads, copies and checks


@dataclass(frozen=True, slots=True)
class Costs:
    """In seconds, and bytes a second. ``update`` has rows of one request, ``update_of_many`` as many as fit."""

    round: Figure
    prefill: Figure
    cadence: Figure
    update: Figure
    update_of_many: Figure
    per_version: Figure
    first_version: Figure
    publish: Figure
    exposed: Figure
    handover: Figure
    intake: Figure
    link_in: Figure
    link_out: Figure

    def update_seconds(self, requests: float, most: int) -> float:
        """An update with rows of so many requests, of ``most`` at most: each adds its context."""
        if most <= 1:
            return self.update.value
        share = (min(max(requests, 1.0), most) - 1) / (most - 1)
        return self.update.value + share * (self.update_of_many.value - self.update.value)

    def by_name(self, elsewhere: bool, by_tokens: bool) -> dict[str, Figure]:
        """Those that count where a trainer of its own learns, or none."""
        both = {
            "a round": self.round,
            "a prefill": self.prefill,
            f"{'tokens' if by_tokens else 'rounds'} from update to update": self.cadence,
            "an update, rows of one request": self.update,
            "an update, rows of most": self.update_of_many,
            "updates a version": self.per_version,
            "updates before the first": self.first_version,
            "a publication": self.publish,
        }
        if not elsewhere:
            return both | {"what decoding waits for an update": self.exposed}
        return both | {
            "handing a round over": self.handover,
            "taking a round in": self.intake,
            "link to the trainer": self.link_in,
            "link to the servers": self.link_out,
        }


def costs_of(subject: Subject, run: Run | None, tau: float) -> Costs:
    """Everything that a simulation is made of, of rounds that commit so many tokens a request.

    Raises:
        ConfigError: something is known neither from a run nor from what is given.
    """
    given, message = subject.asked.link_gb_per_s, subject.message_bytes(tau)
    update, update_of_many = updates(subject, run)
    round_, publish = _round(subject, run), _publish(subject, run)
    return Costs(
        round=round_,
        prefill=_prefill(subject, run, round_),
        cadence=cadence(subject.config, run),
        update=update,
        update_of_many=update_of_many,
        per_version=per_version(subject.config, run),
        first_version=first_version(run),
        publish=publish,
        exposed=exposed(subject, run, update, publish),
        handover=_handover(subject, run, message),
        intake=_intake(subject, message),
        link_in=_link(subject, given, rows=True),
        link_out=_link(subject, given, rows=False),
    )


def _round(subject: Subject, run: Run | None) -> Figure:
    asked, requests = subject.asked, subject.requests
    if asked.round_seconds is not None:
        return Figure(asked.round_seconds, "given", "plan.round_seconds")
    if (roofline := subject.roofline) is not None:
        seconds = roofline.round_seconds(requests, subject.context)
        return Figure(seconds, "counted", f"bytes and operations on {asked.device}")
    if run is None:
        raise missing("round_seconds", "a round")
    return _of_requests(run, requests).times(asked.round_factor, "by plan.round_factor")


def _of_requests(run: Run, requests: int) -> Figure:
    """A measured round of so many requests; what more of them take is told by rounds of fewer."""
    fixed, each = round_costs(run, run.control)
    why = f"rounds of {run.control}"
    if not np.isnan(each):
        why += f", {1e3 * fixed:.3g} + {1e3 * each:.3g} ms a request"
        if requests <= run.max_batch:
            return Figure(fixed + each * requests, "measured", why)
        return Figure(
            fixed + each * requests, "scaled", f"{why}; the run had {run.max_batch} at most"
        )
    if abs(run.requests - requests) <= 0.1 * requests:
        return Figure(fixed, "measured", why)
    raise ConfigError(
        f"plan.requests: {requests} at once, and all rounds of {run.folder} were of {run.requests:.3g}: what "
        f"others take is not known; run one with engine.max_batch={requests}, or give plan.round_seconds, or "
        f"plan.device"
    )


def _prefill(subject: Subject, run: Run | None, round_: Figure) -> Figure:
    """Of a request. Where it was not measured, a round: a short prompt is read in one pass too."""
    if run is None or subject.asked.device is not None:
        return Figure(round_.value, "assumed", "as a round")
    record = run.arms[run.control]
    seconds = record.seconds("prefill") / len(record.rounds)
    return Figure(seconds, "measured", "of a request").times(
        subject.asked.round_factor, "by plan.round_factor"
    )


def _publish(subject: Subject, run: Run | None) -> Figure:
    asked = subject.asked
    if asked.publish_seconds is not None:
        return Figure(asked.publish_seconds, "given", "plan.publish_seconds")
    if (roofline := subject.roofline) is not None:
        return Figure(roofline.publish_seconds, "counted", f"bytes on {asked.device}")
    measured = None if run is None else run.arms[run.arm].mean_publish_seconds
    if measured is None:
        return Figure(subject.version_bytes / PUBLISH_BYTES_PER_S, "assumed", "1 GB/s of weights")
    return Figure(measured, "measured", "of a version, on a server")


def _handover(subject: Subject, run: Run | None, message: float) -> Figure:
    asked = subject.asked
    if asked.handover_seconds is not None:
        return Figure(asked.handover_seconds, "given", "plan.handover_seconds")
    if run is not None and run.elsewhere and run.max_batch == subject.requests:
        arm = run.arms[run.arm]
        messages = arm.batches(run.max_batch) + len(arm.rounds)
        why = "of a round, in the thread that decodes"
        return Figure(arm.seconds("update") / messages, "measured", why)
    seconds = HANDOVER_S + message / COPY_BYTES_PER_S
    return Figure(
        seconds, "assumed", f"of a round: {1e3 * HANDOVER_S:.2g} ms, and a copy at 13 GB/s"
    )


def _intake(subject: Subject, message: float) -> Figure:
    if subject.asked.intake_seconds is not None:
        return Figure(subject.asked.intake_seconds, "given", "plan.intake_seconds")
    seconds = INTAKE_S + message / INTAKE_BYTES_PER_S
    return Figure(seconds, "assumed", f"of a round: {1e3 * INTAKE_S:.2g} ms, and 5.2 GB/s")


def _link(subject: Subject, given: float | None, rows: bool) -> Figure:
    """Bytes a second; rows of servers on the trainer's machine lie in memory that both see."""
    if given is not None:
        return Figure(1e9 * given, "given", "plan.link_gb_per_s")
    address = subject.config.adapt.sidecar.address or ""
    if address.startswith("tcp://"):
        return Figure(1e9 * NETWORK_GB_PER_S, "assumed", "10 Gbit/s")
    if rows:
        return Figure(np.inf, "counted", "shared memory: the copy is in handing over")
    return Figure(1e9 * SOCKET_GB_PER_S, "assumed", "a socket of one machine")
