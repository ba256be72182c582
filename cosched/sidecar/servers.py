"""What the trainer knows of each server, and what it shows of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cosched.records import VerifyRound
    from cosched.sidecar.messages import Hello, Rounds


@dataclass(slots=True)
class Server:
    """One that serves, as it has said hello: a name is new with each start of a server.

    ``version`` serves there as far as is known, and ``received`` has come there; ``sent_at`` is when the
    newest went to it, and it is ``asked`` for the weights that serve until they come.
    """

    hello: Hello
    slots: list[Tensor] | None
    heard_at: float
    version: int
    received: int = 0
    sent_at: float = 0.0
    asked: bool = False
    number: int = 0
    requests: set[str] = field(default_factory=set[str])
    num_running: int = 0
    tokens_left: int | None = None
    num_queued: int = 0
    dropped: int = 0
    rounds: int = 0
    committed: int = 0
    blocks: int = 0

    @property
    def name(self) -> str:
        return self.hello.server

    def note(self, message: Rounds, round_: VerifyRound) -> None:
        """Keep what is told of it, and which of its requests run."""
        self.version, self.dropped = message.version, message.dropped
        self.num_running, self.num_queued = message.num_running, message.num_queued
        self.tokens_left = message.tokens_left
        self.requests |= {one.request_id for one in round_.segments}
        self.requests -= set(round_.finished)
        self.rounds += bool(round_.blocks)
        self.blocks += len(round_.blocks)
        self.committed += round_.num_committed


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a server stands: what serves there, and the acceptance length that it has seen in all."""

    version: int
    rounds: int
    acceptance_length: float | None
    dropped_rounds: int
    shares_memory: bool


class TrainerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the trainer stands; ``parent`` is the version that the newest was learnt from.

    A ``warning`` is of something that it goes on without: what was learnt is not saved.
    """

    version: int
    parent: int
    checksum: str
    rounds: int
    updates: int
    recent_acceptance_length: float
    refused_updates: int
    rollbacks: int
    refused_messages: int
    warning: str | None
    servers: dict[str, ServerStatus]


def statuses(servers: Iterable[Server]) -> dict[str, ServerStatus]:
    """Of each server, by its name."""
    return {
        one.name: ServerStatus(
            version=one.version,
            rounds=one.rounds,
            acceptance_length=one.committed / one.blocks if one.blocks else None,
            dropped_rounds=one.dropped,
            shares_memory=one.slots is not None,
        )
        for one in servers
    }
