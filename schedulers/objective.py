"""Objectives: which loss and which learning rate an update is made with."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated

from msgspec import Meta

from cosched.protocols import ExpertSettings, Objective, ObjectiveSettings
from cosched.records import Choice, Snapshot
from cosched.registry import OBJECTIVES

GOLDEN = (math.sqrt(5) - 1) / 2


@OBJECTIVES.register("fixed")
class Fixed(Objective):
    """What ``adapt.loss`` and ``adapt.trainer.lr`` say, always."""

    Settings = ObjectiveSettings

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    def choose(self, snapshot: Snapshot) -> Choice:  # noqa: ARG002  the role's signature
        return Choice()


class HedgeSettings(ExpertSettings, frozen=True, kw_only=True):
    """All ``experts`` are tried in every ``every_updates``-th update, which costs as many updates.

    ``eta`` is per token: an expert that is 1 / ``eta`` tokens behind in the sum of its trials weighs
    1 / e as much. A trial counts ``discount`` times as much with each one after it. What trials have
    shown outlives the draft's state: with ``adapt.scope.state: per_request`` the next request begins
    from it. ``adapt.guard`` has to be ``shadow``, by whose scores and rows the experts are compared.
    """

    every_updates: Annotated[int, Meta(ge=1)] = 8
    eta: Annotated[float, Meta(gt=0)] = 64.0
    discount: Annotated[float, Meta(gt=0, le=1)] = 0.9


@OBJECTIVES.register("hedge")
class Hedge(Objective):
    r"""Hedge: takes experts in proportion to the exponential of what they brought in trials.

    .. math:: w_i \propto \exp(\eta S_i), \quad S_i = \sum_t \gamma^{T - t} g_{ti}

    g is the expected acceptance length after one update with expert i above that of the serving
    draft, on held-out rows (``cosched.training.trying``). Every expert is scored in every trial, so
    nothing has to be explored. With gamma = 1 and gains within B of one another, what the weights
    bring in T trials falls behind the best single expert by at most ``ln(N) / eta + eta T B^2 / 8``, whatever
    the text does (Freund and Schapire, J. Comput. Syst. Sci. 55, 1997; over learning rates of drafts:
    OnlineSPEC, arXiv 2603.12617). A gamma below 1 forgets, so that it follows text that moves on; of
    trials older than the 64 newest nothing is known.

    One expert makes all updates until the next trial. Which one is not drawn by chance: behind the
    n-th trial it is where the fractional part of n (sqrt(5) - 1) / 2 falls among the weights, so that
    turns are spread evenly, each in proportion to its weight, and the same snapshot gives the same
    choice. The update of a trial itself is that of its best expert.
    """

    Settings = HedgeSettings

    def __init__(self, settings: HedgeSettings) -> None:
        self.settings = settings

    def choose(self, snapshot: Snapshot) -> Choice:
        due = snapshot.updates_since_trial + 1 >= self.settings.every_updates
        if not snapshot.num_trials:
            return Choice(trial=True)
        at = math.fmod(snapshot.num_trials * GOLDEN, 1)
        reached = accumulate(self.weights(snapshot))
        behind = sum(weight <= at for weight in reached)
        return Choice(min(behind, len(self.settings.experts) - 1), trial=due)

    def weights(self, snapshot: Snapshot) -> list[float]:
        """The share of each expert; they sum to 1."""
        sums = [0.0] * len(self.settings.experts)
        for gains in snapshot.trials:
            kept = zip(sums, gains, strict=True)
            sums = [self.settings.discount * before + gain for before, gain in kept]
        best = max(sums)
        powers = [math.exp(self.settings.eta * (total - best)) for total in sums]
        return [power / sum(powers) for power in powers]
