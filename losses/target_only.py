"""The loss of an engine that drafts the draft's best token and keeps it if the target draws it.

Letters: M rows, V vocabulary (that of the draft, both sides). p is the teacher, q the student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from cosched.protocols import LossSettings
from cosched.registry import LOSSES
from losses.reduction import RowLoss

if TYPE_CHECKING:
    from torch import Tensor


class TargetOnlySettings(LossSettings, frozen=True):
    """``adapt.loss`` of ``negative_log_target_only``: ``sharpness`` of what stands for the best token."""

    sharpness: Annotated[float, Meta(gt=0)] = 1.0


@LOSSES.register("negative_log_target_only")
class NegativeLogTargetOnly(RowLoss):
    r"""Negative log of the chance that the draft's best token is accepted, which the target draws or not.

    .. math:: \ell_m = -\log \sum_v q_{mv} p_{mv}, \quad q_{mv} \propto \exp(\beta z_{mv})

    p is the target's distribution at the temperature of the request. What counts is p of the argmax of
    the student's logits z, which has no gradient; in its place stands a token drawn from z at the
    ``sharpness`` beta, whose limit for a large beta is the argmax. The gradient on z is
    ``beta * (q - r)`` with ``r = q p / sum(q p)``, which is what q becomes once its token has been accepted:
    rows whose tokens are refused alike pull as much as others, but the pull vanishes where q is certain,
    also of a wrong token, and the more so the larger beta. It is least at certainty of p's best token,
    not at q = p: wrong where drafts are sampled from q. At a certain teacher (temperature 0) it is
    the cross-entropy. Source: the expected acceptance of Leviathan et al. (arXiv 2211.17192) for a
    draft that is certain, smoothed as SGLang's target-only verification meets it.
    """

    Settings = TargetOnlySettings
    proper = False
    at_temperature = True

    def __init__(self, settings: TargetOnlySettings) -> None:
        super().__init__(settings)
        self.sharpness = settings.sharpness

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        log_q_MV = (self.sharpness * student_MV).log_softmax(-1)
        return -(log_q_MV + teacher_MV.log_softmax(-1)).logsumexp(-1)

    def accepted(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """What is smoothed ``[M]``: p of the student's best token."""
        best_M1 = student_MV.argmax(-1, keepdim=True)
        return teacher_MV.softmax(-1).gather(-1, best_M1)[:, 0]
