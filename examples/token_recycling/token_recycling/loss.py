"""The distance that a sampled draft is refused by."""

from torch import Tensor

from cosched.registry import LOSSES
from losses.reduction import RowLoss


@LOSSES.register("total_variation")
class TotalVariation(RowLoss):
    """Chance that a sampled draft is refused: half of sum |p - q|, or 1 - sum min(p, q)."""

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        return (student_MV.softmax(-1) - teacher_MV.softmax(-1)).abs().sum(-1) / 2
