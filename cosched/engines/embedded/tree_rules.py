"""Lossless verification of trees: which drafted tokens stand, and what is left to draw the next one from.

The walk begins at the anchor. The tokens drafted behind a row are tried in order; the first that is
accepted is where the walk goes on, and behind the last row it came to the target's own token follows.
Greedy, a token stands if it is the target's best. Sampled, there are two rules, and with either the whole
is exactly p, the target's distribution:

``recursive``      siblings were drawn one after the other from the draft's q without replacement. x stands
                   with probability min(1, p(x) / q(x)); where it does not, p becomes max(p - q, 0) and q
                   loses x, both over their sums (recursive rejection sampling, arXiv 2402.14160). Tokens
                   proposed with certainty have q(x) = 1 each: x stands with p(x), and p loses x if not.
``k_sequential``   siblings were drawn independently from q. Each stands with min(1, p(x) / (g q(x))), and
                   behind k that do not the next is drawn from p - min(q, p / g) (1 - (1 - b)^k) / b, with
                   b = sum min(q, p / g) and the least g for which that is no less than 0 (SpecTr, arXiv
                   2310.15141).

A chain is a tree of width one: of both rules speculative sampling is left, to the bit.

Letters: K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

TreeRule = Literal["recursive", "k_sequential"]

Accepts = Callable[[int, Tensor | float, Tensor], bool]
"""``accepts(k, q, p)``: the verdict on token k, which is to be accepted with probability min(1, p / q)."""

BISECTIONS = 24  # of the interval in which a factor lies: a wider one is as exact, and accepts less


class AtRow(Protocol):
    """What is known at the row where the walk stands."""

    @abstractmethod
    def odds(self, token: int) -> tuple[Tensor | float, Tensor] | None:
        """The draft's and the target's chance of the next child; None where the draft cannot have drawn it."""

    @abstractmethod
    def refuse(self, token: int) -> None:
        """It was not accepted."""

    @abstractmethod
    def left(self) -> Tensor:
        """What the next token is drawn from if no child is accepted any more: weights ``[V]``."""


def walk(
    tokens: Sequence[int],
    parents: Sequence[int],
    at_row: Callable[[int, int], AtRow],
    accepts: Accepts,
) -> tuple[int, Tensor]:
    """The last row that stands, 0 for the anchor's, and weights ``[V]`` of the token behind it.

    ``at_row(row, number)`` begins at a row with so many children.
    """
    children = Counter(parents)
    row, here = 0, at_row(0, children[0])
    for k, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent != row or (odds := here.odds(token)) is None:
            continue
        if accepts(k, *odds):
            row = k + 1
            here = at_row(row, children[row])
        else:
            here.refuse(token)
    return row, here.left()


def walk_greedy(tokens: Sequence[int], parents: Sequence[int], says: Sequence[int]) -> int:
    """The last row that stands where row s says ``says[s]``."""
    row = 0
    for k, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == row and token == says[row]:
            row = k + 1
    return row


class Recursive(AtRow):
    """Recursive rejection; without ``q_V`` each child was proposed with certainty.

    What is left is kept with its sum beside it, not divided by it: the first child is tried with the very
    numbers that a chain is.
    """

    def __init__(self, p_V: Tensor, q_V: Tensor | None) -> None:
        self._p_V, self._q_V = p_V, q_V
        self._p_sum: Tensor | float = 1.0
        self._q_sum: Tensor | float = 1.0

    def odds(self, token: int) -> tuple[Tensor | float, Tensor] | None:
        if self._q_V is None:
            return 1.0 * self._p_sum, self._p_V[token]
        q = self._q_V[token]
        return None if q == 0 else (q * self._p_sum, self._p_V[token] * self._q_sum)

    def refuse(self, token: int) -> None:
        if self._q_V is None:
            q_V = torch.zeros_like(self._p_V)
            q_V[token] = 1.0
        else:
            q_V = self._q_V / self._q_sum
            self._q_V = self._q_V.clone()
            self._q_V[token] = 0.0
            self._q_sum = self._q_V.sum()
        left_V = (self._p_V / self._p_sum - q_V).clamp_min(0)
        # p == q to the last bit leaves nothing; then p itself is what is left.
        if (total := left_V.sum()) > 0:
            self._p_V, self._p_sum = left_V, total

    def left(self) -> Tensor:
        return self._p_V


class KSequential(AtRow):
    """k-sequential selection among ``number`` children that were drawn independently."""

    def __init__(self, p_V: Tensor, q_V: Tensor, number: int) -> None:
        self._p_V, self._q_V, self._number = p_V, q_V, number
        self._factor = _least_factor(p_V, q_V, number)

    def odds(self, token: int) -> tuple[Tensor, Tensor] | None:
        q = self._q_V[token]
        return None if q == 0 else (q * self._factor, self._p_V[token])

    def refuse(self, token: int) -> None:
        """The others are tried as it was."""

    def left(self) -> Tensor:
        taken_V = torch.minimum(self._q_V, self._p_V / self._factor)
        left_V = (self._p_V - taken_V * _tries(float(taken_V.sum()), self._number)).clamp_min(0)
        return left_V if left_V.sum() > 0 else self._p_V


def _tries(accepted: float, number: int) -> float:
    """``(1 - (1 - b)^k) / b``: of k children, how many are expected to be tried."""
    return sum((1 - accepted) ** tried for tried in range(number))


def _least_factor(p_V: Tensor, q_V: Tensor, number: int) -> float:
    """The least g, from 1 to k, with which no token is accepted too often: that is ``_tries(b) <= g``."""

    def fits(factor: float) -> bool:
        return _tries(float(torch.minimum(q_V, p_V / factor).sum()), number) <= factor

    low, high = 1.0, float(max(1, number))
    if fits(low):
        return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
