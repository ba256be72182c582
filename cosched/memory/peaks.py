"""What a micro-step and scores take in memory, from sizes alone: both are run on the meta device."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosched.guard.scorer import AcceptanceScorer
from cosched.memory.live import LivePeak
from cosched.training.micro_step import BatchLoss
from cosched.training.shares import KnownGradient, accumulate, shares_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from cosched.protocols import Drafter, Loss
    from cosched.records import SignalBatch, TeacherForm
    from cosched.training.lora import Lora


def step_peak(
    sketch: Drafter,
    trainable: Sequence[str],
    loss: Loss,
    teacher_head: nn.Module,
    teacher_form: TeacherForm,
    batch: SignalBatch,
    chunk_rows: int | None,
    lora: Lora | None = None,
    accumulation_steps: int = 1,
) -> int:
    """Most bytes at once of a micro-step on such a batch: activations, logits, and gradients.

    The gradients of the ``trainable`` parameters, or of the adapters of ``lora``, are there in the end, the batch from the beginning on.
    Parameters and the draft before the update are not counted. All in float32, and attention as it is
    without a fused kernel, which holds no weights of it.
    """
    copy = sketch.clone(torch.float32)
    network = copy.network()
    assert network is not None
    if lora is not None:
        with torch.device("meta"):
            trainable = lora.inject(network, seed=0)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trainable)
    module = _Sized(copy, loss, teacher_head, teacher_form, chunk_rows=chunk_rows)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with LivePeak() as live:
        shares = shares_of(batch, accumulation_steps)
        module.begin_update(*(share.batch for share in shares))
        if accumulation_steps == 1:
            module(batch).backward()
        else:
            KnownGradient(network, trained)(*accumulate(module, shares, trained)).backward()
    return live.peak + bytes_of(batch)


@torch.no_grad()
def scores_peak(
    sketch: Drafter,
    scored: Sequence[str],
    served_as: torch.dtype,
    teacher_head: nn.Module,
    teacher_form: TeacherForm,
    batch: SignalBatch,
    chunk_rows: int | None,
) -> int:
    """Most bytes at once of scores on such a batch, like that.

    With the parameters ``scored`` as they are put into the network, in float32 again where they are
    ``served_as`` another type. Weights are scored one after another, so it is the same of any number
    of them.
    """
    copy = sketch.clone(torch.float32)
    network = copy.network()
    assert network is not None
    scorer = AcceptanceScorer(copy, teacher_head, teacher_form, served_as, chunk_rows=chunk_rows)
    weights = {name: p for name, p in network.named_parameters() if name in scored}
    with LivePeak() as live:
        scorer.lengths(batch, [weights])
    return live.peak + bytes_of(batch)


def bytes_of(batch: SignalBatch) -> int:
    """Of its tensors."""
    tensors = (getattr(batch, field.name) for field in fields(batch))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class _Sized(BatchLoss):
    """Where nothing is known of what tokens are, no two are taken to be alike."""

    @staticmethod
    def union(tokens: Sequence[Tensor], vocab_size: int) -> Tensor:
        number = sum(some.numel() for some in tokens)
        return tokens[0].new_empty(min(number, vocab_size))
