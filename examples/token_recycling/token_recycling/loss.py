"""A distance of distributions that is bounded and smooth."""

from torch import Tensor

from cosched.registry import LOSSES
from losses.reduction import RowLoss


@LOSSES.register("hellinger")
class Hellinger(RowLoss):
    """Squared Hellinger distance: half of sum (sqrt p - sqrt q)^2, or 1 - sum sqrt(p q)."""

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        return 1 - ((student_MV.log_softmax(-1) + teacher_MV.log_softmax(-1)) / 2).exp().sum(-1)
