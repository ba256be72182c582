"""What an update will make the engine wait for, and how long what comes of it will serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from cosched.protocols import PolicySettings

if TYPE_CHECKING:
    from cosched.records import Snapshot


class CostAwareSettings(PolicySettings, frozen=True, kw_only=True):
    """Of a policy that weighs what an update of ``num_steps`` micro-steps costs.

    ``step_ms`` is believed of a micro-step until one has been measured.
    """

    num_steps: Annotated[int, Meta(ge=1)] = 1
    step_ms: Annotated[float, Meta(gt=0)] = 50.0


def expected_update_seconds(snapshot: Snapshot, settings: CostAwareSettings) -> float:
    """An update and a publication, as measured."""
    step = snapshot.micro_step_seconds or settings.step_ms / 1000
    publication = snapshot.seconds_publishing / max(1, snapshot.num_updates)
    return settings.num_steps * step + publication


def expected_rounds_left(snapshot: Snapshot, gain: float = 1.0) -> float:
    """Of a running request, at ``gain`` times the recent acceptance length."""
    return snapshot.expected_tokens_left / max(1.0, gain * snapshot.recent_acceptance_length)
