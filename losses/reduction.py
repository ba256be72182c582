"""From losses of rows to one number: row weights and the weighted mean.

Letters: R requests, N anchors, K drafted positions, V draft vocabulary, M rows (all R * N * K of
them, or a few at a time), Q what is kept of each row.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from cosched.protocols import Loss, LossSettings


class ReducedLoss(Loss):
    """A loss whose rows are valued one by one; the reduction is the same for all of them."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self.detaches = self.detaches or settings.acceptance_prefix

    @abstractmethod
    def values(self, student_MV: Tensor, teacher_MV: Tensor, reference_MV: Tensor | None) -> Tensor:
        """Loss of each row ``[M]``, from logits over the same vocabulary."""

    def accepted(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Chance that what is drafted in a row is accepted ``[M]``, by which rows are weighed."""
        return acceptance(student_MV, teacher_MV)

    def measure(
        self, student_MV: Tensor, teacher_MV: Tensor, reference_MV: Tensor | None = None
    ) -> Tensor:
        """What ``reduce`` needs of each row ``[M, Q]``: its loss, and its acceptance if it weighs."""
        if not self._weighs_by_acceptance:
            return self.values(student_MV, teacher_MV, reference_MV)[:, None]
        with torch.no_grad():  # first: what it needs is gone before the graph of the values is made
            alpha_M = self.accepted(student_MV, teacher_MV)
        return torch.stack((self.values(student_MV, teacher_MV, reference_MV), alpha_M), -1)

    def reduce(self, measured_RNKQ: Tensor, weights_RNK: Tensor) -> Tensor:
        """The weighted mean of what was measured; rows of weight zero may hold anything."""
        value_RNK, *others = measured_RNKQ.unbind(-1)
        alpha_RNK = others[0] if others else None
        return weighted_mean(value_RNK, self.weights(alpha_RNK, weights_RNK))

    def __call__(
        self,
        student_RNKV: Tensor,
        teacher_RNKV: Tensor,
        weights_RNK: Tensor,
        reference_RNKV: Tensor | None = None,
    ) -> Tensor:
        whole = (student_RNKV, teacher_RNKV, reference_RNKV)
        rows = [None if logits is None else logits.flatten(0, 2) for logits in whole]
        assert rows[0] is not None
        assert rows[1] is not None
        measured_MQ = self.measure(rows[0], rows[1], rows[2])
        return self.reduce(measured_MQ.unflatten(0, weights_RNK.shape), weights_RNK)

    @property
    def _weighs_by_acceptance(self) -> bool:
        settings = self.settings
        return settings.acceptance_prefix or min(settings.hardest_share, settings.easiest_share) < 1

    @torch.no_grad()
    def weights(self, alpha_RNK: Tensor | None, weights_RNK: Tensor) -> Tensor:
        """What each row counts ``[R, N, K]``: its own weight times those of the settings."""
        settings = self.settings
        weighted_RNK = decayed(weights_RNK, settings.position_decay)
        if alpha_RNK is None:
            return weighted_RNK
        weighted_RNK = torch.minimum(  # a row has to be in both shares
            hardest(weighted_RNK, 1 - alpha_RNK, settings.hardest_share),
            hardest(weighted_RNK, alpha_RNK, settings.easiest_share),
        )
        if settings.acceptance_prefix:
            weighted_RNK = weighted_RNK * reached(alpha_RNK.masked_fill(weights_RNK == 0, 1))
        return weighted_RNK


class RowLoss(ReducedLoss):
    """A loss that is a function of single rows of student and teacher."""

    @abstractmethod
    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]``, from logits over the same vocabulary."""

    def values(self, student_MV: Tensor, teacher_MV: Tensor, reference_MV: Tensor | None) -> Tensor:
        del reference_MV
        return self.rows(student_MV, teacher_MV)


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

    Rows that agree already have nothing to teach, and many of them drown the others. Rows that are
    furthest off may be beyond what so small a draft can learn; with the acceptance in place of the
    gap they are what goes. AdaSPEC (arXiv 2510.19779) tells the two apart by a reference draft that
    was trained to the end: it keeps the rows where the draft is furthest behind it. While serving
    there is none (behind the draft before the update the student starts by nothing at all), so the
    gap is to the target itself, and it may be cut at both ends.
    """
    counts_M = weights_RNK.flatten() > 0
    gap_M = gap_RNK.flatten().masked_fill(~counts_M, -1)  # a gap is never negative
    rank_M = gap_M.argsort(descending=True, stable=True).argsort()
    kept_M = rank_M < share * counts_M.sum()
    return weights_RNK * kept_M.view_as(weights_RNK)


def weighted_mean(loss: Tensor, weights: Tensor) -> Tensor:
    """``sum(w * loss) / sum(w)``; rows of weight zero neither count nor pass a gradient on.

    A masked row may hold anything, infinities included, so it is replaced, not multiplied. Where
    all are masked (a rank's share of a small batch may be) the loss is zero.
    """
    kept = torch.where(weights > 0, loss, torch.zeros_like(loss))
    smallest = torch.finfo(weights.dtype).tiny
    return (kept * weights).sum() / weights.sum().clamp_min(smallest)
