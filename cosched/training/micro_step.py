"""The loss of a batch: replay the draft, recall the teacher, compare.

Letters: R requests, N anchors, K drafted tokens, M rows of them that count, T teacher rows that
differ, X teacher width, H width of the draft's states, V draft vocabulary, W some of its tokens, Q what
a loss measures of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cosched.loop.layout import CountedRows, counted_rows, upload
from cosched.loop.teacher_rows import Teacher, wide
from cosched.training.chunks import in_chunks
from cosched.training.precision import computing_in
from cosched.training.reference import DraftBefore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.protocols import Drafter, Loss
    from cosched.records import SignalBatch, TeacherForm
    from cosched.training.precision import Precision

ROWS_OF_LOST_MASS = 8  # each takes a product with the target's whole head
LEAST = 1e-3  # temperature: a token that is a hundredth of a nat better has all of the mass
ROWS_TO_RANK = 32  # of the draft's logits, whose likeliest tokens are looked for at once


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all micro-steps on a batch have in common.

    ``tokens_W`` are those that the loss is taken over, and ``teacher_TW`` what the teacher says of
    them; None where it is taken over all of them. ``reference_RNKH`` are states of the draft before
    the update, where the loss compares with it.
    """

    batch: SignalBatch
    rows: CountedRows
    temperatures_M: Tensor | None
    tokens_W: Tensor | None = None
    teacher_TW: Tensor | None = None
    reference_RNKH: Tensor | None = None


