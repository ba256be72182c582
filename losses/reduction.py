"""From losses of rows to one number: row weights and the weighted mean.

Letters: R requests, N anchors, K drafted positions, V draft vocabulary, M = R * N * K rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cosched.protocols import LossSettings
from losses.chunked import chunked


class RowLoss(ABC):
    """A loss that is a function of single rows; the reduction is the same for all of them."""

    Settings: type[LossSettings] = LossSettings
    proper: bool = True
    detaches: bool = False

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self.detaches = self.detaches or settings.acceptance_prefix

    @abstractmethod
    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]``, from logits over the same vocabulary."""

    def __call__(self, student_RNKV: Tensor, teacher_RNKV: Tensor, weights_RNK: Tensor) -> Tensor:
        student_MV, teacher_MV = student_RNKV.flatten(0, 2), teacher_RNKV.flatten(0, 2)
        weights_RNK = self.weights(student_MV, teacher_MV, weights_RNK)
        loss_M = chunked(self.rows, student_MV, teacher_MV, self.settings.chunk_rows)
        return weighted_mean(loss_M, weights_RNK.flatten())

    @torch.no_grad()
    def weights(self, student_MV: Tensor, teacher_MV: Tensor, weights_RNK: Tensor) -> Tensor:
        """What each row counts ``[R, N, K]``: its own weight times those of the settings."""
        settings = self.settings
        weighted_RNK = decayed(weights_RNK, settings.position_decay)
        if settings.acceptance_prefix or settings.hardest_share < 1:
            alpha_M = chunked(acceptance, student_MV, teacher_MV, settings.chunk_rows)
            alpha_RNK = alpha_M.view_as(weights_RNK)
            if settings.hardest_share < 1:
                weighted_RNK = hardest(weighted_RNK, 1 - alpha_RNK, settings.hardest_share)
            if settings.acceptance_prefix:
                reached_RNK = reached(alpha_RNK.masked_fill(weights_RNK == 0, 1))
                weighted_RNK = weighted_RNK * reached_RNK
        return weighted_RNK


def acceptance(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    """Chance that a sampled draft is accepted ``[M]``: ``sum(min(p, q))``, arXiv 2211.17192."""
    return torch.minimum(student_MV.softmax(-1), teacher_MV.softmax(-1)).sum(-1)


def decayed(weights_RNK: Tensor, position_decay: float) -> Tensor:
    """Weight drafted position k by ``position_decay ** k``.

    A draft counts only if all before it were accepted, so later positions matter less: with a
    per-position acceptance of about ``position_decay`` this is the chance that it is looked at.
    """
    k = torch.arange(weights_RNK.shape[-1], device=weights_RNK.device)
    return weights_RNK * position_decay**k


def reached(alpha_RNK: Tensor) -> Tensor:
    """Chance that a drafted position is looked at: the product of the acceptances before it."""
    return torch.cat((torch.ones_like(alpha_RNK[..., :1]), alpha_RNK[..., :-1]), -1).cumprod(-1)


def hardest(weights_RNK: Tensor, gap_RNK: Tensor, share: float) -> Tensor:
    """Keep that share of the rows that count, rounded up: those with the largest gap.

    Rows that agree already have nothing to teach, and many of them drown the others. AdaSPEC (arXiv
    2510.19779) ranks rows by how far the draft is behind a reference draft; here there is none, and
    the gap is to the target itself.
    """
    counts_M = weights_RNK.flatten() > 0
    gap_M = gap_RNK.flatten().masked_fill(~counts_M, -1)  # a gap is never negative
    rank_M = gap_M.argsort(descending=True, stable=True).argsort()
    kept_M = rank_M < share * counts_M.sum()
    return weights_RNK * kept_M.view_as(weights_RNK)


def weighted_mean(loss_M: Tensor, weights_M: Tensor) -> Tensor:
    """``sum(w * loss) / sum(w)``; rows of weight zero neither count nor pass a gradient on.

    A masked row may hold anything, infinities included, so it is replaced, not multiplied. Where
    all are masked (a rank's share of a small batch may be) the loss is zero.
    """
    kept_M = torch.where(weights_M > 0, loss_M, torch.zeros_like(loss_M))
    smallest = torch.finfo(weights_M.dtype).tiny
    return (kept_M * weights_M).sum() / weights_M.sum().clamp_min(smallest)
