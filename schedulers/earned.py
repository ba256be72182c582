"""A cadence that lives on what it earns."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from cosched.protocols import Policy
from cosched.records import Decision, Snapshot
from cosched.registry import POLICIES
from schedulers.costs import CostAwareSettings, expected_rounds_left
from schedulers.idle import when_idle

Share = Annotated[float, Meta(ge=0, le=1)]
LEAST_SECONDS = 1e-6  # of an update
HARD = 0  # level: below a quarter of a token a round (``cosched.guard.statistics.LEVELS``)
KNOWN_ROWS = 32  # of a text, by which its level is known
PROMISE = 0.25  # of the seconds of a hard text: what learning saves there at best


class EarnedSettings(CostAwareSettings, frozen=True, kw_only=True):
    """At most one update in ``rounds``, of ``num_steps`` micro-steps.

    A trial of ``trial_updates`` may be made on each kind of text whenever ``explore_share`` of the time on it
    has come to what that takes, and one in advance where the draft as loaded guesses badly;
    ``reinvested_share`` of what learning has earned there may go into more of it. ``idle_steps`` are taken once
    when the last request has finished.
    """

    replaced: ClassVar[dict[str, str]] = {"credit_rounds": "trial_updates (updates, not rounds)"}
    rounds: Annotated[int, Meta(ge=1)] = 16
    trial_updates: Annotated[int, Meta(ge=1)] = 6
    explore_share: Share = 0.02
    reinvested_share: Share = 0.5
    idle_steps: Annotated[int, Meta(ge=0)] = 0


@POLICIES.register("earned")
class Earned(Policy):
    """Trains as long as learning pays its own way, here.

    With U seconds spent on updates and their judgement so far, u in the mean for each, n = ``trial_updates``, V
    seconds of drafting and verifying, and E seconds that learning has saved, it trains while, within half an u,

        U + u <= n u (c + floor(explore_share V / n u)) + reinvested_share E

    In a second of serving, a draft whose acceptance length is g times that of the draft as loaded does what that
    one would have needed g seconds for: it saves g - 1. E is their sum, with g as a guard of kind ``shadow`` scores
    it on the same rows, less a standard error; without such a guard nothing is ever earned. So learning costs at
    most a trial and a small share more than what it brings.

    **A trial is made at once.** One update teaches little: spread thinly, updates would show nothing of a draft
    that six in a row make better.

    U, V and E are of text like this, told apart by how well the draft as loaded does on it
    (``Standing.level``): what one kind of text has earned is not spent on another. c is 1 where that draft is known
    to guess less than a quarter of a token a round, for there is most to learn and least to lose, and 0 elsewhere.

    **Where learning ends with a request, each is an investment of its own** (``Snapshot.forgets``). One is made in
    every request, whatever was spent on others, where the seconds that are left of it behind a trial, times the
    share of them that learning is known to save on such text, are more than what is left of the trial costs. Where
    nothing is known yet, the one in advance (c) is held against a quarter; and to explore_share V comes that
    share of what is left, up to a trial: a long answer may have its own at its beginning.
    """

    Settings = EarnedSettings
    needs_scores = True

    def __init__(self, settings: EarnedSettings) -> None:
        self.settings = settings
        self.idle_steps = settings.idle_steps

    def decide(self, snapshot: Snapshot) -> Decision:
        settings = self.settings
        if snapshot.num_running == 0:
            return when_idle(snapshot, self.idle_steps)
        if snapshot.rounds_since_update < settings.rounds:
            return Decision(num_steps=0)
        learning, earned = snapshot.seconds_learning_here, snapshot.seconds_earned_here
        update = self._update_seconds(snapshot)
        trial = settings.trial_updates * update
        explored = settings.explore_share * snapshot.seconds_serving_here
        if snapshot.forgets:
            explored += min(trial, settings.explore_share * _seconds_left(snapshot))
        paid = explored // trial * trial + settings.reinvested_share * earned
        hard = snapshot.level <= HARD and snapshot.level_rows >= KNOWN_ROWS
        if hard and not snapshot.forgets:
            paid += trial
        # Half of an update more may go: seconds add up to a trial but for their last digits.
        if learning + update / 2 <= paid:
            return Decision(settings.num_steps, reason=f"{earned:.1f} s earned on such text so far")
        expected = _saved_share(snapshot)
        if hard and learning + update / 2 <= paid + trial:
            expected = max(expected, PROMISE)
        if snapshot.forgets and self._pays_in_request(snapshot, expected):
            return Decision(
                settings.num_steps, reason=f"{expected:.0%} to be saved in this request"
            )
        return Decision(num_steps=0)

    def _pays_in_request(self, snapshot: Snapshot, saved_share: float) -> bool:
        """Whether what is left of a trial costs less than it is expected to save behind it."""
        missing = self.settings.trial_updates - snapshot.updates_since_reset
        if missing <= 0 or not saved_share:
            return False
        until_then = missing * self.settings.rounds * snapshot.recent_round_seconds
        saved = saved_share * (_seconds_left(snapshot) - until_then)
        return saved >= missing * self._update_seconds(snapshot)

    def _update_seconds(self, snapshot: Snapshot) -> float:
        """What an update has cost in the mean, with its judgement and publication."""
        if not snapshot.num_updates:
            return self.settings.num_steps * self.settings.step_ms / 1000
        spent = snapshot.seconds_updating + snapshot.seconds_publishing
        return max(LEAST_SECONDS, spent / snapshot.num_updates)


def _seconds_left(snapshot: Snapshot) -> float:
    """Of a running request."""
    return expected_rounds_left(snapshot) * snapshot.recent_round_seconds


def _saved_share(snapshot: Snapshot) -> float:
    """Of the seconds that text like this takes with the draft as loaded: what learning is known to save."""
    lead = snapshot.lead_tokens
    loaded = snapshot.recent_acceptance_length - (0.0 if snapshot.serves_loaded else lead)
    return lead / (max(1.0, loaded) + lead)
