"""The walk of a round. The engine drives; this is called once after every round.

collect   what the target said goes into the replay buffer
observe   counters and costs become a Snapshot
decide    the policy says whether to train now
update    the trainer takes micro-steps on its own copy of the draft
guard     the candidate may serve, or not
publish   into the serving draft, in place, as the next version
watch     what serves may go on, or an earlier version serves again
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cosched.errors import PublicationError
from cosched.loop.counters import Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.loop.roles import Buffer, Guard, Publisher, Sink, Trainer
    from cosched.protocols import Policy
    from cosched.records import (
        Decision,
        SignalBatch,
        Snapshot,
        UpdateResult,
        Verdict,
        VerifyRound,
    )

LOSSES_KEPT = 100_000


class Coscheduler:
    """Turns verification rounds into better drafts, and never touches the target.

    Without a trainer the draft learns by itself: rounds are counted, the policy is not asked and
    nothing is kept of them.
    """

    def __init__(
        self,
        buffer: Buffer,
        policy: Policy,
        trainer: Trainer | None,
        guard: Guard,
        publisher: Publisher | None,
        sink: Sink,
        reset_when_finished: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._buffer = buffer
        self._policy = policy
        self._trainer = trainer
        self._guard = guard
        self._publisher = publisher
        self._sink = sink
        self._reset_when_finished = reset_when_finished
        self._clock = clock
        self.totals = Totals()
        self.learning = True  # off: rounds are counted, nothing is kept and nothing is trained

    @property
    def version(self) -> int:
        return self._publisher.version if self._publisher else 0

    def state(self) -> tuple[Totals, int, Mapping[str, Tensor]]:
        """Counters, draft version, trainer and versions: what a later run needs to go on from here.

        Valid while no request runs; what the replay buffer holds of a running one is not kept.
        """
        if self._trainer is None or self._publisher is None:
            return self.totals, self.version, {}
        return self.totals, self.version, {**self._trainer.state(), **self._publisher.state()}

    def restore(self, totals: Totals, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an earlier run's ``state()``."""
        self.totals = totals
        if self._trainer is not None and self._publisher is not None and totals.updates:
            self._trainer.restore(tensors)
            self._publisher.restore(tensors, version, totals.watch.good)

    def on_round(self, round_: VerifyRound) -> None:
        """Called by the engine after each verification round and after each prefill."""
        self.collect(round_)
        self.learn(round_.num_running)
        if round_.finished and self._reset_when_finished and self._learns:
            self._reset()

    @property
    def busy(self) -> bool:
        """Whether an update goes on in the background, or waits to be judged."""
        return self._trainer is not None and self._trainer.busy

    @property
    def _learns(self) -> bool:
        return self._trainer is not None and self.learning

    def collect(self, round_: VerifyRound) -> None:
        """Count a round and keep what it teaches; who has finished is known also while off."""
        if self._trainer is not None:
            kept = round_ if self._learns else replace(round_, segments=(), blocks=())
            self._buffer.collect(kept)
        self.totals.observe(round_)

    def learn(self, num_running: int) -> None:
        """Train, judge and publish, if the policy says so; with none running it is asked to idle."""
        if not self._learns:
            return  # counted, and nothing to decide
        result = self._train(num_running)
        if result and self._judge(result).publish:
            self._publish()
        self._watch()

    def roll_back(self, version: int) -> int:
        """Serve an earlier version's weights, as the next version, and go on learning from there.

        Raises:
            PublicationError: that version is not kept, or this draft is never published.
        """
        if self._trainer is None or self._publisher is None:
            raise PublicationError("this draft is not trained here: it has no versions")
        self._trainer.load(self._publisher.weights_of(version))
        self.totals.went_back(version)
        self._publisher.pin(self.totals.watch.good)
        self._serve_again(version, "asked for")
        return self.version

    def _serve_again(self, version: int, reason: str) -> None:
        self._sink.emit("rollback", round=self.totals.rounds, to=version, reason=reason)
        self._publish()

    def _train(self, num_running: int) -> UpdateResult | None:
        """The next update's result, or that of the one that goes on in the background.

        What is charged is what updates took. To be asked and to decline costs the learner nothing:
        an idle server asks for hours, and would spend on it what it may spend on learning.
        """
        assert self._trainer is not None
        started, totals = self._clock(), self.totals
        if self._trainer.busy:
            result = self._trainer.finished()
            if result is None:
                return None
            totals.background_seconds += result.seconds
        else:
            due = self._due(num_running)
            if due is None:
                return None
            result = self._trainer.update(*due)  # None: it goes on in the background
        totals.update_seconds += self._clock() - started
        if result:
            self._note(result)
        return result

    def _due(self, num_running: int) -> tuple[SignalBatch, Decision] | None:
        """What to train on now and how; None where there is nothing to do."""
        totals = self.totals
        if totals.watch.resumes_at > totals.rounds:
            return None  # it cools down
        decision = self._policy.decide(self._snapshot(num_running))
        if not decision.num_steps:
            return None
        batch = self._buffer.sample()
        if batch is None:
            totals.starved += 1
            return None
        totals.starved = 0
        totals.begin_update(decision.num_steps)
        self._sink.emit("decision", round=totals.rounds, decision=decision)
        return batch, decision

    def _snapshot(self, num_running: int) -> Snapshot:
        return self.totals.snapshot(num_running, self.version, self._buffer.num_tokens)

    def _note(self, result: UpdateResult) -> None:
        totals = self.totals
        totals.updates += 1
        totals.skipped_steps += result.num_skipped
        if result.trial:
            totals.note_trial(result.trial)
        totals.losses.append(result.losses[-1] if math.isfinite(result.losses[-1]) else None)
        del totals.losses[:-LOSSES_KEPT]  # a server runs for months
        self._sink.emit("update", round=totals.rounds, result=result)

    def _judge(self, result: UpdateResult) -> Verdict:
        assert self._trainer is not None
        started = self._clock()
        verdict = self._guard.judge(result, self._trainer.weights(), self.totals)
        self._heed(verdict, started)
        return verdict

    def _watch(self) -> None:
        """Whether what serves may go on; not while the trainer's copy is in use."""
        assert self._trainer is not None
        started = self._clock()
        if self._trainer.busy:
            return
        if verdict := self._guard.watch(self.totals, self._trainer.weights):
            self._heed(verdict, started)
            if verdict.publish:
                self._publish()

    def _heed(self, verdict: Verdict, started: float) -> None:
        """Note a verdict, and go back where it says so."""
        totals, published = self.totals, self.totals.publish_seconds
        totals.note_scores(verdict)
        self._sink.emit("verdict", round=totals.rounds, verdict=verdict)
        if verdict.back_to is not None:
            assert self._trainer is not None
            assert self._publisher is not None
            self._trainer.load(self._publisher.weights_of(verdict.back_to))
            totals.updates_at_served = totals.updates
            if verdict.back_to != self.version:
                self._serve_again(verdict.back_to, verdict.reason)
        seconds = self._clock() - started - (totals.publish_seconds - published)
        totals.guard_seconds += seconds
        totals.update_seconds += seconds  # the engine waits for them

    def _publish(self) -> None:
        assert self._trainer is not None
        assert self._publisher is not None
        version = self._publisher.publish(self._trainer.weights())
        self.totals.updates_at_served = self.totals.updates
        self.totals.publish_seconds += version.seconds
        self._sink.emit("publication", round=self.totals.rounds, version=version)

    def _reset(self) -> None:
        """State per request: the next one starts from the draft as it was loaded, and anew."""
        totals = self.totals
        totals.start_anew()
        assert self._trainer is not None
        if totals.updates == totals.updates_at_reset and not self._trainer.busy:
            return
        started = self._clock()
        self._trainer.reset()
        if self._publisher is not None:
            self._publisher.pin(totals.watch.good)
        totals.updates_at_reset = totals.updates
        totals.update_seconds += self._clock() - started
        self._sink.emit("reset", round=totals.rounds)
        self._publish()
