"""Drafting until no request wants more, where each may want another number of tokens.

Letters: B requests, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

from cosched.engines.embedded.trees import Forest
from cosched.protocols import Choose

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.loop.lengths import DraftLengths
    from cosched.records import Proposal


class Stopping(Choose):
    """A ``Choose`` that looks at how sure the draft is of each token, and ends the draft by it.

    Whether a token is verified follows from what the draft says of its place and from what was seen
    before the round, never from which token it is or whether it is accepted: so sampled text stays the
    target's. ``tops[b]`` are the top probabilities of request b up to the first token that it did not
    want. Of tokens that it is not asked for, and of trees, their places tell how many are verified.
    """

    def __init__(self, choose: Choose, lengths: DraftLengths, num_slots: int) -> None:
        self._choose = choose
        self._lengths = lengths
        self._wanted = [0] * num_slots
        self.tops: list[list[float]] = [[] for _ in range(num_slots)]

    def __call__(self, k: int, logits_BV: Tensor) -> Tensor | None:
        best_B = (logits_BV.amax(-1) - logits_BV.logsumexp(-1)).exp()
        for slot, top in enumerate(best_B.tolist()):  # host waits for the device
            if self._wanted[slot] == k:
                self.tops[slot].append(top)
                self._wanted[slot] = self._lengths.of_request(k + 1, self.tops[slot])
        if k and max(self._wanted) <= k:
            return None
        return self._choose(k, logits_BV)

    def siblings(self, first: int, logits_BRV: Tensor, rows_BW: Tensor) -> Tensor:
        return self._choose.siblings(first, logits_BRV, rows_BW)

    @property
    def asked(self) -> bool:
        """Whether it has seen how sure the draft is."""
        return any(self.tops)

    def cut(self, proposal: Proposal) -> Proposal:
        """The tokens that are verified: as many of each request as it wants."""
        counts, logits, parents = self._wanted, proposal.logits_BKV, proposal.parents_BK
        if parents is not None:
            depths = [tree.depths for tree in Forest.of(proposal).trees]
            wanted = [self._lengths.of_request(depths_S[-1], None) for depths_S in depths]
            counts = [bisect_right(d, most) - 1 for d, most in zip(depths, wanted, strict=True)]
        elif logits is None:
            width = proposal.tokens_BK.shape[1]
            counts = [self._lengths.of_request(width, None) for _ in counts]
        most = max(counts)
        return replace(
            proposal,
            tokens_BK=proposal.tokens_BK[:, :most],
            logits_BKV=None if logits is None else logits[:, :most],
            parents_BK=None if parents is None else parents[:, :most],
            counts=None if min(counts) == most else tuple(counts),
        )
