"""From losses of rows to one number: row masks, position decay and the weighted mean.

Letters: R requests, N anchors, K drafted positions, V draft vocabulary, M = R * N * K rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cosched.protocols import LossSettings


class RowLoss(ABC):
    """A loss that is a function of single rows; the reduction is the same for all of them."""

    Settings: type[LossSettings] = LossSettings
    proper: bool = True
    detaches: bool = False

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    @abstractmethod
    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]``, from logits over the same vocabulary."""

    def __call__(self, student_RNKV: Tensor, teacher_RNKV: Tensor, weights_RNK: Tensor) -> Tensor:
        weights_M = decayed(weights_RNK, self.settings.position_decay).flatten()
        return weighted_mean(
            self.rows(student_RNKV.flatten(0, 2), teacher_RNKV.flatten(0, 2)), weights_M
        )


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


def weighted_mean(loss_M: Tensor, weights_M: Tensor) -> Tensor:
    """``sum(w * loss) / sum(w)``; rows of weight zero neither count nor pass a gradient on.

    A masked row may hold anything, infinities included, so it is replaced, not multiplied. Where
    all are masked (a rank's share of a small batch may be) the loss is zero.
    """
    kept_M = torch.where(weights_M > 0, loss_M, torch.zeros_like(loss_M))
    smallest = torch.finfo(weights_M.dtype).tiny
    return (kept_M * weights_M).sum() / weights_M.sum().clamp_min(smallest)
