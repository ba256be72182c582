"""The loss of a batch: replay the draft, recall the teacher, compare.

Letters: R requests, N anchors, K drafted tokens, X teacher width (hidden or vocabulary),
V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from cosched.protocols import Drafter, Loss
    from cosched.records import SignalBatch, TeacherForm


class BatchLoss(nn.Module):
    """A drafter with its loss as one module whose forward is the scalar to step on.

    The drafter's network is the only submodule: the target's embedding and head stay outside, so
    that no optimizer can reach them. ``lost_mass`` is what the teacher of the last batch said outside
    of the draft's vocabulary, as a mean over its rows; None where the vocabularies are one.
    """

    lost_mass: Tensor | None = None

    def __init__(
        self, drafter: Drafter, loss: Loss, teacher_head: nn.Module, teacher_form: TeacherForm
    ) -> None:
        super().__init__()
        network = drafter.network()
        assert network is not None, "a drafter without a network has nothing to train"
        self.network = network
        self._drafter = drafter
        self._loss = loss
        self._teacher_head = (teacher_head,)  # in a tuple, so that it is no submodule
        self._teacher_form = teacher_form

    def forward(self, batch: SignalBatch) -> Tensor:
        """Scalar loss of a batch, in float32 or wider."""
        student_RNKV = _wide(self._drafter.replay(batch))
        return self._loss(student_RNKV, self.teacher_logits(batch), batch.weights_RNK)

    @torch.no_grad()
    def teacher_logits(self, batch: SignalBatch) -> Tensor:
        """Teacher logits over the draft's vocabulary ``[R, N, K, V]``, in float32 or wider.

        A loss takes their softmax, so the teacher is renormalised over that vocabulary.
        """
        logits = batch.teacher_RNKX
        if self._teacher_form == "hidden":
            logits = self._teacher_head[0](logits)
        ids = self._drafter.target_ids()
        if ids is None:
            return _wide(logits)
        kept = _wide(logits.index_select(-1, ids))
        weights = batch.weights_RNK
        lost_RNK = _lost_mass(logits, kept).masked_fill(weights == 0, 0)
        smallest = torch.finfo(weights.dtype).tiny  # a rank's share may have no row that counts
        self.lost_mass = (lost_RNK * weights).sum() / weights.sum().clamp_min(smallest)
        return kept


def _lost_mass(logits: Tensor, kept_RNKV: Tensor) -> Tensor:
    """Mass of each row ``[R, N, K]`` that is not among the kept logits.

    Request by request: a wide copy of the target's vocabulary is held of one of them only.
    """
    whole_RNK = torch.stack([_wide(rows).logsumexp(-1) for rows in logits])
    return -torch.expm1(kept_RNKV.logsumexp(-1) - whole_RNK).clamp_max(0)


def share_of(batch: SignalBatch, rank: int, num_ranks: int) -> tuple[SignalBatch, float]:
    """One rank's anchors of a batch, and what its mean loss counts in the mean over ranks.

    Every ``num_ranks``-th anchor of each request, so that all ranks have work of the same size; a
    missing one repeats the first, with weight zero. Exact where all rows of a path weigh the same; a
    loss that weighs rows by what is in them (``adapt.loss``) does so within each share.
    """
    missing = -batch.anchors_RN.shape[1] % num_ranks
    weights = F.pad(batch.weights_RNK, (0, 0, 0, missing))
    mine = slice(rank, None, num_ranks)

    def cut(tensor: Tensor) -> Tensor:
        first = tensor[:, :1].expand(-1, missing, *tensor.shape[2:])
        return torch.cat((tensor, first), 1)[:, mine]

    share = replace(
        batch,
        anchors_RN=cut(batch.anchors_RN),
        paths_RNK=cut(batch.paths_RNK),
        teacher_RNKX=cut(batch.teacher_RNKX),
        weights_RNK=weights[:, mine],
    )
    total = float(weights.sum())  # host waits for the device
    return share, num_ranks * float(share.weights_RNK.sum()) / total if total else 1.0


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
