"""What the guard remembers and concludes: scores and acceptance lengths in, verdicts out.

Numbers only: no model, no clock. The tests behind every verdict are those of ``statistics``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cosched.guard.statistics import Evidence, Fall, Lead, blocks, mean
from cosched.records import Standing, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.protocols import ShadowSettings
    from cosched.records import Action, Snapshot

UNHURRIED = 4  # times as long between looks while the loaded draft serves: nothing can do harm
LONGEST_PAUSE = 32  # times ``check_rounds``: text may change, and then there is much to learn


@dataclass(frozen=True, slots=True)
class Scores:
    """Expected acceptance lengths row by row, of several drafts on the same rows.

    ``candidate`` is None where none waits, ``loaded``, the draft as loaded, where that is what serves.
    """

    serving: Sequence[float]
    candidate: Sequence[float] | None = None
    loaded: Sequence[float] | None = None

    def verdict(self, action: Action, reason: str, to: int | None = None) -> Verdict:
        """A verdict with these scores' means in it."""
        return Verdict(
            action=action,
            reason=reason,
            to=to,
            num_rows=len(self.serving),
            serving_score=mean(self.serving),
            candidate_score=None if self.candidate is None else mean(self.candidate),
            loaded_score=None if self.loaded is None else mean(self.loaded),
        )


@dataclass(slots=True)
class Monitor:
    """What has been seen of the candidate that waits, if one does, and of what serves."""

    waits: bool = False
    looked_at: int = 0  # round
    pause: int = 0  # rounds of the last one
    resumes_at: int = 0  # round
    better: Evidence = field(default_factory=Evidence)  # the candidate, than what serves
    worse: Evidence = field(default_factory=Evidence)  # the candidate, than what serves
    harm: Evidence = field(default_factory=Evidence)  # what serves, worse than the draft as loaded
    ahead: Lead = field(default_factory=Lead)  # of the candidate over what serves
    lead: Lead = field(default_factory=Lead)  # of what serves over the draft as loaded
    fall: Fall = field(default_factory=Fall)

    @property
    def standing(self) -> Standing:
        """What others may know of it."""
        return Standing(lead_tokens=self.lead.proven, resumes_at=self.resumes_at)

    def overdue(self, settings: ShadowSettings, seen: Snapshot) -> bool:
        """Whether to look now, between two updates, at a candidate that waits and at what serves."""
        if self.fall.alarmed and not seen.serves_loaded:
            return True
        quiet = seen.round_index - self.looked_at
        if not seen.serves_loaded:
            return quiet >= settings.check_rounds
        return self.waits and quiet >= UNHURRIED * settings.check_rounds

    def look(self, scores: Scores, settings: ShadowSettings, seen: Snapshot) -> Verdict:
        """One look: may what serves stay, and is the candidate to take its place?"""
        self.looked_at = seen.round_index
        if self.fall.alarmed:
            self.fall.begin()
        if scores.loaded is not None:
            over_loaded, num_rows = blocks(scores.serving, scores.loaded), len(scores.serving)
            self.lead.add(over_loaded, num_rows)
            self.harm.add(-difference for difference in over_loaded)
            if self.harm.rejects(settings.false_rollback):
                return self._undo(scores, settings)
        if scores.candidate is None:
            return scores.verdict("keep", f"scores {self.lead.mean:+.3f} on what was loaded")
        return self._tell(scores, scores.candidate, settings, seen)

    def _tell(
        self,
        scores: Scores,
        candidate: Sequence[float],
        settings: ShadowSettings,
        seen: Snapshot,
    ) -> Verdict:
        """The candidate from what serves."""
        differences = blocks(candidate, scores.serving)
        self.better.add(differences)
        self.worse.add(-difference for difference in differences)
        self.ahead.add(differences, len(candidate))
        ahead = f"scores {self.ahead.mean:+.3f} on what serves"
        if self.better.rejects(settings.false_publish):
            if seen.serves_loaded:
                self.lead = self.ahead
            self._begin()
            self.pause = 0  # learning pays here
            return scores.verdict("publish", ahead)
        if self.worse.rejects(settings.false_rollback):
            self._begin()
            return scores.verdict("roll_back", f"{ahead}: worse", to=seen.draft_version)
        return scores.verdict("wait", f"{ahead}: not known yet")

    def _undo(self, scores: Scores, settings: ShadowSettings) -> Verdict:
        """The draft as loaded serves again, and training pauses: longer each time, to a limit."""
        usual, loss = settings.check_rounds, -self.lead.mean
        self.pause = min(max(usual, 2 * self.pause), LONGEST_PAUSE * usual)
        self._begin()
        self.harm, self.lead = Evidence(), Lead()
        self.resumes_at = self.looked_at + self.pause
        reason = f"the draft as loaded scores {loss:+.3f}; {self.pause} rounds without an update"
        return scores.verdict("roll_back", reason, to=0)

    def _begin(self) -> None:
        """Another candidate is to be told from what serves."""
        self.waits = False
        self.better, self.worse, self.ahead = Evidence(), Evidence(), Lead()
