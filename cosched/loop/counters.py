"""What the co-scheduler has counted: the memory behind every Snapshot.

Nothing here depends on a policy: thresholds are its own, the statistics are everybody's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from cosched.records import Snapshot, Standing

if TYPE_CHECKING:
    from cosched.records import ServedBlock, UpdateResult, Verdict, VerifyRound

RECENT_WEIGHT = 0.05  # of the newest round in the moving acceptance length
REFERENCE_WEIGHT = 0.0002  # of the newest round in the length that acceptance is measured against
SHORTFALL_TOLERANCE = 0.1  # tokens a round below the reference that are no fall
LOSSES_KEPT = 100_000  # a server runs for months
TRIALS_KEPT = 64  # comparisons of objectives: text moves on, what an older one said is of no use
UPDATE_WEIGHT = 0.1  # of the newest update in what updates cost and bring
NOTHING_KNOWN = Standing()


@dataclass(slots=True)
class Ledger:
    """Seconds on one kind of text: drafting and verifying, learning, and what learning has saved of them."""

    serving: float = 0.0
    learning: float = 0.0
    earned: float = 0.0


@dataclass(slots=True)
class Counters:
    """Running sums and moving means; numbers only, so that a run can be resumed from them."""

    rounds: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    updates: int = 0
    updates_at_reset: int = 0
    updates_at_served: int = 0  # that are in what serves
    starved: int = 0  # decisions to train in a row for which the buffer had no rows
    round_of_update: int = 0
    committed_at_update: int = 0
    finished_at_update: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    update_seconds_total: float = 0.0  # that the engine waited for
    background_seconds: float = 0.0  # of updates beside it
    beside: bool = False  # an update, or a look, went on when the newest round began
    slowed_seconds: float = 0.0  # that rounds took longer while something went on beside them
    quiet_round_seconds: float = 0.0  # moving mean of rounds beside which nothing did
    publish_seconds: float = 0.0
    skipped_steps: int = 0
    recent: float = 0.0
    recent_drafted: float = 0.0  # moving mean of the most that a round drafts for a request
    losses: list[float | None] = field(default_factory=list)
    usual: list[float] = field(
        default_factory=list
    )  # acceptance length by number of drafted tokens
    usual_rounds: list[int] = field(default_factory=list)  # that each of them is the mean of
    reference: float = 0.0  # what was usual with as many drafted tokens as in the newest round
    fallen: float = 0.0  # moving mean of what rounds are below it
    shortfall: float = 0.0
    round_seconds: float = 0.0  # moving mean
    finished: int = 0
    tokens_left: int | None = None  # of the newest round
    queued: int = 0
    steps_of_update: int = 1
    update_seconds_at_update: float = 0.0
    training_seconds_at_update: float = 0.0  # publishing included
    serving_seconds_at_update: float = 0.0
    recent_at_update: float = 0.0  # 0: none to compare with
    step_seconds: float = 0.0  # moving mean
    gain: float = 1.0  # moving mean
    scored: bool = False  # whether the gain is that of scores
    ledgers: list[Ledger] = field(default_factory=list)  # by the level of the text (``Standing``)
    guard_seconds: float = 0.0  # of the update seconds
    committed_at_loaded: int = 0
    num_trials: int = 0
    updates_at_trial: int = 0
    trials: list[tuple[float, ...]] = field(default_factory=list)  # what each objective brought
    serves_loaded: bool = True  # whether what serves is the draft as loaded
    refused: int = 0  # candidates that were scored and did not serve
    rolled_back: int = 0  # how often an earlier version was served again, by the guard or by hand
    evicted: int = 0  # requests that the replay buffer had no room for
    dropped: int = 0  # rounds that a trainer elsewhere did not get
    # Where several adapters learn: the counters of each, and to go on from them the versions.
    parts: list[Counters] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def _serving_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds

    @property
    def _lost_seconds(self) -> float:
        """To updates and their judgement: waited for, or because they went on beside the rounds."""
        return self.update_seconds_total + max(0.0, self.slowed_seconds)

    @property
    def _training_seconds(self) -> float:
        return self._lost_seconds + self.publish_seconds

    @property
    def earned_seconds(self) -> float:
        """That learning has saved, on all texts."""
        return sum(ledger.earned for ledger in self.ledgers)

    def observe(self, round_: VerifyRound, standing: Standing = NOTHING_KNOWN) -> None:
        """Count a round; ``standing`` is what is known of learning on its text."""
        committed = round_.num_committed
        seconds = round_.draft_seconds + round_.verify_seconds
        self.draft_seconds += round_.draft_seconds
        self.verify_seconds += round_.verify_seconds
        if round_.blocks:
            self._observe_length(round_.blocks)
            weight = RECENT_WEIGHT if self.rounds > 1 else 1.0
            self.round_seconds += weight * (seconds - self.round_seconds)
            self._observe_slowing(seconds)
        self._enter(round_, standing, seconds)
        self.committed += committed
        self.drafted += sum(len(block.path_K) for block in round_.blocks)
        self.accepted += sum(block.num_accepted for block in round_.blocks)
        self.finished += len(round_.finished)
        self.tokens_left = round_.tokens_left
        self.queued = round_.num_queued

    def _enter(self, round_: VerifyRound, standing: Standing, seconds: float) -> None:
        """What a round took and saved, and what learning has cost since the one before, by its text."""
        ledger = self._ledger(standing.level)
        ledger.serving += seconds
        ledger.learning += self._training_seconds - sum(one.learning for one in self.ledgers)
        if round_.blocks and not self.serves_loaded:
            ledger.earned += seconds * self._saved(standing.lead_tokens, round_.plain_share)

    def _ledger(self, level: int) -> Ledger:
        self.ledgers += (Ledger() for _ in range(level + 1 - len(self.ledgers)))
        return self.ledgers[level]

    def _saved(self, lead_tokens: float, plain_share: float | None) -> float:
        """How much longer than a second the draft as loaded, or no draft, would have taken.

        Where the number of drafted tokens is chosen while serving, none would be drafted where none pays.
        """
        saved = lead_tokens / max(1.0, self.recent - lead_tokens)
        return saved if plain_share is None else max(0.0, min(saved, self.recent * plain_share - 1))

    def _observe_slowing(self, seconds: float) -> None:
        """What goes on beside a round takes cores and memory from it."""
        if not self.beside:
            weight = RECENT_WEIGHT if self.quiet_round_seconds else 1.0
            self.quiet_round_seconds += weight * (seconds - self.quiet_round_seconds)
        elif self.quiet_round_seconds:
            self.slowed_seconds += seconds - self.quiet_round_seconds

    def _observe_length(self, blocks: tuple[ServedBlock, ...]) -> None:
        """The acceptance length of one more round.

        The shortfall g is Page's one-sided CUSUM (Biometrika 41, 1954; equal to Page-Hinkley's
        statistic): g <- max(0, g + reference - length - tolerance). It sums what a round alone would
        hide in its noise, and starts again once the recent length is back within the tolerance. A
        round is held against those that drafted as many tokens: drafting fewer is no fall.
        """
        self.rounds += 1
        # The mean of the first rounds, so that none of them alone says what is usual.
        weight = max(RECENT_WEIGHT, 1 / self.rounds)
        length = fmean(block.num_committed for block in blocks)
        self.recent += weight * (length - self.recent)
        drafted = max(len(block.path_K) for block in blocks)
        self.recent_drafted += weight * (drafted - self.recent_drafted)
        fall = self._compare(blocks) - length
        self.fallen += weight * (fall - self.fallen)
        within = self.fallen <= SHORTFALL_TOLERANCE
        self.shortfall = 0.0 if within else max(0.0, self.shortfall + fall - SHORTFALL_TOLERANCE)

    def _compare(self, blocks: tuple[ServedBlock, ...]) -> float:
        """What was usual for blocks like these; from now on they are part of it."""
        by_drafted: dict[int, list[int]] = defaultdict(list)
        for block in blocks:
            by_drafted[len(block.path_K)].append(block.num_committed)
        unseen = max(by_drafted) + 1 - len(self.usual)
        self.usual += [0.0] * unseen
        self.usual_rounds += [0] * unseen
        before = after = 0.0
        for drafted, committed in by_drafted.items():
            length = fmean(committed)
            self.usual_rounds[drafted] += 1
            weight = max(REFERENCE_WEIGHT, 1 / self.usual_rounds[drafted])
            before += len(committed) * (self.usual[drafted] if weight < 1 else length)
            self.usual[drafted] += weight * (length - self.usual[drafted])
            after += len(committed) * self.usual[drafted]
        self.reference = after / len(blocks)
        return before / len(blocks)

    def _tokens_ahead(self, num_running: int) -> float:
        """Tokens that a running request is expected to commit yet.

        Answers are taken to end at a constant rate, whose estimate is finished / committed, running
        requests included; what is left of one is then committed / finished, however long it is
        already. Before the first has finished, as much is expected as has been seen. Never more
        than the engine allows.
        """
        if not num_running:
            return 0.0
        expected = self.committed / max(1, self.finished)
        if self.tokens_left is None:
            return expected
        return min(expected, self.tokens_left / num_running)

    def begin_update(self, num_steps: int) -> None:
        """An update begins; what the one before it cost and brought has been seen by now.

        The first one's cost is left out: it warms up. Gains are averaged as the factors they are,
        so that noise, which makes one too high and the next too low, leaves no gain behind.
        """
        if self.updates > 1:
            seconds = (self._lost_seconds - self.update_seconds_at_update) / self.steps_of_update
            seconds = max(0.0, seconds)  # rounds differ
            weight = UPDATE_WEIGHT if self.step_seconds else 1.0
            self.step_seconds += weight * (seconds - self.step_seconds)
        if self.recent_at_update and not self.scored:
            self.gain *= (self.recent / self.recent_at_update / self.gain) ** UPDATE_WEIGHT
        self.starved = 0
        self.round_of_update = self.rounds
        self.committed_at_update = self.committed
        self.finished_at_update = self.finished
        self.steps_of_update = num_steps
        self.update_seconds_at_update = self._lost_seconds
        self.training_seconds_at_update = self._training_seconds
        self.serving_seconds_at_update = self._serving_seconds
        self.recent_at_update = self.recent

    def note_update(self, result: UpdateResult, in_background: bool) -> None:
        """One more update is done."""
        self.updates += 1
        self.skipped_steps += result.num_skipped
        self.background_seconds += result.seconds * in_background
        if result.trial:
            self.note_trial(result.trial)
        self.losses.append(result.losses[-1] if math.isfinite(result.losses[-1]) else None)
        del self.losses[:-LOSSES_KEPT]

    def note_look(self, seconds: float) -> None:
        """The engine waited so long for a guard."""
        self.guard_seconds += seconds
        self.update_seconds_total += seconds

    def note_verdict(self, verdict: Verdict, serving: int) -> None:
        """What a guard says, and by it what updates brought.

        Version ``serving`` serves. Scores are of the same rows, so without the noise of the text. A
        candidate may be several updates ahead of what serves: each brought its root.
        """
        if verdict.candidate_score and verdict.serving_score:
            self.refused += verdict.action != "publish"
            self.scored = True
            ahead = max(1, self.updates - self.updates_at_served)
            brought = (verdict.candidate_score / verdict.serving_score) ** (1 / ahead)
            self.gain *= (brought / self.gain) ** UPDATE_WEIGHT
        if verdict.action == "roll_back":
            self.rolled_back += verdict.to != serving

    def published(self) -> None:
        """The candidate serves."""
        self.serves_loaded = False
        self.updates_at_served = self.updates

    def note_trial(self, gains: tuple[float, ...]) -> None:
        """What one update with each of the objectives brought, or would have."""
        self.num_trials += 1
        self.updates_at_trial = self.updates
        self.trials.append(gains)
        del self.trials[:-TRIALS_KEPT]

    def went_back(self, version: int, serving: int) -> None:
        """Training has started again from a version, which serves, as ``serving`` did before."""
        self.updates_at_served = self.updates
        if version != serving:
            self.serves_loaded = version == 0
        if self.serves_loaded:
            self.committed_at_loaded = self.committed

    def start_anew(self) -> bool:
        """The draft is again the one that was loaded; what its updates cost is not forgotten.

        Nor is which objective was good: that is about the traffic, more than about one request. Returns
        whether there had been any updates since it was that before.
        """
        self.round_of_update = self.rounds
        self.committed_at_update = self.committed
        self.finished_at_update = self.finished
        self.shortfall = 0.0
        self.recent_at_update = 0.0
        self.committed_at_loaded = self.committed
        self.serves_loaded = True
        learnt, self.updates_at_reset = self.updates > self.updates_at_reset, self.updates
        return learnt

    def snapshot(
        self,
        num_running: int,
        draft_version: int,
        buffered_tokens: int,
        standing: Standing = NOTHING_KNOWN,
        forgets: bool = False,
    ) -> Snapshot:
        """What a policy may know of this, and of what the guard knows."""
        here = self._ledger(standing.level)
        return Snapshot(
            round_index=self.rounds,
            num_running=num_running,
            num_committed=self.committed,
            num_drafted=self.drafted,
            num_accepted=self.accepted,
            recent_acceptance_length=self.recent,
            recent_drafted_tokens=self.recent_drafted,
            rounds_since_update=self.rounds - self.round_of_update,
            tokens_since_update=self.committed - self.committed_at_update,
            num_updates=self.updates,
            draft_version=draft_version,
            buffered_tokens=buffered_tokens,
            seconds_drafting=self.draft_seconds,
            seconds_verifying=self.verify_seconds,
            seconds_updating=self._lost_seconds,
            seconds_publishing=self.publish_seconds,
            recent_round_seconds=self.round_seconds,
            reference_acceptance_length=self.reference,
            acceptance_shortfall=self.shortfall,
            last_update_seconds=self._training_seconds - self.training_seconds_at_update,
            serving_seconds_since_update=self._serving_seconds - self.serving_seconds_at_update,
            micro_step_seconds=self.step_seconds,
            update_gain=self.gain,
            expected_tokens_left=self._tokens_ahead(num_running),
            forgets=forgets,
            updates_since_reset=self.updates - self.updates_at_reset,
            num_queued=self.queued,
            seconds_earned=self.earned_seconds,
            seconds_serving_here=here.serving,
            seconds_learning_here=here.learning,
            seconds_earned_here=here.earned,
            level=standing.level,
            level_rows=standing.level_rows,
            num_finished=self.finished,
            requests_since_update=self.finished - self.finished_at_update,
            tokens_since_loaded=self.committed - self.committed_at_loaded,
            updates_since_trial=self.updates - self.updates_at_trial,
            num_trials=self.num_trials,
            trials=tuple(self.trials),
            serves_loaded=self.serves_loaded,
            pause_rounds=max(0, standing.resumes_at - self.rounds),
            lead_tokens=standing.lead_tokens,
        )
