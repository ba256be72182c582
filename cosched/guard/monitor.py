"""What the shadow guard goes by: scores and acceptance lengths in, verdicts out; numbers only.

A score is the expected acceptance length of some weights on rows that they were not trained on;
scores of one comparison are of the same rows, so the text's difficulty drops out of differences.
Three things may happen to a draft that serves. A candidate takes its place, if it scores no worse.
It goes back to the last good version, when its acceptance length fell (Page's CUSUM) and scores say
that the draft is to blame and not the text. And it goes back to the draft as it was loaded, when
comparisons with that add up to evidence that learning does not pay on this text.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from cosched.guard.statistics import Evidence, mean
from cosched.records import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGINNING = 64  # rows below which nothing is given up
CONVINCED = 4  # times as long between comparisons, once learning has shown that it pays
LONGEST_PAUSE = 32  # times ``cooldown_rounds``: text may change, and then there is much to learn
LEAST_ROWS = 8  # paired rows below which an alarm is neither confirmed nor dismissed
LEVEL_WEIGHT = 1 / 256  # of the newest round in the level that a fall is measured from
FALL_TOLERANCE = 0.25  # tokens a round below the level that are no fall, at most
BLAME = 0.5  # of a fall, which an older version must make up for, so that the draft is to blame

Positive = Annotated[int, Meta(ge=1)]


class FiniteSettings(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="finite"
):
    """``adapt.guard`` of ``kind: finite``: updates none of whose steps was finite are refused."""


class ShadowSettings(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="shadow",
):
    """``adapt.guard`` of ``kind: shadow``: candidates are scored on rows that no update has seen.

    Each update leaves out the newest ``anchors``, which judge it; later ones are taught on them.
    Every ``every``-th update is judged, with those before it. A candidate is published unless it
    scores more than ``tolerance`` tokens below what serves; after ``patience`` refusals in a row
    training starts again from what serves. A fall of the acceptance length by ``alarm_tokens`` in
    all is looked into. After every ``check_every``-th publication, and every ``check_rounds`` on all
    rows that no update has had (a quarter as often while learning has shown that it pays), the draft
    is compared with itself as loaded, to which it goes back where that is better by ``doubt``
    standard errors.

    While the draft as loaded serves, candidates serve only once they have shown with ``confidence``
    (standard errors) that they are better: on the rows that each update leaves out, and every
    ``check_rounds`` on all that no update has had. Those that have not shown it in ``trials``
    judgements of ``anchors`` rows are given up, and after 64 rows those that would not in
    ``prospect_rows``, should they go on as they began (more rows than trials have, because what learns
    gets better): ``cooldown_rounds`` pass without an update, and twice as many each time, but never
    more than 32 times as many. Without ``prove_first`` that is so only after going back. To serve
    takes more evidence than to go back, because the draft as loaded is what users had before.
    """

    anchors: Positive = 32
    every: Positive = 2
    tolerance: Annotated[float, Meta(ge=0)] = 0.05
    patience: Positive = 4
    alarm_tokens: Annotated[float, Meta(gt=0)] = 12.0
    check_every: Positive = 1
    check_rounds: Positive = 256
    confidence: Annotated[float, Meta(gt=0)] = 3.0
    doubt: Annotated[float, Meta(gt=0)] = 0.5
    trials: Positive = 8
    prospect_rows: Positive = 512
    cooldown_rounds: Positive = 512
    prove_first: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """Acceptance lengths row by row, of several weights on the same rows.

    ``loaded`` is the draft as it was loaded, ``good`` the last good version: None where they were
    not asked for, or are what serves.
    """

    serving: Sequence[float]
    candidate: Sequence[float] | None = None
    loaded: Sequence[float] | None = None
    good: Sequence[float] | None = None

    def verdict(self, publish: bool, reason: str, back_to: int | None = None) -> Verdict:
        """A verdict with these scores' means in it."""
        return Verdict(
            publish=publish,
            reason=reason,
            back_to=back_to,
            num_rows=len(self.serving),
            serving_score=mean(self.serving),
            candidate_score=None if self.candidate is None else mean(self.candidate),
            loaded_score=None if self.loaded is None else mean(self.loaded),
        )


