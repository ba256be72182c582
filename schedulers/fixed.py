"""Fixed cadences."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cosched.protocols import Policy, PolicySettings
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from schedulers.idle import when_idle


class EveryNRoundsSettings(PolicySettings, frozen=True, kw_only=True):
    """``rounds`` between updates, and ``num_steps`` micro-steps in each.

    ``idle_steps`` are taken once when the last request has finished; that needs
    ``adapt.replay.keep_finished``, so that there is something to train on.
    """

    rounds: Annotated[int, Meta(ge=1)] = 16
    num_steps: Annotated[int, Meta(ge=1)] = 1
    idle_steps: Annotated[int, Meta(ge=0)] = 0


@POLICIES.register("every_n_rounds")
class EveryNRounds(Policy):
    """Trains after every ``rounds`` rounds, ``num_steps`` micro-steps at a time."""

    Settings = EveryNRoundsSettings

    def __init__(self, settings: EveryNRoundsSettings) -> None:
        self.settings = settings
        self.idle_steps = settings.idle_steps

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.num_running == 0:
            return when_idle(snapshot, self.idle_steps)
        if snapshot.rounds_since_update < self.settings.rounds:
            return Decision(num_steps=0)
        return Decision(self.settings.num_steps, reason=f"every {self.settings.rounds} rounds")


class EveryNTokensSettings(PolicySettings, frozen=True, kw_only=True):
    """``tokens`` committed between updates, by all requests together; ``num_steps`` in each.

    ``idle_steps`` are as those of ``every_n_rounds``.
    """

    tokens: Annotated[int, Meta(ge=1)] = 64
    num_steps: Annotated[int, Meta(ge=1)] = 1
    idle_steps: Annotated[int, Meta(ge=0)] = 0


@POLICIES.register("every_n_tokens")
class EveryNTokens(Policy):
    """Trains after every ``tokens`` committed tokens, ``num_steps`` micro-steps at a time.

    Every update then sees about as much new text, whatever the batch; counted in rounds, a full
    batch and a good draft bring more text to an update.
    """

    Settings = EveryNTokensSettings

    def __init__(self, settings: EveryNTokensSettings) -> None:
        self.settings = settings
        self.idle_steps = settings.idle_steps

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.num_running == 0:
            return when_idle(snapshot, self.idle_steps)
        if snapshot.tokens_since_update < self.settings.tokens:
            return Decision(num_steps=0)
        return Decision(self.settings.num_steps, reason=f"every {self.settings.tokens} tokens")


class EveryNRequestsSettings(PolicySettings, frozen=True, kw_only=True):
    """``requests`` that finish between updates, and ``num_steps`` micro-steps in each.

    It needs ``adapt.replay.keep_finished``; with ``adapt.replay.fresh`` beside it every request
    teaches in one update and is then forgotten.
    """

    requests: Annotated[int, Meta(ge=1)] = 8
    num_steps: Annotated[int, Meta(ge=1)] = 1


@POLICIES.register("every_n_requests")
class EveryNRequests(Policy):
    """Trains after every ``requests`` finished requests, ``num_steps`` micro-steps at a time.

    Source: Online Speculative Decoding (arXiv 2310.07177), whose code updates after every 8.
    """

    Settings = EveryNRequestsSettings
    needs_finished = True

    def __init__(self, settings: EveryNRequestsSettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.requests_since_update < self.settings.requests:
            return Decision(num_steps=0)
        return Decision(self.settings.num_steps, reason=f"every {self.settings.requests} requests")
