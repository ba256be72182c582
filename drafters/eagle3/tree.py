"""How a head drafts a tree: the likeliest paths, level by level, each row seeing what it stands behind.

Letters: B slots, R rows of a level, W tokens behind them, T tokens of a tree so far, L cache length,
E model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosched.records import Proposal
from drafters.attention import attend_cache

if TYPE_CHECKING:
    from cosched.protocols import Choose
    from drafters.cache import SlotCache
    from drafters.eagle3.network import Eagle3Network


class GrowingTree:
    """The trees of all slots, ``width`` tokens a level, behind each slot's ``newest`` row.

    Behind which rows the tokens of a level come follows from the logits and from the tokens that are there;
    which tokens they are has no part in it, so they may be drawn (``cosched.protocols.Choose``). The rows
    of a level are kept in their slot's cache, behind its text and the levels before.
    """

    def __init__(
        self, newest: list[int], width: int, window: int | None, device: torch.device
    ) -> None:
        self._newest = newest
        self._newest_B1 = torch.tensor(newest, device=device)[:, None]
        self._at_B1 = torch.arange(len(newest), device=device)[:, None]
        self._width = width
        self._window = window
        self._scores_BR = torch.zeros(len(newest), 1, device=device)  # log of how likely a path is
        self._sees_BRT = torch.zeros(len(newest), 1, 0, dtype=torch.bool, device=device)
        self._itself_WW = torch.eye(width, dtype=torch.bool, device=device)
        self._tokens: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._parents: list[Tensor] = []

    def grow(self, choose: Choose, logits_BRV: Tensor, hidden_BRE: Tensor) -> tuple[Tensor, Tensor]:
        """One level more, behind rows with these logits: its tokens ``[B, W]``, each with its row's hidden."""
        depth, width = len(self._tokens), self._width
        said_BRV = logits_BRV.log_softmax(-1)
        paths_BN = (self._scores_BR[..., None] + said_BRV.topk(width).values).flatten(1)
        rows_BW = paths_BN.topk(width).indices // width
        tokens_BW = choose.siblings(depth * width, logits_BRV, rows_BW)
        at_B1 = self._at_B1
        self._scores_BR = self._scores_BR.gather(1, rows_BW) + said_BRV[at_B1, rows_BW, tokens_BW]
        itself_BWW = self._itself_WW.expand(len(rows_BW), -1, -1)
        self._sees_BRT = torch.cat((self._sees_BRT[at_B1, rows_BW], itself_BWW), -1)
        self._tokens.append(tokens_BW)
        self._logits.append(logits_BRV)
        self._parents.append(rows_BW + (1 + (depth - 1) * width if depth else 0))
        return tokens_BW, hidden_BRE[at_B1, rows_BW]

    def proposal(self) -> Proposal:
        """What has grown."""
        tokens, logits, parents = self._tokens, self._logits, self._parents
        return Proposal(
            torch.cat(tokens, 1), torch.cat(logits, 1), parents_BK=torch.cat(parents, 1)
        )

    @property
    def starts(self) -> list[int]:
        """Where the newest level's rows are kept in each slot's cache."""
        before = (len(self._tokens) - 1) * self._width
        return [row + 1 + before for row in self._newest]

    def positions(self) -> Tensor:
        """Of the newest level's rows in the text ``[B, W]``."""
        return (self._newest_B1 + len(self._tokens)).expand(-1, self._width)

    def visible(self) -> Tensor:
        """Which places of the cache they see ``[B, W, L]``: the text, their ancestors and themselves."""
        depth, sees_BWT = len(self._tokens), self._sees_BRT
        at_T = torch.arange(sees_BWT.shape[-1], device=sees_BWT.device)
        at_L = torch.arange(max(self._newest) + 1 + len(at_T), device=at_T.device)
        text_BL = at_L <= self._newest_B1
        if self._window is not None:
            text_BL = text_BL & (at_L > self._newest_B1 + depth - self._window)
            sees_BWT = sees_BWT & (at_T // self._width + 1 > depth - self._window)
        places_BWT = (self._newest_B1 + 1 + at_T)[:, None].expand_as(sees_BWT)
        return text_BL[:, None].repeat(1, self._width, 1).scatter(2, places_BWT, sees_BWT)


def run_level(
    network: Eagle3Network,
    state: SlotCache,
    tree: GrowingTree,
    embedded_BWE: Tensor,
    hidden_BWE: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the head reads of a tree's newest level and what is fed on, both ``[B, W, E]``."""
    visible_BWL, positions_BW = tree.visible(), tree.positions()
    num_slots, seen = len(embedded_BWE), slice(visible_BWL.shape[-1])
    inputs, residual = network.inputs(embedded_BWE, hidden_BWE)
    for layer in range(network.top + 1):
        if layer:
            inputs, residual = network.inputs_above(hidden_BWE, layer)
        queries, keys, values = network.project(inputs, positions_BW, layer)
        state.put(layer, tree.starts, keys, values)
        attended = attend_cache(
            queries,
            state.keys_YBHLD[layer, :num_slots, :, seen],
            state.values_YBHLD[layer, :num_slots, :, seen],
            visible_BWL,
        )
        hidden_BWE = network.finish(residual, attended, layer)
    return network.outputs(hidden_BWE)
