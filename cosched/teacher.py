"""Teacher rows as they are kept: hidden states, logits, or the best k of them with all others' mass.

The record of a row's best is ``2k + 1`` numbers in float32: the k best logits, their token ids
(whole numbers, exact up to 2^24), and the log-sum-exp of the logits that are not among them. With
the k it makes up the log-sum-exp of the row; kept by itself it is exact also where next to nothing
is left.

Letters: V target vocabulary, k best tokens, X = 2k + 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from cosched.records import TeacherForm

EXACT_INTEGERS = 1 << 24  # float32 holds every whole number up to here


def recall(rows: Tensor, form: TeacherForm, head: nn.Module) -> Tensor:
    """The target's logits ``[..., V]`` of rows as they were kept ``[..., X]``; ``head`` is its own."""
    if form == "hidden":
        return head(rows)
    return unpack_best(rows, len(next(head.parameters()))) if form == "top_k" else rows


def record_width(k: int) -> int:
    """X, for k best tokens."""
    return 2 * k + 1


def pack_best(logits: Tensor, k: int) -> Tensor:
    """Records ``[..., X]`` of logits ``[..., V]``."""
    assert k <= logits.shape[-1] <= EXACT_INTEGERS
    logits = logits.float()
    best, ids = logits.topk(k, -1)
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((best, ids.float(), others), -1)


def unpack_best(records: Tensor, vocab_size: int) -> Tensor:
    """Logits ``[..., V]`` with the same k best; all other tokens share the rest of the mass evenly.

    Evenly, because of all rows that agree with the record this has the greatest entropy, and every
    loss can be had of a whole row. The mass outside of the k is exact, so a loss that takes the
    tokens outside of as many best ones as one bucket sees no difference.
    """
    k = records.shape[-1] // 2
    best, ids, others = records.split((k, k, 1), -1)
    each = others - math.log(max(1, vocab_size - k))
    return each.expand(*each.shape[:-1], vocab_size).scatter(-1, ids.long(), best)
