"""How drafted tokens are picked from the draft's logits.

Letters: B requests, K drafted tokens, R rows with logits, W tokens of a level of a tree, V vocabulary,
U random numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosched.engines.embedded.verification import draw, probabilities
from cosched.protocols import Choose

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.engines.embedded.verification import SamplingParams


class Best(Choose):
    """The best token; of siblings the best, the second and so on."""

    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor | None:  # noqa: ARG002
        return logits_BV.argmax(-1)

    def siblings(self, first: int, logits_BRV: Tensor, rows_BW: Tensor) -> Tensor:  # noqa: ARG002
        same_BWW = rows_BW[..., None] == rows_BW[:, None]
        rank_BW = same_BWW.tril(-1).sum(-1)
        best_BRW = logits_BRV.topk(rows_BW.shape[1], -1).indices
        at_B1 = torch.arange(len(rows_BW), device=rows_BW.device)[:, None]
        return best_BRW[at_B1, rows_BW, rank_BW]


class Drawn(Choose):
    """Drawn from the draft's distribution; siblings one after the other, with replacement or without.

    Token k is drawn with the number ``uniforms_BU[:, k]``, wherever it stands.
    """

    def __init__(self, sampling: SamplingParams, uniforms_BU: Tensor, replacement: bool) -> None:
        self._sampling = sampling
        self._uniforms_BU = uniforms_BU
        self._replacement = replacement

    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor | None:
        weights_BV = probabilities(logits_BV, self._sampling, cut=False)
        return draw(weights_BV, self._uniforms_BU[:, k])

    def siblings(self, first: int, logits_BRV: Tensor, rows_BW: Tensor) -> Tensor:
        weights_BRV = probabilities(logits_BRV, self._sampling, cut=False)
        at_B = torch.arange(len(rows_BW), device=rows_BW.device)
        tokens: list[Tensor] = []
        for w in range(rows_BW.shape[1]):
            row_B = rows_BW[:, w]
            token_B = draw(weights_BRV[at_B, row_B], self._uniforms_BU[:, first + w])
            if not self._replacement:
                weights_BRV[at_B, row_B, token_B] = 0.0
            tokens.append(token_B)
        return torch.stack(tokens, 1)


class Led(Best):
    """The text's own tokens, where it is given; a tree has no place for them, and its best ones."""

    def __init__(self, path_BK: Tensor) -> None:
        self._path_BK = path_BK

    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor | None:  # noqa: ARG002
        return self._path_BK[:, k]
