"""Many adapters, one engine: each has a co-scheduler of its own, and here a round is shared out.

The engine sees one observer. A round goes in parts to the co-schedulers of the adapters that its
requests use: each counts, learns, judges and publishes by itself, and knows nothing of the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from cosched.errors import RunFolderError, WorkloadError
from cosched.loop.counters import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from cosched.loop.roles import Sink
    from cosched.records import VerifyRound


class Request(Protocol):
    """What is known of a request when it is admitted."""

    @property
    def id(self) -> str: ...

    @property
    def tenant(self) -> str | None: ...


class Part(Protocol):
    """The co-scheduler of one adapter."""

    counters: Counters

    @property
    def version(self) -> int: ...

    @property
    def busy(self) -> bool: ...

    def on_round(self, round_: VerifyRound) -> None: ...

    def state(
        self, trains: bool = ..., with_rows: bool = ...
    ) -> tuple[Counters, int, Mapping[str, Tensor]]: ...

    def restore(self, counters: Counters, version: int, tensors: Mapping[str, Tensor]) -> None: ...


class CoschedulerPool:
    """One co-scheduler for each adapter.

    With ``tenants`` an adapter is a tenant's, in that order. Without any it is lent to one request
    at a time, and given back to the bit as it was lent: its co-scheduler resets it. ``make(i, sink)``
    makes the co-scheduler of adapter i; what it emits also tells whose it is.

    Raises:
        WorkloadError: on admission, a tenant without an adapter, or more requests than adapters.
    """

    def __init__(
        self,
        count: int,
        tenants: Sequence[str],
        make: Callable[[int, Sink], Part],
        sink: Sink,
    ) -> None:
        self._tenants = tuple(tenants)
        self._rounds = 0
        self._users: dict[str, int] = {}  # which adapter each running request uses
        names = self._tenants or range(count)
        sinks = [_AdapterEvents(self, sink, name) for name in names]
        self.parts = [make(index, events) for index, events in enumerate(sinks)]

    @property
    def version(self) -> int:
        """Publications of all adapters together: it rises by one with each of them."""
        return sum(part.version for part in self.parts)

    @property
    def rounds(self) -> int:
        return self._rounds

    @property
    def busy(self) -> bool:
        return any(part.busy for part in self.parts)

    @property
    def counters(self) -> Counters:
        """Sums over the adapters, whose own counters are ``parts``; their moving means stay theirs."""
        parts = [part.counters for part in self.parts]
        return Counters(
            rounds=self._rounds,
            committed=sum(part.committed for part in parts),
            drafted=sum(part.drafted for part in parts),
            accepted=sum(part.accepted for part in parts),
            updates=sum(part.updates for part in parts),
            draft_seconds=sum(part.draft_seconds for part in parts),
            verify_seconds=sum(part.verify_seconds for part in parts),
            update_seconds_total=sum(part.update_seconds_total for part in parts),
            background_seconds=sum(part.background_seconds for part in parts),
            publish_seconds=sum(part.publish_seconds for part in parts),
            skipped_steps=sum(part.skipped_steps for part in parts),
            finished=sum(part.finished for part in parts),
            losses=[loss for part in parts for loss in part.losses],
            guard_seconds=sum(part.guard_seconds for part in parts),
            starved=max(part.starved for part in parts),
            refused=sum(part.refused for part in parts),
            rolled_back=sum(part.rolled_back for part in parts),
            evicted=sum(part.evicted for part in parts),
            parts=parts,
        )

    def admit(self, request: Request) -> int:
        """The adapter that will serve a request, from now until it has finished."""
        if self._tenants:
            check_tenants([request], self._tenants)
            assert request.tenant is not None
            adapter = self._tenants.index(request.tenant)
        else:
            free = set(range(len(self.parts))) - set(self._users.values())
            if not free:
                raise WorkloadError(
                    f"request {request.id} has no adapter: all {len(self.parts)} are in use"
                )
            adapter = min(free)
        self._users[request.id] = adapter
        return adapter

    def on_round(self, round_: VerifyRound) -> None:
        """Called by the engine after each verification round and after each prefill."""
        self._rounds += bool(round_.blocks)  # a prefill is none
        used = {self._users[segment.request_id] for segment in round_.segments}
        for index, part in enumerate(self.parts):
            if index in used or part.busy:  # an update in the background may be done
                part.on_round(self._part_of(round_, index))
        for request_id in round_.finished:
            del self._users[request_id]

    def _part_of(self, round_: VerifyRound, adapter: int) -> VerifyRound:
        """What of a round is of one adapter; it took its requests' share of the time."""

        def mine(request_id: str) -> bool:
            return self._users[request_id] == adapter

        blocks = tuple(block for block in round_.blocks if mine(block.request_id))
        share = len(blocks) / len(round_.blocks) if round_.blocks else 0.0
        return replace(
            round_,
            segments=tuple(one for one in round_.segments if mine(one.request_id)),
            blocks=blocks,
            finished=tuple(name for name in round_.finished if mine(name)),
            draft_seconds=share * round_.draft_seconds,
            verify_seconds=share * round_.verify_seconds,
        )

    def state(
        self, trains: bool = True, with_rows: bool = False
    ) -> tuple[Counters, int, Mapping[str, Tensor]]:
        """As one co-scheduler's; the tensors of adapter i begin with its number."""
        tensors: dict[str, Tensor] = {}
        counters = self.counters
        counters.versions = [part.version for part in self.parts]
        for index, part in enumerate(self.parts):
            own = part.state(trains, with_rows)[2]
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        return counters, self.version, tensors

    def restore(self, counters: Counters, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an earlier run's ``state()``.

        Raises:
            RunFolderError: it is of another number of adapters.
        """
        del version  # the sum of those of the parts
        found = len(counters.parts), len(counters.versions)
        if set(found) != {len(self.parts)}:
            raise RunFolderError(
                f"the saved state is of {found[0]} adapters, and here are {len(self.parts)}"
            )
        self._rounds = counters.rounds
        kept = zip(self.parts, counters.parts, counters.versions, strict=True)
        for index, (part, counted, own) in enumerate(kept):
            start = f"{index}."
            mine = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            part.restore(counted, own, mine)


class _AdapterEvents:
    """The arm's events as one adapter writes them: with its name, at the arm's round and version."""

    def __init__(self, pool: CoschedulerPool, sink: Sink, adapter: str | int) -> None:
        self._pool = pool
        self._sink = sink
        self._adapter = adapter

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "publication":
            own = fields["version"]
            fields["adapter_version"] = own.version
            fields["version"] = msgspec.structs.replace(own, version=self._pool.version)
        self._sink.emit(kind, **{**fields, "round": self._pool.rounds, "adapter": self._adapter})


def check_tenants(
    requests: Iterable[Request], tenants: Sequence[str], where: str = "adapt"
) -> None:
    """Make sure that each request's tenant has an adapter; ``where`` the file names them.

    Raises:
        WorkloadError: one has none, or names no tenant; the known ones are listed.
    """
    for request in requests:
        if request.tenant not in tenants:
            whose = "names no tenant" if request.tenant is None else f"is of {request.tenant!r}"
            raise WorkloadError(
                f"a tenant without an adapter: request {request.id} {whose}; {where}.scope.tenants "
                f"has {', '.join(tenants)}"
            )
