"""A cadence that follows the text, not the rounds: a good draft commits more of it in each."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cosched.protocols import PolicySettings
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES


class EveryNTokensSettings(PolicySettings, frozen=True, kw_only=True):
    """``tokens`` committed between updates, and micro-steps in each."""

    tokens: Annotated[int, Meta(ge=1)] = 64
    num_steps: Annotated[int, Meta(ge=1)] = 1


@POLICIES.register("every_n_tokens")
class EveryNTokens:
    """Trains after every ``tokens`` committed tokens."""

    Settings = EveryNTokensSettings

    def __init__(self, settings: EveryNTokensSettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:
        due = snapshot.tokens_since_update >= self.settings.tokens
        return Decision(self.settings.num_steps if due else 0, reason="enough new text")
