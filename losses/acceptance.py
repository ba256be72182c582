"""Losses made of the chance that a sampled draft is accepted, ``sum_v min(p_v, q_v)``.

Letters: M rows, V vocabulary (that of the draft, both sides). p is the teacher, q the student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from msgspec import Meta

from cosched.protocols import LossSettings
from cosched.registry import LOSSES
from losses.divergence import kl
from losses.reduction import RowLoss, acceptance

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("total_variation")
class TotalVariation(RowLoss):
    r"""Total variation: the chance that a sampled draft is refused.

    .. math:: \ell_m = \tfrac12 \sum_v |p_{mv} - q_{mv}| = 1 - \sum_v \min(p_{mv}, q_{mv})

    It is what speculative sampling loses, exactly (Leviathan et al., arXiv 2211.17192). Its
    gradient vanishes where p and q hardly overlap, so alone it learns badly from a poor start
    (LK losses, arXiv 2602.23881).
    """

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]``, a probability, from logits."""
        return (student_MV.softmax(-1) - teacher_MV.softmax(-1)).abs().sum(-1) / 2


@LOSSES.register("negative_log_acceptance")
class NegativeLogAcceptance(RowLoss):
    r"""Negative log of the chance that a sampled draft is accepted.

    .. math:: \ell_m = -\log \sum_v \min(p_{mv}, q_{mv})

    The gradient is that of total variation divided by the acceptance, so it does not vanish where p
    and q hardly overlap; summed in logs, it stays exact there. At a certain teacher it is the
    cross-entropy. Source: LK losses (LK-alpha), arXiv 2602.23881.
    """

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        log_p_MV, log_q_MV = teacher_MV.log_softmax(-1), student_MV.log_softmax(-1)
        return -torch.minimum(log_p_MV, log_q_MV).logsumexp(-1)


class LKHybridSettings(LossSettings, frozen=True):
    """``adapt.loss`` of ``lk_hybrid``: ``eta`` is how fast KL gives way to total variation."""

    eta: Annotated[float, Meta(ge=0)] = 3.0


@LOSSES.register("lk_hybrid")
class LKHybrid(RowLoss):
    r"""LK hybrid: forward KL while few drafts are accepted, total variation once many are.

    .. math:: \ell_m = w_m KL(p_m || q_m) + (1 - w_m) TV(p_m, q_m), \quad w_m = e^{-\eta \alpha_m}

    with the acceptance ``alpha = sum(min(p, q))`` held fixed: KL has a gradient from a poor start,
    total variation is what counts in the end. Source: LK losses (LK-lambda), arXiv 2602.23881. Rows
    have a weight each, as in vllm-project/speculators; SpecForge takes the mean alpha of a position.
    """

    Settings = LKHybridSettings
    detaches = True

    def __init__(self, settings: LKHybridSettings) -> None:
        super().__init__(settings)
        self.eta = settings.eta

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]``, from logits."""
        kl_M = kl(teacher_MV.log_softmax(-1), student_MV.log_softmax(-1))
        alpha_M = acceptance(student_MV, teacher_MV)
        weight_M = (-self.eta * alpha_M.detach()).exp()
        return weight_M * kl_M + (1 - weight_M) * (1 - alpha_M)
