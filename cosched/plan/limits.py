"""How many servers one trainer reaches: for each thing that it has one of, when that is full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cosched.sidecar.service import MOST_SERVERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cosched.plan.costs import Costs
    from cosched.plan.subject import Subject

MOST = 65536  # servers that are looked at


class Limit(msgspec.Struct, frozen=True):
    """``servers`` is the first number that is too many; None: more than are looked at."""

    what: str
    servers: int | None
    then: str


def limits_of(subject: Subject, costs: Costs, rounds_per_s: float, tau: float) -> list[Limit]:
    """What is full first comes first; of servers that do so many rounds a second.

    Each thing is loaded as if nothing before it were full. Without a trainer of its own no server
    loads another.
    """
    if not subject.elsewhere:
        return []
    servers = np.arange(1, MOST + 1, dtype=np.float64)
    requests = servers * subject.requests
    committed = tau * subject.requests
    by_tokens = subject.config.policy_settings.kind == "every_n_tokens"
    wanted = servers * rounds_per_s * (committed if by_tokens else 1.0) / costs.cadence.value
    update = np.array([costs.update_seconds(one, subject.most_sampled) for one in requests])
    made = np.minimum(wanted, 1 / np.maximum(update, 1e-12))
    message = subject.message_bytes(tau)
    weights = servers * subject.version_bytes * made / costs.per_version.value
    loads: dict[str, tuple[NDArray[np.float64], str]] = {
        "training": (
            wanted * update,
            "the trainer is never idle: updates come later than adapt.policy says, and of more text each",
        ),
        "taking rounds in": (
            servers * rounds_per_s * costs.intake.value,
            "queues fill up and the oldest rounds are dropped; decoding does not wait",
        ),
        "link to the trainer": (
            servers * rounds_per_s * message / costs.link_in.value,
            "queues fill up and the oldest rounds are dropped; decoding does not wait",
        ),
        "link to the servers": (
            weights / costs.link_out.value,
            "versions are passed over: each server gets the newest when its turn comes",
        ),
        "replay buffer": (
            requests / subject.room,
            "rows of requests go before they are trained on (adapt.memory.max_bytes, max_tokens)",
        ),
        "servers of a trainer": (servers / MOST_SERVERS, "it refuses more"),
    }
    found = [Limit(what, _first(load), then) for what, (load, then) in loads.items()]
    return sorted(found, key=lambda one: (one.servers is None, one.servers or 0))


def _first(load: NDArray[np.float64]) -> int | None:
    """The first number of servers at which that is more than full."""
    full = np.flatnonzero(load > 1.0)
    return int(full[0]) + 1 if len(full) else None