class BatchLoss(nn.Module):
    """A drafter with its loss as one module whose forward is the scalar to step on.

    The drafter's network is the only submodule: the target's embedding and head stay outside, so
    that no optimizer can reach them. Logits, of the student, the teacher and the reference, are made
    of ``chunk_rows`` rows at a time (``adapt.memory``), and of rows of weight zero not at all.
    ``lost_mass`` is what the teacher of the update's batch says outside of the draft's vocabulary: a
    mean over ``ROWS_OF_LOST_MASS`` of its rows at most, evenly spread over those that count; None
    where the vocabularies are one. An update may be made with one of the ``others`` instead of the
    ``loss``: they are objectives 1, 2, …, and it is objective 0. Matrix products are computed in
    ``precision``, and parameters and their gradients stay as they are.
    """

    lost_mass: Tensor | None = None

    def __init__(
        self,
        drafter: Drafter,
        loss: Loss,
        teacher_head: nn.Module,
        teacher_form: TeacherForm,
        others: Sequence[Loss] = (),
        precision: Precision = "float32",
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        network = drafter.network()
        assert network is not None, "a drafter without a network has nothing to train"
        self.network = network
        self._drafter = drafter
        self._losses = (loss, *others)
        self._loss = loss  # that of the update which is being made
        # No module, so that the head is no submodule.
        self._teacher = Teacher(teacher_form, teacher_head)
        self._teacher_form: TeacherForm = teacher_form
        compares = any(one.needs_reference for one in self._losses)
        self.before = DraftBefore(drafter) if compares else None
        self._prepared: list[Prepared] = []
        self._chunk_rows = chunk_rows
        self._computing = computing_in(precision, next(network.parameters()).device)

    @torch.no_grad()
    def begin_update(self, *batches: SignalBatch, objective: int = 0) -> None:
        """Micro-steps on these follow, one after the other: they are held against the draft as it is now."""
        self._loss, self._prepared = self._losses[objective], []
        if self.before is not None and self._loss.needs_reference:
            self.before.catch_up()
        prepared = [self._prepare(batch) for batch in batches]
        self.lost_mass = self._lost_mass(prepared[0])
        self._prepared = [self._ready(one) for one in prepared]

    def _ready(self, prepared: Prepared) -> Prepared:
        prepared = self._rank(prepared, self._loss.settings.vocab_top_k)
        if self.before is None or not self._loss.needs_reference:
            return prepared
        with self._computing:
            states = self.before.drafter.replay_states(prepared.batch)
        return replace(prepared, reference_RNKH=states)

    @property
    def begun(self) -> Prepared:
        """Of the update whose micro-steps follow, on one batch."""
        assert self._prepared, "an update has not begun"
        return self._prepared[0]

    def forward(self, batch: SignalBatch) -> Tensor:
        """Scalar loss of a batch, in float32 or wider."""
        prepared = next((one for one in self._prepared if one.batch is batch), None)
        if prepared is None:
            chosen = bool(self._prepared) and self._prepared[0].tokens_W is not None
            assert not chosen, "of tokens that another batch has chosen"
            assert not self._loss.needs_reference, "an update begins with its batches"
            prepared = self._prepare(batch)
        return self.loss_of(prepared)

    def loss_of(self, prepared: Prepared) -> Tensor:
        """Likewise, of what has been made ready: the device is asked nothing."""
        with self._computing:
            return self._loss_of(prepared)

    def _loss_of(self, prepared: Prepared) -> Tensor:
        batch, rows, reference = prepared.batch, prepared.rows, prepared.reference_RNKH
        weights_RNK = batch.weights_RNK
        states_MH = _rows(self._drafter.replay_states(batch), rows.places_M)
        if reference is not None:
            reference = _rows(reference, rows.places_M)
        measured_MQ = self.measure(
            states_MH,
            rows.teacher_TX if prepared.teacher_TW is None else prepared.teacher_TW,
            rows.says_M,
            reference,
            prepared.temperatures_M,
            prepared.tokens_W,
        )
        whole_MQ = measured_MQ.new_zeros(weights_RNK.numel(), measured_MQ.shape[-1])
        whole_MQ = whole_MQ.index_copy(0, rows.places_M, measured_MQ)
        return self._loss.reduce(whole_MQ.unflatten(0, weights_RNK.shape), weights_RNK)

    def measure(
        self,
        states_MH: Tensor,
        teacher_TX: Tensor,
        says_M: Tensor,
        reference_MH: Tensor | None,
        temperatures_M: Tensor | None = None,
        tokens_W: Tensor | None = None,
    ) -> Tensor:
        """What the loss measures of rows ``[M, Q]``; ``says_M`` is the teacher's row of each.

        The teacher's logits are divided by ``temperatures_M``, where there are any. Over ``tokens_W``
        alone, where they are given: then the teacher's rows are its logits of them.
        """

        def measure(rows: slice, states_MH: Tensor) -> Tensor:
            student_MV = _logits(self._drafter, states_MH, tokens_W)
            with torch.no_grad():
                if tokens_W is None:
                    teacher_MV = self._teacher_logits(teacher_TX, says_M[rows])
                else:
                    teacher_MV = teacher_TX.index_select(0, says_M[rows])
                if temperatures_M is not None:
                    teacher_MV.div_(temperatures_M[rows, None])  # rows of its own
                reference_MV = None
                if reference_MH is not None and self.before is not None:
                    before = self.before.drafter
                    reference_MV = _logits(before, reference_MH[rows], tokens_W)
            return self._loss.measure(student_MV, teacher_MV, reference_MV)

        parameters = list(self.network.parameters())
        return in_chunks(measure, states_MH, parameters, self._chunk_rows)

    @torch.no_grad()
    def _prepare(self, batch: SignalBatch) -> Prepared:
        rows = counted_rows(batch, self._teacher_form)
        return Prepared(batch, rows, self._temperatures(batch, rows.places_M))

    def _rank(self, prepared: Prepared, most: int | None) -> Prepared:
        """With the tokens among so many likeliest of any row, of the teacher's or of the draft's."""
        rows = prepared.rows
        if most is None or not len(rows.places_M):
            return prepared
        with self._computing:
            teacher_TV = wide(self._teacher.logits(rows.teacher_TX, self._drafter.target_ids()))
            states_MH = _rows(self._drafter.replay_states(prepared.batch), rows.places_M)
            students = (self._drafter.project(some) for some in states_MH.split(ROWS_TO_RANK))
            best = [
                logits.topk(min(most, logits.shape[-1])).indices.flatten()
                for logits in (teacher_TV, *students)
            ]
        tokens_W = self.union(best, teacher_TV.shape[-1])
        teacher_TW = teacher_TV.index_select(-1, tokens_W)
        return replace(prepared, tokens_W=tokens_W, teacher_TW=teacher_TW)

    @staticmethod
    def union(tokens: Sequence[Tensor], vocab_size: int) -> Tensor:
        """Those that are in any, each once ``[W]``, of a vocabulary of that size."""
        del vocab_size
        return torch.cat(list(tokens)).unique()  # host waits for the device

    def _temperatures(self, batch: SignalBatch, counts_M: Tensor) -> Tensor | None:
        """Those at which rows that count sample, for a loss that asks for it; greedy ones nearly at 0."""
        if not self._loss.at_temperature or batch.temperatures is None:
            return None
        each_R = upload(np.array(batch.temperatures, np.float32), counts_M.device).clamp_min(LEAST)
        return each_R[counts_M // batch.weights_RNK[0].numel()]

    @torch.no_grad()
    def teacher_logits(self, batch: SignalBatch) -> Tensor:
        """Teacher logits over the draft's vocabulary ``[R, N, K, V]``, in float32 or wider.

        A loss takes their softmax, so the teacher is renormalised over that vocabulary.
        """
        return wide(self._teacher.logits(batch.teacher_RNKX, self._drafter.target_ids()))

    def _teacher_logits(self, teacher_TX: Tensor, says_M: Tensor) -> Tensor:
        """Those of some rows ``[M, V]``: of all that differ, if they are fewer, or of each."""
        ids = self._drafter.target_ids()
        if len(teacher_TX) < len(says_M):
            return wide(self._teacher.logits(teacher_TX, ids)).index_select(0, says_M)
        return wide(self._teacher.logits(teacher_TX.index_select(0, says_M), ids))

    def _lost_mass(self, prepared: Prepared) -> Tensor | None:
        ids, batch = self._drafter.target_ids(), prepared.batch
        if ids is None:
            return None
        weights, rows = batch.weights_RNK.flatten(), prepared.rows
        counts_M = rows.places_M[: rows.count]
        if not rows.count:  # a rank's share may have no row that counts
            return weights.new_zeros(())
        step = -(-rows.count // ROWS_OF_LOST_MASS)
        counts_M = counts_M[step // 2 :: step]
        lost_M = self._teacher.lost_mass(batch.teacher_RNKX.flatten(0, 2)[counts_M], ids)
        return (lost_M * weights[counts_M]).sum() / weights[counts_M].sum()


def _logits(drafter: Drafter, states_MH: Tensor, tokens_W: Tensor | None) -> Tensor:
    if tokens_W is None:  # which is all that is asked of a drafter where none are chosen
        return wide(drafter.project(states_MH))
    return wide(drafter.project(states_MH, tokens_W))


def _rows(of_RNKX: Tensor, places_M: Tensor) -> Tensor:
    return of_RNKX.flatten(0, 2).index_select(0, places_M)
