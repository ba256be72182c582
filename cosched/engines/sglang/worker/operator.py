"""Who asks for things while the server runs, and what is shown of how it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from cosched.records import GuardFigures
from cosched.telemetry.tally import Figures


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How the adaptation stands: for ``/cosched/status``, ``/metrics``, ``cosched top`` and ``cosched doctor``.

    ``failure`` says why training stopped for good, ``warning`` what is wrong without stopping it.
    ``dropped_rounds`` are those that a side-car did not get.
    ``rounds_by_drafted[K]`` counts the verification rounds that drafted K tokens for each request.
    ``frozen_acceptance_length`` is what the draft as loaded would have on this text, by what a guard
    scores: the recent length times the loaded draft's score over the serving one's on the same rows; None
    where nothing is scored. ``reference_acceptance_length`` is the slow mean that the recent one is
    measured against. ``alarms`` are those of ``cosched.telemetry.alarms``. Memory is this process's.
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
    frozen_acceptance_length: float | None = None
    reference_acceptance_length: float = 0.0
    round_seconds: float = 0.0  # moving mean
    num_running: int = 0
    num_queued: int = 0
    replay_tokens: int = 0
    replay_bytes: int = 0
    replay_max_bytes: int = 0
    resident_bytes: int = 0
    device_bytes: int = 0
    alarms: dict[str, str] = {}
    guard: GuardFigures | None = None
    figures: Figures = Figures()


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

    def show(self, status: Callable[[], Status], at_once: bool = False) -> None:
        """It is asked for the ``status`` when somebody is to see it: now and then, or ``at_once``."""
        ...


class NullOperator:
    """No operator."""

    def asked(self) -> list[tuple[Command, Answer]]:
        return []

    def show(self, status: Callable[[], Status], at_once: bool = False) -> None:
        pass
