"""The control: collect and count, never train."""

from __future__ import annotations

from cosched.protocols import Policy, PolicySettings
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES


@POLICIES.register("never")
class Never(Policy):
    """Never trains: the cost of watching, and the frozen control of every comparison."""

    Settings = PolicySettings
    trains = False

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings

    def decide(self, snapshot: Snapshot) -> Decision:  # noqa: ARG002  the role's signature
        return Decision(num_steps=0)
