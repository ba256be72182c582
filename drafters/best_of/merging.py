"""One batch in which a model drafts for some requests, and what copies for others.

Chains only: ``BestOfDrafter`` refuses drafters of trees. Letters: B slots, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosched.protocols import Choose
from cosched.records import Proposal

if TYPE_CHECKING:
    from torch import Tensor


class OfChains(Choose):
    """Picks the tokens of chains."""

    def siblings(self, first: int, logits_BRV: Tensor, rows_BW: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("no drafter of trees is one of them")


class Best(OfChains):
    """The likeliest token: what is drafted is not used."""

    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor:  # noqa: ARG002
        return logits_BV.argmax(-1)


class Merging(OfChains):
    """A ``Choose`` that shows a copy's tokens as certain where a copy drafts, and the model's logits else."""

    def __init__(self, choose: Choose, tokens_BK: Tensor, copies_B: Tensor) -> None:
        self._choose = choose
        self._tokens_BK = tokens_BK
        self._copies_B1 = copies_B[:, None]
        self._seen: list[Tensor] = []

    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor | None:
        certain_BV = torch.full_like(logits_BV, -torch.inf)
        certain_BV.scatter_(1, self._tokens_BK[:, k : k + 1], 0.0)
        self._seen.append(torch.where(self._copies_B1, certain_BV, logits_BV))
        return self._choose(k, self._seen[-1])

    def whole(self, proposal: Proposal) -> Proposal:
        """What was chosen, and from what."""
        width = proposal.tokens_BK.shape[1]
        return Proposal(proposal.tokens_BK, torch.stack(self._seen[:width], 1))
