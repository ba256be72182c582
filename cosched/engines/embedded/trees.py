"""Drafts that are trees: who is behind whom, where, and what a round of them comes to as a chain.

A request's rows are counted from its anchor, row 0; row k + 1 is behind drafted token k. A row's *place* is
where the cache keeps it, in the order of rows; its *position* in the text goes by its depth. It sees the
text up to the anchor, its ancestors and itself.

Letters: B requests, K drafted tokens, S = K + 1 rows, L places in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosched.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.records import Proposal


@dataclass(frozen=True, slots=True)
class Tree:
    """One request's: the parent of each of its tokens, and the depth of each of its rows."""

    parents: list[int]
    depths: list[int]

    @property
    def depth(self) -> int:
        return self.depths[-1]  # level by level: none is deeper than the last

    def path(self, row: int) -> list[int]:
        """The rows from behind the anchor to this one, and on by first children to a leaf."""
        before: list[int] = []
        at = row
        while at:
            before.append(at)
            at = self.parents[at - 1]
        after: list[int] = []
        for token, parent in enumerate(self.parents):
            if parent == row:
                row = token + 1
                after.append(row)
        return before[::-1] + after


class Forest:
    """The trees of a round, one for each request; of each the tokens that are verified."""

    def __init__(self, trees: Sequence[Tree], num_rows: int, device: torch.device) -> None:
        self.trees = trees
        shape = len(trees), num_rows
        depths, sees = np.zeros(shape, np.int64), np.zeros((*shape, num_rows), np.bool_)
        sees[:] = np.eye(num_rows)  # rows that are not verified see themselves alone
        for b, tree in enumerate(trees):
            depths[b, : len(tree.depths)] = tree.depths
            for token, parent in enumerate(tree.parents):
                sees[b, token + 1] |= sees[b, parent]
        self.depths_BS = torch.from_numpy(depths).to(device)
        self.sees_BSS = torch.from_numpy(sees).to(device)

    @classmethod
    def of(cls, proposal: Proposal) -> Forest:
        """The trees that a drafter proposes.

        Raises:
            PluginError: some are none, or their tokens are not in order.
        """
        assert proposal.parents_BK is not None
        num_tokens = proposal.tokens_BK.shape[1]
        counts = proposal.counts or (num_tokens,) * len(proposal.tokens_BK)
        if proposal.parents_BK.shape != proposal.tokens_BK.shape:
            raise PluginError(
                f"a drafter proposed {tuple(proposal.tokens_BK.shape)} tokens and "
                f"{tuple(proposal.parents_BK.shape)} parents; each token needs one"
            )
        parents = proposal.parents_BK.tolist()  # host waits for the device
        trees = [_tree(own[:count]) for own, count in zip(parents, counts, strict=True)]
        return cls(trees, num_tokens + 1, proposal.tokens_BK.device)

    def told_as_chains(self, last_rows: Sequence[int]) -> tuple[list[list[int]], Tensor]:
        """The path through each accepted row, and all rows in the order of telling ``[B, S]``.

        First the anchor, then the path: what was accepted and the first choices behind it, as a chain
        would have had them. Then the others.
        """
        num_rows = self.depths_BS.shape[1]
        paths = [tree.path(row) for tree, row in zip(self.trees, last_rows, strict=True)]
        order: list[list[int]] = []
        for path in paths:
            told = [0, *path]
            order.append(told + sorted(set(range(num_rows)).difference(told)))
        return paths, torch.tensor(order, device=self.depths_BS.device)


def _tree(parents: list[int]) -> Tree:
    depths = [0]
    for token, parent in enumerate(parents):
        if not 0 <= parent <= token:
            raise PluginError(
                f"a drafter proposed token {token} of a tree behind row {parent}; it can be behind the "
                f"anchor, row 0, or an earlier token k, row k + 1"
            )
        depths.append(depths[parent] + 1)
        if depths[-1] < depths[-2]:
            raise PluginError(
                f"a drafter proposed token {token} of a tree at depth {depths[-1]}, behind one at depth "
                f"{depths[-2]}; tokens come level by level"
            )
    return Tree(parents, depths)


def visible_in_trees(
    positions_BS: Tensor, sees_BSS: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Which places each row sees ``[B, S, L]``, and the place of each row ``[B, S]``.

    Row 0 is the anchor, at the place of its position; those behind it follow it in the cache. With a
    ``window`` a row sees so many positions back, itself included.
    """
    num_rows, anchors_B1 = positions_BS.shape[1], positions_BS[:, :1]
    places_BS = anchors_B1 + torch.arange(num_rows, device=positions_BS.device)
    num_places = int(anchors_B1.max()) + num_rows  # host waits for the device
    at_L = torch.arange(num_places, device=positions_BS.device)
    mask_BSL = (at_L < anchors_B1[..., None]).repeat(1, num_rows, 1)
    if window is not None:
        mask_BSL &= at_L > positions_BS[..., None] - window
        sees_BSS = sees_BSS & (positions_BS[:, None] > positions_BS[..., None] - window)
    return mask_BSL.scatter(2, places_BS[:, None].expand_as(sees_BSS), sees_BSS), places_BS
