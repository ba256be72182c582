"""A cadence that waits until it is needed."""

from cosched.protocols import Policy, PolicySettings
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES


class WhenLowSettings(PolicySettings, frozen=True, kw_only=True):
    below: float = 2.0


@POLICIES.register("when_low")
class WhenLow(Policy):
    """Trains while the acceptance length is below a mark."""

    Settings = WhenLowSettings

    def __init__(self, settings: WhenLowSettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:
        low = snapshot.recent_acceptance_length < self.settings.below
        due = snapshot.rounds_since_update >= 8
        return Decision(int(low and due), reason="acceptance is low")
