"""What an update will make the engine wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosched.records import Snapshot


def update_seconds(snapshot: Snapshot, num_steps: int, guess_ms: float) -> float:
    """``num_steps`` micro-steps and a publication, as measured.

    ``guess_ms`` is taken for a micro-step until one has been measured.
    """
    step = snapshot.micro_step_seconds or guess_ms / 1000
    publication = snapshot.seconds_publishing / max(1, snapshot.num_updates)
    return num_steps * step + publication
