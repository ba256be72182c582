"""What each of several drafters got accepted in one request, or would have, and whose turn it is.

All is told by committed text: a token that was proposed is accepted with the probability that the target
has for it, which is also how often the text turns out to have it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from drafters.chances import Chances, expected_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MEMORY = 64  # proposals of a drafter after which what was seen of it counts 1 / e as much
PRIOR = 2.0  # proposals that what is only supposed counts for
MODEL = 0.75  # supposed of its first token, so that it is tried before a copy is trusted
COPY = 0.2
EXPLORED = 0.005  # share of the tokens, at most, that trying a model is expected to lose

FAILED, PARTLY, HELD = range(3)
"""What became of a copy's newest proposal: wrong at once, wrong later, or right as far as the text goes."""


@dataclass(slots=True)
class _Copied:
    """A copy's proposal that the text has neither borne out nor refuted yet."""

    drafter: int
    anchor: int
    tokens: Sequence[int]
    cell: tuple[Chances, Chances]


class Record:
    """Of one request: what each drafter is known for, overall and as things stand.

    Text is copied in runs. So a drafter is known for each of three states of affairs, by what became of
    the newest proposal of a copy: for a copy its own, for the model the best of all copies'. Where
    little is known of a state, it is supposed to be like all of them.

    A copy costs nothing, so each proposes in every round and is judged whoever drafts, as the text comes.
    A model costs a pass, so it is judged when it drafts. Where a copy seems better it drafts all the same
    once what that is expected to lose is ``EXPLORED`` of the tokens since: a model that has learnt is found
    out, a hopeless one is hardly ever asked, and a request begins with it.
    """

    def __init__(self, num_drafters: int, model: int | None, num_places: int) -> None:
        self._model = model
        new = partial(Chances, num_places, PRIOR, MEMORY)
        self._overall = [new() for _ in range(num_drafters)]
        self._cells = [[new() for _ in range(3)] for _ in range(num_drafters)]
        self._states = [FAILED] * num_drafters
        self._waiting: list[_Copied] = []
        self._modelled: tuple[tuple[Chances, Chances], int] | None = None
        self._spare = 0.0
        self.length = 0
        self.rounds_without_model = 0  # that the model has not taken in

    def choose(self, number: int, costs: Sequence[float]) -> int:
        """Who drafts so many tokens; drafting costs that much of what verifying them does."""
        tokens = [1 + self._expected(drafter, number) for drafter in range(len(costs))]
        best = max(range(len(costs)), key=lambda one: tokens[one] / (1 + costs[one]))
        model = self._model
        if model is None or model == best:
            return best
        rate = tokens[best] / (1 + costs[best])
        lost = rate * (1 + costs[model]) - tokens[model]
        self._spare += EXPLORED * tokens[best]
        if self._spare < lost:
            return best
        self._spare = 0.0
        return model

    def _expected(self, drafter: int, number: int) -> float:
        """How many of so many tokens are accepted."""
        supposed = self._overall[drafter].after(MODEL if drafter == self._model else COPY)
        cell = self._cells[drafter][self._state(drafter)]
        return expected_tokens(cell.by_place(supposed)[:number])

    def _state(self, drafter: int) -> int:
        return max(self._states) if drafter == self._model else self._states[drafter]

    def propose(self, copies: Mapping[int, Sequence[int]], by_model: int) -> None:
        """What copies propose behind the text, and how many tokens the model drafts, if it does."""
        if by_model:
            assert self._model is not None
            self._modelled = self._cell(self._model), by_model
        for drafter, tokens in copies.items():
            self._waiting.append(_Copied(drafter, self.length - 1, tokens, self._cell(drafter)))

    def _cell(self, drafter: int) -> tuple[Chances, Chances]:
        return self._overall[drafter], self._cells[drafter][self._state(drafter)]

    def observe(self, tokens: Sequence[int]) -> None:
        """A round's new tokens. Of those that were drafted all but the last one were accepted."""
        self.rounds_without_model += 1
        if self._modelled is not None:
            cell, number = self._modelled
            for place in range(min(number, len(tokens))):
                _note(cell, place, place < len(tokens) - 1)
            self._modelled = None
        start, newest = self.length, self.length - 1
        self.length += len(tokens)
        self._waiting = [one for one in self._waiting if self._goes_on(one, start, tokens, newest)]

    def _goes_on(self, one: _Copied, start: int, tokens: Sequence[int], newest: int) -> bool:
        """Hold a proposal against new text; whether there is more of it to come."""
        for position, token in enumerate(tokens, start):
            place = position - one.anchor - 1
            right = one.tokens[place] == token
            _note(one.cell, place, right)
            if one.anchor == newest:
                state = HELD if right else PARTLY if place else FAILED
                self._states[one.drafter] = state
            if not right or place + 1 == len(one.tokens):
                return False
        return True


def _note(cell: tuple[Chances, Chances], place: int, came_true: bool) -> None:
    for chances in cell:
        if place == 0:  # one more proposal: those before count less
            chances.fade()
        chances.note(place, came_true)
