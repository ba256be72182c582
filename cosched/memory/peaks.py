"""What logits take in memory, in the loss of a micro-step and in scores, from sizes alone.

Letters: M rows, H width of the draft's states, X teacher width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosched.guard.scorer import AcceptanceScorer
from cosched.memory.live import LivePeak
from cosched.training.micro_step import BatchLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from cosched.protocols import Drafter, Loss
    from cosched.records import TeacherForm

CHUNKS = 3  # as many as it takes to see what lives on from one chunk to the next


def loss_peak(
    sketch: Drafter,
    trainable: Sequence[str],
    loss: Loss,
    teacher_head: nn.Module,
    teacher_form: TeacherForm,
    teacher_0X: Tensor,
    num_rows: int,
    chunk_rows: int | None,
) -> int:
    """Most bytes at once, from the draft's states to their gradient; all on the meta device.

    ``teacher_0X`` says width and type of a teacher row. The head's part of it is real: logits, what
    the loss makes of them, and the gradient of a head that is among ``trainable``.
    """
    copy = sketch.clone(torch.float32)
    network = copy.network()
    assert network is not None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trainable)
    module = BatchLoss(copy, loss, teacher_head, teacher_form, chunk_rows=chunk_rows)
    num_rows = _enough(num_rows, chunk_rows)
    with torch.device("meta"):
        states_MH = torch.empty(num_rows, copy.state_width, requires_grad=True)
        says_M, weights = torch.empty(num_rows, dtype=torch.int64), torch.empty(1, 1, num_rows)
    reference = states_MH.detach() if loss.needs_reference else None
    teacher_MX = teacher_0X.new_empty(num_rows, teacher_0X.shape[-1])
    with LivePeak() as live:
        measured_MQ = module.measure(states_MH, teacher_MX, says_M, reference)
        loss.reduce(measured_MQ.unflatten(0, weights.shape), weights).backward()
    return live.peak


@torch.no_grad()
def scores_peak(
    sketch: Drafter,
    scored: Sequence[str],
    served_as: torch.dtype,
    teacher_head: nn.Module,
    teacher_form: TeacherForm,
    teacher_0X: Tensor,
    num_rows: int,
    chunk_rows: int | None,
) -> int:
    """Most bytes at once, from the draft's states to the scores of rows, like that.

    Logits, and what is made of them; with the parameters ``scored`` as they are put into the network,
    in float32 again where they are ``served_as`` another type. Weights are scored one after another,
    so it is the same of any number of them.
    """
    copy = sketch.clone(torch.float32)
    network = copy.network()
    assert network is not None
    scorer = AcceptanceScorer(copy, teacher_head, teacher_form, served_as, chunk_rows=chunk_rows)
    weights = {name: p for name, p in network.named_parameters() if name in scored}
    num_rows = _enough(num_rows, chunk_rows)
    states_MH = torch.empty(num_rows, copy.state_width, device="meta")
    teacher_MX = teacher_0X.new_empty(num_rows, teacher_0X.shape[-1])
    with LivePeak() as live:
        scorer.kept(lambda: states_MH, scorer.teacher(teacher_MX), weights)
    return live.peak


def _enough(num_rows: int, chunk_rows: int | None) -> int:
    return num_rows if chunk_rows is None else min(num_rows, CHUNKS * chunk_rows)
