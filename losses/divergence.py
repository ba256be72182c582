"""Divergences between the teacher's and the student's distribution of a row.

Letters: M rows, V vocabulary (that of the draft, both sides). p is the teacher, q the student.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

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
        return kl(teacher_MV.log_softmax(-1), student_MV.log_softmax(-1))


@LOSSES.register("reverse_kl")
class ReverseKL(RowLoss):
    r"""Reverse KL, student to teacher: says nothing that the target would not.

    .. math:: \ell_m = \sum_v q_{mv} (\log q_{mv} - \log p_{mv})

    A draft too small for the whole row settles on a mode of it instead of spreading over all. Its
    gradient vanishes where q is certain, also of a wrong token. Source: MiniLLM, arXiv 2306.08543;
    DistillSpec, arXiv 2310.08461.
    """

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        return kl(student_MV.log_softmax(-1), teacher_MV.log_softmax(-1))


@LOSSES.register("jensen_shannon")
class JensenShannon(RowLoss):
    r"""Jensen-Shannon divergence: the mean KL to the even mixture of both, at most log 2.

    .. math:: \ell_m = (KL(p_m || r_m) + KL(q_m || r_m)) / 2, \quad r_m = (p_m + q_m) / 2

    Symmetric and bounded, so that one row far off cannot rule a step; there its gradient vanishes.
    Source: DistillSpec, arXiv 2310.08461; GKD, arXiv 2306.13649.
    """

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        log_p_MV, log_q_MV = teacher_MV.log_softmax(-1), student_MV.log_softmax(-1)
        log_r_MV = torch.logaddexp(log_p_MV, log_q_MV) - math.log(2)
        return (kl(log_p_MV, log_r_MV) + kl(log_q_MV, log_r_MV)) / 2


@LOSSES.register("hard_cross_entropy")
class HardCrossEntropy(RowLoss):
    r"""Cross-entropy on the teacher's argmax: the token that greedy decoding will say.

    .. math:: \ell_m = -\log q_{m v^*}, \quad v^* = \arg\max_v p_{mv}

    At temperature 0 a draft is accepted if its argmax is v*, and the rest of p does not matter. It
    is least at certainty, not at q = p: wrong for sampling. Source: DFlash (arXiv 2602.06036) trains
    with it on the tokens of a text.
    """

    proper = False

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        return F.cross_entropy(student_MV, teacher_MV.argmax(-1), reduction="none")


def kl(log_p_MV: Tensor, log_q_MV: Tensor) -> Tensor:
    """KL(p || q) of each row ``[M]`` in nats, from log-probabilities."""
    # Less p rather than plus -q: the gradient of q is then handed on as it is, not negated anew.
    return -(log_p_MV.exp() * (log_q_MV - log_p_MV)).sum(-1)
