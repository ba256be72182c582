"""Teacher rows as they are kept: hidden states, logits, or the best k of them with all others' mass.

The record of a row's best is ``2k + 1`` numbers in float32: the k best logits, their token ids
(whole numbers, exact up to 2^24), and the log-sum-exp of the logits that are not among them. With
the k it makes up the log-sum-exp of the row; kept by itself it is exact also where next to nothing
is left.

Letters: V target vocabulary, D draft vocabulary, k best tokens, X = 2k + 1, M rows, T of them that
differ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from cosched.records import TeacherForm

EXACT_INTEGERS = 1 << 24  # float32 holds every whole number up to here


def recall(rows: Tensor, form: TeacherForm, head: nn.Module) -> Tensor:
    """The target's logits ``[..., V]`` of rows as they were kept ``[..., X]``; ``head`` is its own."""
    if form == "hidden":
        return head(rows)
    return unpack_best(rows, len(next(head.parameters()))) if form == "top_k" else rows


def copies_words(form: TeacherForm, num_words: int, vocab_size: int) -> bool:
    """Whether a ``Teacher`` copies the words that a draft has out of the target's head."""
    return form == "hidden" and 2 * num_words <= vocab_size


class Teacher:
    """What the target said of rows as they were kept, over the words of a draft.

    Of its head no product is made for words that the draft lacks, where it lacks more than half of
    them: the weights of those it has are copied out of the head at the first use, and kept.
    """

    def __init__(self, form: TeacherForm, head: nn.Module) -> None:
        self._form: TeacherForm = form
        self._head = head
        self._words: tuple[Tensor, Tensor, Tensor | None] | None = None  # ids, weights, bias

    def logits(self, rows: Tensor, ids_D: Tensor | None) -> Tensor:
        """``[..., D]`` of rows ``[..., X]``; without ids the draft has all of the target's words."""
        if ids_D is None:
            return recall(rows, self._form, self._head)
        head = self._head
        if not isinstance(head, nn.Linear) or not copies_words(
            self._form, len(ids_D), head.out_features
        ):
            return recall(rows, self._form, head).index_select(-1, ids_D)
        if self._words is None or self._words[0] is not ids_D:
            bias = cast("Tensor | None", head.bias)
            self._words = ids_D, head.weight[ids_D], None if bias is None else bias[ids_D]
        return F.linear(rows, *self._words[1:])

    def lost_mass(self, rows: Tensor, ids_D: Tensor) -> Tensor:
        """The target's probability of all words that the draft lacks ``[...]``."""
        logits = wide(recall(rows, self._form, self._head))
        kept = logits.index_select(-1, ids_D).logsumexp(-1) - logits.logsumexp(-1)
        return -torch.expm1(kept).clamp_max(0)


def distinct(rows_MX: Tensor, form: TeacherForm) -> tuple[Tensor, Tensor]:
    """Rows of which no two are alike ``[T, X]``, and which of them each row is ``[M]``.

    Anchors that follow one another have most rows of their paths in common. Only rows that need a
    product with the head are looked at.
    """
    if form != "hidden":
        return rows_MX, torch.arange(len(rows_MX), device=rows_MX.device)
    return rows_MX.unique(dim=0, return_inverse=True)  # host waits for the device


def wide(logits: Tensor) -> Tensor:
    """In float32, or as they are if that is wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
