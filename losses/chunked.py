"""Losses of rows, a few at a time: the memory of a chunk, at the price of computing it twice.

Letters: M rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def chunked(
    rows: Callable[[Tensor, Tensor], Tensor],
    student_MV: Tensor,
    teacher_MV: Tensor,
    chunk_rows: int | None,
) -> Tensor:
    """``rows(student_MV, teacher_MV)``, the same in value and gradient, in chunks of rows.

    What ``rows`` holds beside its arguments, several times their size in float32, is held of one
    chunk only: the backward pass computes it again. Logits themselves come whole and stay whole.
    """
    if chunk_rows is None:
        return rows(student_MV, teacher_MV)
    chunks = zip(student_MV.split(chunk_rows), teacher_MV.split(chunk_rows), strict=True)
    losses: list[Tensor] = [
        checkpoint(rows, student, teacher, use_reentrant=False, preserve_rng_state=False)
        for student, teacher in chunks
    ]
    return torch.cat(losses)
