"""Losses of rows, a few at a time: the memory of a chunk, at the price of computing it twice.

Letters: M rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[[Tensor, Tensor], Tensor]


def chunked(rows: Rows, student_MV: Tensor, teacher_MV: Tensor, chunk_rows: int | None) -> Tensor:
    """``rows(student_MV, teacher_MV)``, the same in value and gradient, in chunks of rows.

    What ``rows`` holds beside its arguments, several times their size, is held of one chunk only:
    the backward pass computes it again. The logits come whole, and so does the student's gradient.
    """
    if chunk_rows is None:
        return rows(student_MV, teacher_MV)
    loss_M: Tensor = _Chunked.apply(student_MV, teacher_MV, rows, chunk_rows)
    return loss_M


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_MV: Tensor, teacher_MV: Tensor, rows: Rows, chunk_rows: int
    ) -> Tensor:
        ctx.save_for_backward(student_MV, teacher_MV)
        ctx.rows, ctx.chunk_rows = rows, chunk_rows
        chunks = zip(student_MV.split(chunk_rows), teacher_MV.split(chunk_rows), strict=True)
        return torch.cat([rows(student, teacher) for student, teacher in chunks])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch types it with *args
        ctx: Any, slope_M: Tensor
    ) -> tuple[Tensor, None, None, None]:
        student_MV, teacher_MV = ctx.saved_tensors
        gradient_MV = torch.empty_like(student_MV)
        whole = (student_MV, teacher_MV, slope_M, gradient_MV)
        chunks = zip(*(tensor.split(ctx.chunk_rows) for tensor in whole), strict=True)
        for student, teacher, slope, gradient in chunks:
            student = student.detach().requires_grad_()
            with torch.enable_grad():
                loss = ctx.rows(student, teacher)
            gradient.copy_(torch.autograd.grad(loss, student, slope)[0])
        return gradient_MV, None, None, None
