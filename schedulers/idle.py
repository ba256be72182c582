"""What policies do when no request is running."""

from __future__ import annotations

from cosched.records import Decision, Snapshot


def when_idle(snapshot: Snapshot, num_steps: int) -> Decision:
    """Train once on what has been served since the last update: more on the same text overfits."""
    fresh = snapshot.rounds_since_update > 0
    return Decision(num_steps * fresh, reason="idle")
