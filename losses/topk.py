"""Cross-entropy on the teacher's best tokens, all others taken as one.

Letters: M rows, V vocabulary (that of the draft, both sides), k best tokens of the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from msgspec import Meta

from cosched.errors import ConfigError
from cosched.protocols import LossSettings
from cosched.registry import LOSSES
from losses.reduction import RowLoss

if TYPE_CHECKING:
    from torch import Tensor


class TopKSettings(LossSettings, frozen=True):
    """``adapt.loss`` of ``top_k_cross_entropy``: ``k`` tokens that count one by one."""

    k: Annotated[int, Meta(ge=1)] = 64


@LOSSES.register("top_k_cross_entropy")
class TopKCrossEntropy(RowLoss):
    r"""Cross-entropy on the teacher's k best tokens, with all others as one bucket.

    .. math:: \ell_m = -\sum_{v \in top_k} p_{mv} \log q_{mv} - P_m \log Q_m

    P and Q are the mass of p and q outside the k: kept, so that q = p is still the least, and the
    student is not told how to share it out. With k = V it is the full cross-entropy. That top-k
    without its tail is biased towards the k: Sparse Logit Sampling, arXiv 2503.16870.
    """

    Settings = TopKSettings

    def __init__(self, settings: TopKSettings) -> None:
        super().__init__(settings)
        self.k = settings.k

    def rows(self, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
        """Loss of each row ``[M]`` in nats, from logits.

        Raises:
            ConfigError: the vocabulary has fewer than k tokens.
        """
        vocab_size = teacher_MV.shape[-1]
        if self.k > vocab_size:
            raise ConfigError(
                f"adapt.loss: k = {self.k} of top_k_cross_entropy is more than the {vocab_size} "
                f"tokens of the draft's vocabulary; use at most {vocab_size}"
            )
        log_p_MV, log_q_MV = teacher_MV.log_softmax(-1), student_MV.log_softmax(-1)
        best_Mk = teacher_MV.topk(self.k, -1).indices
        log_p_Mk, log_q_Mk = log_p_MV.gather(-1, best_Mk), log_q_MV.gather(-1, best_Mk)
        if self.k < vocab_size:
            log_p_Mk = torch.cat((log_p_Mk, _outside(log_p_MV, best_Mk)), -1)
            log_q_Mk = torch.cat((log_q_Mk, _outside(log_q_MV, best_Mk)), -1)
        return -(log_p_Mk.exp() * log_q_Mk).sum(-1)


def _outside(log_p_MV: Tensor, best_Mk: Tensor) -> Tensor:
    """Log of the mass outside the best tokens ``[M, 1]``; a sum of logs, as 1 - sum would cancel."""
    return log_p_MV.scatter(-1, best_Mk, -torch.inf).logsumexp(-1, keepdim=True)