@dataclass(slots=True)
class Watch:
    """What the guard remembers; a run is resumed with it, a reset starts with an empty one.

    ``at_loaded`` says whether what serves is the draft as loaded, ``good`` is the newest version
    that was compared and found good after it had been published (0: the draft as loaded).
    """

    at_loaded: bool = True
    good: int = 0
    refusals: int = 0  # in a row
    refused: int = 0  # in all
    rolled_back: int = 0  # publications undone
    since_check: int = 0  # publications
    looked_at: int = 0  # round
    proving: bool = False
    trials: float = 0  # judgements; one on fewer rows than ``anchors`` counts for less
    cooldown: int = 0  # rounds of the last one
    resumes_at: int = 0  # round
    level: float = 0.0
    lengths: int = 0
    fall: float = 0.0  # tokens
    falling: int = 0  # rounds since it was nothing
    evidence: Evidence = field(default_factory=Evidence)

    def observe(self, length: float) -> None:
        """The acceptance length of one more round.

        Page's one-sided CUSUM (Biometrika 41, 1954): fall <- max(0, fall + level - length -
        tolerance), where the level is a slow mean of the lengths before.
        """
        self.lengths += 1
        if self.lengths > 1 and not self.at_loaded:  # the loaded draft has nothing to go back to
            self.fall = max(0.0, self.fall + self.level - length - self._tolerance)
            self.falling = self.falling + 1 if self.fall else 0
        self.level += max(LEVEL_WEIGHT, 1 / self.lengths) * (length - self.level)

    @property
    def _tolerance(self) -> float:
        """Tokens a round below the level that are no fall: of a low level half of what is to lose.

        So a draft that is never right any more is noticed before it has lost four times the usual
        ``alarm_tokens``, if it was right for an eighth of a token a round before.
        """
        return min(FALL_TOLERANCE, max(0.0, self.level - 1) / 2)

    def alarmed(self, settings: ShadowSettings) -> bool:
        """Whether the acceptance length has fallen far enough to ask who is to blame."""
        return self.fall > settings.alarm_tokens

    def check_due(self, settings: ShadowSettings) -> bool:
        """Whether the next comparison should take in the loaded draft and the last good one."""
        wait = settings.check_every * self._seldom(settings)
        return not self.at_loaded and self.since_check >= wait

    def _seldom(self, settings: ShadowSettings) -> int:
        """How much longer what serves goes unwatched for having shown that it pays."""
        pays = not self.at_loaded and self.evidence.z >= settings.confidence
        return CONVINCED if pays else 1

    def overdue(self, settings: ShadowSettings, round_: int) -> bool:
        """Whether it is time to look at all rows that no update has had, between two updates.

        There is something to look at where what serves is not the draft as loaded, or a candidate
        waits to take its place.
        """
        waits = not self.at_loaded or self.trials > 0
        wait = settings.check_rounds * self._seldom(settings)
        return waits and round_ - self.looked_at >= wait

    def look(self, scores: Scores, settings: ShadowSettings, round_: int, version: int) -> Verdict:
        """Between updates: at the candidate that waits, or at what serves."""
        self.looked_at = round_
        if scores.candidate is not None:
            return self.judge(scores, settings, round_, version)
        self._check(scores, settings, version)
        if self._outdone(settings):
            return self._back_to_loaded(scores, settings, round_)
        return scores.verdict(False, f"scores {self.evidence.mean:+.3f} on what was loaded")

    def _outdone(self, settings: ShadowSettings) -> bool:
        return self.evidence.z <= -settings.doubt

    def _back_to_loaded(self, scores: Scores, settings: ShadowSettings, round_: int) -> Verdict:
        reason = f"the draft as loaded scores {-self.evidence.mean:.3f} more"
        return self._go_back(scores, settings, round_, 0, reason)

    def judge(self, scores: Scores, settings: ShadowSettings, round_: int, version: int) -> Verdict:
        """Whether a candidate may take the place of ``version``, which serves."""
        assert scores.candidate is not None
        ahead = mean(scores.candidate) - mean(scores.serving)
        if self.at_loaded and self.trials == 0:
            self.looked_at = round_
        if scores.loaded is not None:
            self._check(scores, settings, version)
            if self._outdone(settings):
                return self._back_to_loaded(scores, settings, round_)
        if self.proving or (settings.prove_first and self.at_loaded):
            return self._try(scores, settings, round_, version)
        if ahead >= -settings.tolerance:
            self.refusals = 0
            return self._publish(scores, f"scores {ahead:+.3f}")
        return self._refuse(scores, ahead, settings, version)

    def _check(self, scores: Scores, settings: ShadowSettings, version: int) -> None:
        """Compare what serves with the loaded draft; a version that is not worse is a good one."""
        assert scores.loaded is not None
        serving, loaded = mean(scores.serving), mean(scores.loaded)
        self.since_check = 0
        self.evidence.add(scores.serving, scores.loaded)
        before = loaded if scores.good is None else mean(scores.good)
        if serving >= max(loaded, before) - settings.tolerance:
            self.good = version
        if self.evidence.z >= settings.confidence:
            self.cooldown = 0  # learning pays here after all

    def _try(self, scores: Scores, settings: ShadowSettings, round_: int, version: int) -> Verdict:
        """What would take the place of the draft as loaded must first show that it is better."""
        assert scores.candidate is not None
        self.trials += min(1.0, len(scores.serving) / settings.anchors)
        self.evidence.add(scores.candidate, scores.serving)
        if self.evidence.z >= settings.confidence:
            self.proving, self.trials = False, 0
            return self._publish(scores, "has shown that it is better than the draft as loaded")
        self.refused += 1
        if self.trials < settings.trials and self._promising(settings):
            return scores.verdict(False, "has yet to show that it is better than the loaded draft")
        self.trials, self.evidence = 0, Evidence()
        self._cool_down(settings, round_)
        reason = f"no better than the draft as loaded; {self.cooldown} rounds without an update"
        return scores.verdict(False, reason, back_to=version)

    def _promising(self, settings: ShadowSettings) -> bool:
        """Whether a candidate may yet show that it is better: a mean's z goes with the root of rows."""
        evidence = self.evidence
        on_course = math.sqrt(settings.prospect_rows / max(1.0, evidence.weight))
        return (
            evidence.weight < BEGINNING
            or evidence.errors_ahead() * on_course >= settings.confidence
        )

    def _publish(self, scores: Scores, reason: str) -> Verdict:
        self.since_check += 1
        self.at_loaded = False
        return scores.verdict(True, reason)

    def _refuse(
        self, scores: Scores, ahead: float, settings: ShadowSettings, version: int
    ) -> Verdict:
        self.refused += 1
        self.refusals += 1
        reason = f"scores {ahead:+.3f}, refusal {self.refusals} in a row"
        if self.refusals < settings.patience:
            return scores.verdict(False, reason)
        self.refusals = 0
        return scores.verdict(False, f"{reason}; back to what serves", back_to=version)

    def look_into(
        self, scores: Scores, settings: ShadowSettings, round_: int, version: int, evidence: bool
    ) -> Verdict | None:
        """Whether the draft is to blame for the fall; None while there are too few rows to say.

        It is if the best of what it could go back to scores more, with confidence, by at least half
        of what a round has lost: text that has become harder is harder for that one too. Scores of
        rows that were never asked for before are ``evidence`` besides, as those of a look.
        """
        if len(scores.serving) < LEAST_ROWS:
            return None
        assert scores.loaded is not None
        rivals = {0: scores.loaded}
        if scores.good is not None:
            rivals[self.good] = scores.good
        best = max(rivals, key=lambda version: mean(rivals[version]))
        harm = [rival - own for rival, own in zip(rivals[best], scores.serving, strict=True)]
        loss, error = mean(harm), statistics.stdev(harm) / math.sqrt(len(harm))
        fall = self.fall / max(1, self.falling) + self._tolerance
        reason = f"acceptance fell by {fall:.2f}, version {best} scores {loss:+.3f}"
        self.fall, self.falling, self.lengths = 0.0, 0, 0
        if loss >= BLAME * fall and loss >= settings.confidence * error:
            return self._go_back(scores, settings, round_, best, reason)
        if evidence:
            self.looked_at = round_
            self._check(scores, settings, version)
            if self._outdone(settings):
                return self._back_to_loaded(scores, settings, round_)
        return scores.verdict(False, reason)

    def _go_back(
        self, scores: Scores, settings: ShadowSettings, round_: int, version: int, reason: str
    ) -> Verdict:
        self.went_back(version)
        self.proving = version == 0
        self.rolled_back += 1
        self._cool_down(settings, round_)
        reason = f"{reason}; {self.cooldown} rounds without an update"
        return scores.verdict(False, reason, back_to=version)

    def went_back(self, version: int) -> None:
        """An earlier version serves again: what was learnt of the later one is void."""
        self.at_loaded = version == 0
        self.good = min(self.good, version)
        self.refusals = self.since_check = self.trials = self.lengths = 0
        self.proving, self.fall, self.falling, self.evidence = False, 0.0, 0, Evidence()

    def _cool_down(self, settings: ShadowSettings, round_: int) -> None:
        usual = settings.cooldown_rounds
        self.cooldown = min(max(usual, 2 * self.cooldown), LONGEST_PAUSE * usual)
        self.resumes_at = round_ + self.cooldown
