"""What updates are made with: the objective of each, and trials of all of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from cosched.loop.roles import Buffer, Decider, Publisher, Scorer, Trainer
    from cosched.protocols import Objective
    from cosched.records import Decision, SignalBatch, Snapshot, UpdateResult


class WithObjective:
    """Any policy, whose updates are made with what an objective chooses.

    ``rates`` are the learning rates of the experts; empty where there is nothing to choose from.
    Until ``warm_tokens`` have been committed the rate is that share of itself (``adapt.objective``).
    """

    def __init__(
        self, policy: Decider, objective: Objective, rates: Sequence[float], warm_tokens: int
    ) -> None:
        self._policy = policy
        self._objective = objective
        self._rates = tuple(rates)
        self._warm_tokens = warm_tokens

    def decide(self, snapshot: Snapshot) -> Decision:
        decision = self._policy.decide(snapshot)
        if not decision.num_steps:
            return decision
        choice = self._objective.choose(snapshot)
        rate = self._rates[choice.objective] if self._rates else decision.learning_rate
        warm = snapshot.tokens_since_loaded / self._warm_tokens if self._warm_tokens else 1.0
        return msgspec.structs.replace(
            decision,
            objective=choice.objective,
            trial=choice.trial,
            learning_rate=rate,
            rate_share=min(1.0, warm),
        )


class TryingTrainer:
    """A trainer that, where a decision asks for a trial, tries every objective and keeps the best.

    From the same state each expert makes the same update, of its own loss and rate; each candidate is
    scored on the newest held-out rows, ``anchors`` of them, and the trainer goes on from the one that
    scored most (the first of equals), to the bit as if it alone had been made. A candidate that says
    nothing finite scores 1: none of its drafts would be accepted. Where no rows are held out (a
    request has just ended) the update is an ordinary one, and the trial waits for the next.

    Two states of the trainer are held while it tries, whatever the number of experts.
    """

    busy = False  # an update is done when it returns

    def __init__(
        self,
        trainer: Trainer,
        rates: Sequence[float],
        scorer: Scorer,
        buffer: Buffer,
        publisher: Publisher,
        anchors: int,
    ) -> None:
        self._trainer = trainer
        self._rates = tuple(rates)
        self._scorer = scorer
        self._buffer = buffer
        self._publisher = publisher
        self._anchors = anchors

    def update(self, batch: SignalBatch, decision: Decision) -> UpdateResult | None:
        held_out = self._buffer.held_out(self._anchors) if decision.trial else None
        if held_out is None:
            return self._trainer.update(batch, decision)
        publisher = self._publisher
        serving = self._score(held_out, publisher.weights_of(publisher.version))
        before = kept = self._trainer.state()
        results: list[UpdateResult] = []
        gains: list[float] = []
        for number, rate in enumerate(self._rates):
            if number:
                self._trainer.restore(before)
            own = msgspec.structs.replace(decision, objective=number, learning_rate=rate)
            result = self._trainer.update(batch, own)
            assert result is not None, "a trainer behind this one updates at once"
            results.append(result)
            gains.append(self._score(held_out, self._trainer.weights()) - serving)
            if gains.index(max(gains)) == number:
                kept = before  # lets go of the best so far: a state is as large as all that trains
                kept = self._trainer.state()
        best = gains.index(max(gains))
        if best != len(gains) - 1:
            self._trainer.restore(kept)
        seconds = sum(result.seconds for result in results)
        return msgspec.structs.replace(results[best], seconds=seconds, trial=tuple(gains))

    def _score(self, rows: SignalBatch, weights: Mapping[str, Tensor]) -> float:
        scores = self._scorer.scores(rows, [weights])
        assert scores is not None, "a scorer beside this one scores at once"
        lengths = scores[0]
        mean = sum(lengths) / len(lengths)
        return mean if math.isfinite(mean) else 1.0

    def finished(self) -> None:
        """Nothing is ever under way."""

    def weights(self) -> Mapping[str, Tensor]:
        return self._trainer.weights()

    def reset(self) -> None:
        self._trainer.reset()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self._trainer.load(weights)

    def state(self) -> Mapping[str, Tensor]:
        return self._trainer.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._trainer.restore(tensors)
