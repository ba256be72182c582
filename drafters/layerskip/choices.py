"""Which layers to leave out: a few sets of them, and how well drafting without each has gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drafters.chances import Chances, expected_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    Layers = tuple[int, ...]

SHARES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65)  # of the layers
STRETCH = 16  # rounds that a set stays, so that nothing is decided on a few tokens
PRIOR = 4.0  # rounds that what is supposed counts for
MEMORY = 512  # rounds after which what was seen counts 1 / e as much, so that all are tried again


def skipped_sets(num_layers: int) -> list[Layers]:
    """Sets of M layers to leave out, several of each size; the first layer is in none.

    A block that ends before the last two: deep layers change least (ShortGPT, arXiv 2403.03853). As many,
    spread evenly, as searches find them (SWIFT, arXiv 2410.06916). And the last M: early exit, for
    targets that were trained for it (LayerSkip, arXiv 2404.16710).
    """
    found: dict[Layers, None] = {}
    inner = range(1, max(2, num_layers - 2))
    for number in [max(1, round(share * num_layers)) for share in SHARES]:
        if number <= len(inner):
            step = len(inner) / number
            found[tuple(inner[-number:])] = None
            found[tuple(inner[int((place + 0.5) * step)] for place in range(number))] = None
        if number < num_layers:
            found[tuple(range(num_layers - number, num_layers))] = None
    return list(found)


class Choices:
    """How drafting without each set has gone, and which of them is next.

    The best commits most tokens per layer that is run, or so it seems: with a_j the share of drafts at place
    j that was accepted where all before were, and c the share of the target's work that is left,
    (1 + sum_k prod_{j <= k} a_j) / (1 + K c) for the K that were asked for last (DEL, arXiv 2504.05598, which
    chooses the length by it as well; here ``drafter.length`` does, on what this draft comes to).

    What is ``supposed`` of a set is rather too good than too bad. So each that might be the best is tried
    until it is known not to be, and again when that has faded.
    """

    def __init__(self, supposed: Sequence[float], costs: Sequence[float], num_places: int) -> None:
        self._supposed = supposed
        self._costs = costs
        self._chances = [Chances(num_places, PRIOR, MEMORY) for _ in costs]
        self._current, self._left, self._asked = 0, 0, num_places

    def choose(self, number: int) -> int:
        """The set to leave out in a round that drafts so many tokens."""
        if not self._left:
            sets, asked = range(len(self._costs)), self._asked
            self._current = max(sets, key=lambda one: self._tokens_per_cost(one, asked))
            self._left = STRETCH
        self._left, self._asked = self._left - 1, number
        return self._current

    def _tokens_per_cost(self, one: int, number: int) -> float:
        tokens = 1 + expected_tokens(self._chances[one].after(self._supposed[one])[:number])
        return tokens / (1 + number * self._costs[one])

    def observe(self, one: int, drafted: int, accepted: int) -> None:
        """A request's round: so many tokens were drafted without that set, and so many accepted."""
        for chances in self._chances:
            chances.fade()
        for place in range(min(drafted, accepted + 1)):
            self._chances[one].note(place, place < accepted)
