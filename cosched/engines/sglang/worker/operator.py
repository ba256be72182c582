"""Who asks for things while the server runs, and what is shown of how it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How the adaptation stands: for ``/cosched/status``, ``/metrics`` and ``cosched doctor``.

    ``failure`` says why training stopped for good, ``warning`` what is wrong without stopping it.
    ``dropped_rounds`` are those that a side-car did not get.
    ``rounds_by_drafted[K]`` counts the verification rounds that drafted K tokens for each request.
    """

    algorithm: str
    adapting: bool
    failure: str | None
    warning: str | None
    draft_version: int
    rounds: int
    acceptance_length: float | None
    recent_acceptance_length: float
    updates: int
    skipped_steps: int
    starved_decisions: int
    update_seconds: float
    background_seconds: float
    publish_seconds: float
    draft_seconds: float
    verify_seconds: float
    last_loss: float | None
    refused_updates: int = 0
    rollbacks: int = 0
    guard_seconds: float = 0.0
    evicted_requests: int = 0
    dropped_rounds: int = 0
    rounds_by_drafted: tuple[int, ...] = ()


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asked for; ``answer`` is called once, with a status or an error message."""

    verb: str
    version: int | None = None
    path: str | None = None


Answer = Callable[[Status | str], None]


class Operator(Protocol):
    """Who asks for things while the server runs, and is shown how it stands."""

    def asked(self) -> list[tuple[Command, Answer]]:
        """What has been asked for since; never waits. Ranks but the first are asked nothing."""
        ...

    def show(self, status: Status) -> None: ...


class NullOperator:
    """No operator."""

    def asked(self) -> list[tuple[Command, Answer]]:
        return []

    def show(self, status: Status) -> None:
        pass
