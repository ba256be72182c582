"""A cadence that follows the text, not the rounds."""

from cosched.protocols import PolicySettings
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES


class EveryNTokensSettings(PolicySettings, frozen=True, kw_only=True):
    tokens: int = 64


@POLICIES.register("every_n_tokens")
class EveryNTokens:
    """Trains after every ``tokens`` committed tokens."""

    Settings = EveryNTokensSettings

    def __init__(self, settings: EveryNTokensSettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:
        due = snapshot.tokens_since_update >= self.settings.tokens
        return Decision(int(due), reason="enough new text")
