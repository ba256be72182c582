"""The distance that a sampled draft is refused by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.registry import LOSSES
from losses.reduction import RowLoss

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("total_variation")
class TotalVariation(RowLoss):
    r"""Total variation: the chance that a sampled draft is refused.

    .. math:: \ell_m = \tfrac12 \sum_v |p_{mv} - q_{mv}| = 1 - \sum_v \min(p_{mv}, q_{mv})
    """

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        return (student_MV.softmax(-1) - teacher_MV.softmax(-1)).abs().sum(-1) / 2
