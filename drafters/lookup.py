"""What followed where the end of a text stood before: the search of drafters that copy.

No index is kept. Every place of a text is compared with its last token, and the places that are left
with the tokens before it: a few passes over an array of integers, which cost less than the upkeep of an
index until a text has some hundred thousand tokens.

Letters: B slots, T tokens of a text, S tokens of its end, M places, K drafted tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cosched.records import Segment

    Tokens = NDArray[np.int32]

TOKEN_BYTES = np.dtype(np.int32).itemsize
END = -1
"""Behind a text that is kept beside others: no token, and nothing is copied across it."""
MOST_PLACES = 4096
"""So many of the latest places are compared further back, which bounds the time of a search."""


class Matches(NamedTuple):
    """Places where the end of a text stood before, in the order of the text.

    ``follows_M`` are the indices of the tokens that followed, ``lengths_M`` how many tokens agree.
    """

    follows_M: NDArray[np.int64]
    lengths_M: NDArray[np.int64]


def find(tokens_T: Tokens, end_S: Tokens, most: int) -> Matches:
    """Places of ``tokens_T`` where ``end_S`` ends and a token follows, and how far it agrees there.

    At least its last token does; tokens before the last ``most`` are not compared.
    """
    at_M = np.flatnonzero((tokens_T[:-1] == end_S[-1]) & (tokens_T[1:] != END))[-MOST_PLACES:]
    lengths_M = np.ones(len(at_M), np.int64)
    alive = np.arange(len(at_M))
    for back in range(1, min(most, len(end_S))):
        alive = alive[at_M[alive] >= back]
        alive = alive[tokens_T[at_M[alive] - back] == end_S[-1 - back]]
        if not len(alive):
            break
        lengths_M[alive] += 1
    return Matches(at_M + 1, lengths_M)


def follow(tokens_T: Tokens, start: int, number: int) -> Tokens:
    """``number`` tokens from ``start`` on, or those up to an ``END``.

    The last text begins at ``start`` again where it is too short, as a loop does.
    """
    copied_K = np.resize(tokens_T[start : start + number], number)
    return copied_K[np.logical_and.accumulate(copied_K != END)]


class Branches(NamedTuple):
    """Continuations of unequal length side by side, as one tree behind the newest token.

    Token k is the one of ``places[k]``, branch and place in it, and comes behind row ``parents[k]``.
    """

    places: list[tuple[int, int]]
    parents: list[int]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Branches:
        """The tree of branches that are so long, level by level."""
        numbered = list(enumerate(lengths))
        places = [(b, at) for at in range(max(lengths)) for b, length in numbered if at < length]
        rows = {place: k + 1 for k, place in enumerate(places)}
        return cls(places, [rows.get((b, at - 1), 0) for b, at in places])


class Texts(NamedTuple):
    """The text of each slot, its newest token included."""

    tokens_BT: NDArray[np.int32]
    lengths_B: NDArray[np.int64]
    window: int | None  # how many of the last tokens are looked at

    @classmethod
    def empty(cls, max_batch: int, max_length: int, window: int | None) -> Texts:
        """Room for so many texts of so many tokens."""
        return cls(
            np.zeros((max_batch, max_length + 1), np.int32), np.zeros(max_batch, np.int64), window
        )

    def extend(self, slot: int, segment: Segment) -> None:
        """Take in the tokens of a segment; the first of a request begins its text anew."""
        end = segment.start + len(segment.tokens_R1)
        # Host waits for the device.
        self.tokens_BT[slot, segment.start : end] = segment.tokens_R1.cpu().numpy()
        self.lengths_B[slot] = end

    def whole(self, slot: int) -> Tokens:
        """The text of a slot."""
        return self.tokens_BT[slot, : self.lengths_B[slot]]

    def of(self, slot: int) -> Tokens:
        """What the draft may look at of it: all, or the last tokens."""
        text_T = self.whole(slot)
        return text_T if self.window is None else text_T[-self.window :]

    def move(self, source: int, destination: int) -> None:
        """The text in one slot goes on in another, and the first is empty."""
        length = self.lengths_B[source]
        self.tokens_BT[destination, :length] = self.tokens_BT[source, :length]
        self.lengths_B[destination], self.lengths_B[source] = length, 0
