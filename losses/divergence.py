"""Divergences between the teacher's and the student's distribution of a row.

Letters: M rows, V vocabulary (that of the draft, both sides).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.registry import LOSSES
from losses.reduction import RowLoss

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("forward_kl")
class ForwardKL(RowLoss):
    r"""Forward KL, teacher to student: covers everything the target may say.

    .. math:: \ell_m = \sum_v p_{mv} (\log p_{mv} - \log q_{mv})

    The gradient on the student's logits is ``q - p``: bounded, and zero only where the student
    agrees with the whole row. It bounds the loss of acceptance through Pinsker's inequality,
    ``1 - sum(min(p, q)) <= sqrt(KL / 2)``. Source: Test-Time Speculation, arXiv 2605.09329;
    Hinton et al., arXiv 1503.02531.
    """

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        log_p_MV = teacher_MV.log_softmax(-1)
        log_q_MV = student_MV.log_softmax(-1)
        return (log_p_MV.exp() * (log_p_MV - log_q_MV)).sum(-1)
