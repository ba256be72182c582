"""A round's drafts put to the target: chains as they are, trees told as the chains that came of them.

Letters: B requests, K drafted tokens, S = K + 1 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosched.engines.embedded.slots import uniforms_for
from cosched.engines.embedded.trees import Forest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.engines.embedded.rows import RowSource
    from cosched.engines.embedded.target import TargetRows
    from cosched.engines.embedded.verifiers import Verifier
    from cosched.records import Proposal


@dataclass(frozen=True, slots=True)
class Verified:
    """What the target said of a round, and what it would say behind it.

    Of request b ``counts[b]`` tokens were verified, the first ``lengths[b]`` of them one behind the other:
    row 0 is the anchor's, row k + 1 is behind token k, of which the first ``accepted[b]`` stand. Of a tree
    these are the path that was accepted and the first choices behind it; the others follow, each row behind
    the token before it and that one's own ancestors. ``depths[b]`` is how far its tree reached.
    """

    rows: TargetRows
    tokens_BK: Tensor
    counts: Sequence[int]
    lengths: Sequence[int]
    depths: Sequence[int]
    accepted: Sequence[int]
    next_B: Tensor


@dataclass(frozen=True, slots=True)
class RoundVerifier:
    """Gets the target's rows, and has the drafts accepted or refused by them."""

    rows: RowSource
    verifier: Verifier

    def verify(
        self,
        proposal: Proposal,
        anchor_B: Tensor,
        starts: Sequence[int],
        drawn_BU: Tensor,
        path_BS: Tensor,
    ) -> Verified:
        """Rows from ``starts`` on, where the anchors are; ``path_BS`` is the text where it is given."""
        num_drafted = proposal.tokens_BK.shape[1]
        starts_B1 = torch.tensor(starts, device=anchor_B.device)[:, None]
        uniforms_BU = uniforms_for(drawn_BU, num_drafted)
        path_BS = path_BS[:, : num_drafted + 1]
        verify = self._chains if proposal.parents_BK is None else self._trees
        return verify(proposal, anchor_B[:, None], starts_B1, uniforms_BU, path_BS)

    def _chains(
        self,
        proposal: Proposal,
        anchor_B1: Tensor,
        starts_B1: Tensor,
        uniforms_BU: Tensor,
        path_BS: Tensor,
    ) -> Verified:
        num_drafted = proposal.tokens_BK.shape[1]
        counts = proposal.counts or (num_drafted,) * len(anchor_B1)
        tokens_BK = self.verifier.tokens(proposal, path_BS[:, :-1])
        ids_BS = torch.cat((anchor_B1, tokens_BK), 1)
        positions_BS = starts_B1 + torch.arange(num_drafted + 1, device=ids_BS.device)
        rows = self.rows.verify(ids_BS, positions_BS, _ragged(proposal))
        outcome = self.verifier.verify(proposal, rows.logits_BTV, uniforms_BU, path_BS)
        accepted = outcome.num_accepted_B.tolist()  # host waits for the device
        return Verified(rows, tokens_BK, counts, counts, counts, accepted, outcome.next_B)

    def _trees(
        self,
        proposal: Proposal,
        anchor_B1: Tensor,
        starts_B1: Tensor,
        uniforms_BU: Tensor,
        path_BS: Tensor,
    ) -> Verified:
        forest = Forest.of(proposal)
        ids_BS = torch.cat((anchor_B1, proposal.tokens_BK), 1)
        positions_BS = starts_B1 + forest.depths_BS
        rows = self.rows.verify(ids_BS, positions_BS, _ragged(proposal), forest.sees_BSS)
        last, next_B = self.verifier.verify_trees(
            proposal, forest, rows.logits_BTV, uniforms_BU, path_BS
        )
        paths, order_BS = forest.told_as_chains(last)
        accepted = [tree.depths[row] for tree, row in zip(forest.trees, last, strict=True)]
        for slot, start in enumerate(starts_B1[:, 0].tolist()):  # host waits for the device
            self.rows.keep(slot, start, [0, *paths[slot][: accepted[slot]]])
        return Verified(
            rows=rows.each(lambda one_BSX: one_BSX.take_along_dim(order_BS[..., None], 1)),
            tokens_BK=ids_BS.gather(1, order_BS)[:, 1:],
            counts=[len(tree.parents) for tree in forest.trees],
            lengths=[len(path) for path in paths],
            depths=[tree.depth for tree in forest.trees],
            accepted=accepted,
            next_B=next_B,
        )


def _ragged(proposal: Proposal) -> list[int] | None:
    """Rows of each request, where they are not all of them."""
    return None if proposal.counts is None else [count + 1 for count in proposal.counts]
