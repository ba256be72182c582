"""What the guard remembers and concludes: scores and acceptance lengths in, verdicts out.

Numbers only: no model, no clock. The tests behind every verdict are those of ``statistics``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from cosched.guard.statistics import Evidence, Fall, Leads, Levels, blocks, bound, falls_short, mean
from cosched.records import GuardFigures, Standing, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.guard.settings import ShadowSettings
    from cosched.records import Action, Snapshot

UNHURRIED = 4  # times as long between looks while the loaded draft serves: nothing can do harm
NEWEST = 8  # blocks on which a trusted learner's candidate is told from what serves
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
    """What has been seen of learning, against the draft as loaded.

    What is tested is the learner, whose weights change from look to look: they are judged on rows that
    came after the updates they are of, so that all looks are evidence of one thing, whether learning
    pays on this traffic. Once that is known it is ``trusted``, and its candidates serve as they come.
    """

    waits: bool = False  # a candidate to be looked at
    looked_at: int = 0  # round
    pause: int = 0  # rounds of the last one
    resumes_at: int = 0  # round
    trusted: bool = False
    better: Evidence = field(default_factory=Evidence)  # the learner, than the draft as loaded
    worse: Evidence = field(default_factory=Evidence)  # the learner, than the draft as loaded
    behind: Evidence = field(default_factory=Evidence)  # the candidate, a trained one that serves
    newest: list[float] = field(default_factory=list)  # blocks since what serves was published
    leads: Leads = field(default_factory=Leads)  # of the learner over the draft as loaded
    fall: Fall = field(default_factory=Fall)
    levels: Levels = field(default_factory=Levels)

    @property
    def standing(self) -> Standing:
        """What others may know of it."""
        leads = self.leads
        return Standing(
            leads.here.proven, leads.level_here, int(leads.rows), resumes_at=self.resumes_at
        )

    def figures(self, settings: ShadowSettings, serves_loaded: bool) -> GuardFigures:
        """How the tests stand, for people."""
        lead, levels = self.leads.here, self.levels
        known = math.isfinite(lead.error)
        return GuardFigures(
            better=self.better.log_wealth,
            better_bound=bound(settings.false_publish),
            worse=self.worse.log_wealth,
            worse_bound=bound(settings.false_rollback),
            trusted=self.trusted,
            serves_loaded=serves_loaded,
            lead_tokens=lead.mean if known else None,
            lead_error=lead.error if known else None,
            serving_score=levels.serving if levels.known else None,
            loaded_score=levels.loaded if levels.known else None,
        )

    def observe(self, length: float, serves_loaded: bool) -> None:
        """The acceptance length of one more round."""
        self.fall.observe(length, counts=not serves_loaded)
        if serves_loaded:
            self.leads.loaded_draft(length)

    def overdue(self, settings: ShadowSettings, seen: Snapshot) -> bool:
        """Whether to look now, between two updates, at a candidate that waits and at what serves."""
        if self.fall.alarmed and not seen.serves_loaded:
            return True
        quiet = seen.round_index - self.looked_at
        if not seen.serves_loaded:
            return quiet >= settings.check_rounds
        return self.waits and quiet >= UNHURRIED * settings.check_rounds

    def look(self, scores: Scores, settings: ShadowSettings, seen: Snapshot) -> Verdict:
        """One look: does learning pay, and is the candidate, if one waits, to serve?"""
        self.looked_at = seen.round_index
        if self.fall.alarmed:
            self.fall.begin()
        learnt = scores.serving if scores.candidate is None else scores.candidate
        loaded = scores.serving if scores.loaded is None else scores.loaded
        self.levels.add(scores.serving, loaded)
        differences = blocks(learnt, loaded)
        self.better.add(differences)
        self.worse.add(-difference for difference in differences)
        if scores.loaded is not None:
            self.leads.loaded_draft(mean(loaded), len(loaded))
        self.leads.here.add(differences, len(learnt))
        better = self.better.share(settings.false_publish)
        worse = self.worse.share(settings.false_rollback)
        concluded = self._conclude(scores, settings, seen)
        return msgspec.structs.replace(concluded, evidence_better=better, evidence_worse=worse)

    def _conclude(self, scores: Scores, settings: ShadowSettings, seen: Snapshot) -> Verdict:
        ahead = f"what was learnt scores {self.leads.here.mean:+.3f} on what was loaded"
        if self.worse.rejects(settings.false_rollback):
            return self._undo(scores, settings)
        if scores.candidate is None:
            return scores.verdict("keep", ahead)
        if not self.trusted:
            if not self.better.rejects(settings.false_publish):
                return scores.verdict("wait", f"{ahead}: not known yet")
            self.trusted, self.pause = True, 0
        return self._tell(blocks(scores.candidate, scores.serving), scores, settings, seen)

    def _tell(
        self,
        differences: Sequence[float],
        scores: Scores,
        settings: ShadowSettings,
        seen: Snapshot,
    ) -> Verdict:
        """A trusted learner's candidate from what serves: only a bad one does not take its place."""
        self.newest = [*self.newest, *differences][-NEWEST:]
        ahead = f"scores {mean(self.newest):+.3f} on what serves"
        if not seen.serves_loaded:
            self.behind.add(-difference for difference in differences)
        if self.behind.rejects(settings.false_rollback):
            self._begin()
            return scores.verdict("roll_back", f"{ahead}: worse", to=seen.draft_version)
        if falls_short(self.newest):
            return scores.verdict("wait", ahead)
        self._begin()
        return scores.verdict("publish", ahead)

    def _begin(self) -> None:
        """Another candidate is to be told from what serves."""
        self.waits, self.behind, self.newest = False, Evidence(), []

    def request_ended(self, round_: int) -> None:
        """The loaded draft serves again; what is known of learning on this traffic stays."""
        self._begin()
        self.looked_at = round_
        self.fall.begin()
        self.leads.begin()

    def _undo(self, scores: Scores, settings: ShadowSettings) -> Verdict:
        """The draft as loaded serves again, and training pauses: longer each time, to a limit."""
        usual, loss = settings.check_rounds, -self.leads.here.mean
        self.pause = min(max(usual, 2 * self.pause), LONGEST_PAUSE * usual)
        self.resumes_at = self.looked_at + self.pause
        self._begin()
        self.trusted = False
        self.better, self.worse, self.leads = Evidence(), Evidence(), Leads()
        reason = f"the draft as loaded scores {loss:+.3f}; {self.pause} rounds without an update"
        return scores.verdict("roll_back", reason, to=0)
