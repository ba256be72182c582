"""Staying near the draft that serves.

Letters: M rows, V vocabulary (that of the draft, both sides). q is the student, r the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.registry import LOSSES
from losses.divergence import kl
from losses.reduction import ReducedLoss

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("proximal_kl")
class ProximalKL(ReducedLoss):
    r"""KL from the draft before the update to the student, to be a term of ``sum``.

    .. math:: \ell_m = \sum_v r_{mv} (\log r_{mv} - \log q_{mv})

    r is what the trained copy said of the row before the first micro-step of the update. The
    gradient on the student's logits is ``q - r``: nothing in the first micro-step, where q = r, and
    in later ones a pull back, so it does something only with several steps an update. Alone it
    teaches nothing. Source: Test-Time Speculation, arXiv 2605.09329, where it is the second term
    beside the forward KL; its factor there is not published.
    """

    needs_reference = True
    teaches = False

    def values(self, student_MV: Tensor, teacher_MV: Tensor, reference_MV: Tensor | None) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits."""
        del teacher_MV
        assert reference_MV is not None, "it compares with the draft before the update"
        return kl(reference_MV.log_softmax(-1), student_MV.log_softmax(-1))
