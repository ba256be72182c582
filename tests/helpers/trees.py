"""Drafters of trees for the random target of the tests: with distributions and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cosched.protocols import Choose, Drafter
from cosched.records import Proposal
from tests.helpers.drafts import Lookup

BUSHY = (0, 0, 0, 1, 1, 2, 3, 4, 4)
"""Parents of nine tokens: three behind the anchor, four behind those, two behind the first of these."""


def depths_of(parents: tuple[int, ...]) -> list[int]:
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return depths


class AsTree:
    """A drafter of chains that calls them trees, each token the only one behind its row."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.num_tree_tokens = drafter.num_draft_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(self, state, num_slots: int, choose: Choose, num_draft_tokens: int) -> Proposal:
        proposal = self._drafter.propose(state, num_slots, choose, num_draft_tokens)
        rows_BK = torch.arange(proposal.tokens_BK.shape[1]).expand_as(proposal.tokens_BK)
        return replace(proposal, parents_BK=rows_BK)


class BranchingLookup(Lookup):
    """Behind a token what followed it last, and the tokens after that one by number.

    With ``ragged`` a request whose newest token is odd has a smaller tree than one where it is even.
    """

    def __init__(
        self, vocab_size: int, parents: tuple[int, ...] = BUSHY, ragged: bool = False
    ) -> None:
        self._parents, self._depths = parents, depths_of(parents)
        super().__init__(vocab_size, self._depths[-1])
        self.num_tree_tokens = len(parents)
        self._ragged = ragged

    def propose(self, state, num_slots: int, choose: Choose, num_draft_tokens: int) -> Proposal:
        parents = [
            p for p, d in zip(self._parents, self._depths[1:], strict=True) if d <= num_draft_tokens
        ]
        rows: list[list[int]] = []
        for following, text in state[:num_slots]:
            tokens = text[:1]
            for k, parent in enumerate(parents):
                best = following.get(tokens[parent], tokens[parent] + 1)
                tokens.append((best + parents[:k].count(parent)) % self.vocab_size)
            rows.append(tokens[1:])
        counts = None
        if self._ragged:
            counts = tuple(len(parents) - 2 * (text[0] % 2) for _, text in state[:num_slots])
        tokens_BK = torch.tensor(rows)
        return Proposal(tokens_BK, None, counts, torch.tensor(parents).expand_as(tokens_BK))


class BranchingTable(BranchingLookup):
    """Behind a token a distribution of its own, at random; how far a tree goes follows from its tokens.

    Of two tokens drafted behind the anchor the one that is likelier has two behind it, the other one.
    """

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        super().__init__(vocab_size, (0, 0, 1, 1, 2))
        generator = torch.Generator().manual_seed(seed)
        self.logits_VV = torch.randn(vocab_size, vocab_size, generator=generator)

    def propose(self, state, num_slots: int, choose: Choose, num_draft_tokens: int) -> Proposal:
        anchor_B1 = torch.tensor([text[:1] for _, text in state[:num_slots]])
        first_B1V = self.logits_VV[anchor_B1]
        rows_B2 = torch.zeros(num_slots, 2, dtype=torch.int64)
        tokens_B2 = choose.siblings(0, first_B1V, rows_B2)
        if num_draft_tokens == 1:
            return Proposal(tokens_B2, first_B1V, parents_BK=rows_B2)
        likelier_B = first_B1V[:, 0].gather(1, tokens_B2).argmax(1)
        rows_B3 = torch.stack((torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])))[likelier_B]
        logits_B2V = self.logits_VV[tokens_B2]
        tokens_B3 = choose.siblings(2, logits_B2V, rows_B3)
        return Proposal(
            torch.cat((tokens_B2, tokens_B3), 1),
            torch.cat((first_B1V, logits_B2V), 1),
            parents_BK=torch.cat((rows_B2, rows_B3 + 1), 1),
        )


def rows_of(parents: tuple[int, ...], row: int) -> list[int]:
    """The rows from the anchor to this one."""
    rows = [row]
    while rows[0]:
        rows.insert(0, parents[rows[0] - 1])
    return rows


def as_tensor(parents: tuple[int, ...], num_requests: int = 1) -> Tensor:
    return torch.tensor(parents).repeat(num_requests, 1)
