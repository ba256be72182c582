"""Rows a few at a time: the memory of a chunk, at the price of computing it twice.

Letters: M rows, H width of the draft's states, Q what is measured of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Measure = Callable[[slice, Tensor], Tensor]
"""``measure(rows, states_MH)``: of those rows, with their states."""


def in_chunks(
    measure: Measure, states_MH: Tensor, parameters: Sequence[Tensor], chunk_rows: int | None
) -> Tensor:
    """``measure`` of all rows ``[M, Q]``, the same in value and gradient, in chunks of rows.

    What it holds beside states and results is held of one chunk only: the backward pass computes it
    again, and lets it go before the next. ``parameters`` may have a gradient through ``measure``; it
    is summed here and handed on once, as optimizers that listen for it (ZeRO) expect. So a head that
    is trained takes its gradient twice over: the sum, and that of a chunk. One chunk is not computed
    again.
    """
    if chunk_rows is None or len(states_MH) <= chunk_rows:
        return measure(slice(None), states_MH)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _InChunks.apply(measure, chunk_rows, states_MH, *trained)  # pyright: ignore[reportReturnType]  torch types no apply


def _slices(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """At least one, so that no rows have results like others."""
    for start in range(0, max(1, num_rows), chunk_rows):
        yield slice(start, start + chunk_rows)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, measure: Measure, chunk_rows: int, states_MH: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(states_MH, *parameters)
        ctx.measure, ctx.chunk_rows = measure, chunk_rows
        parts = [measure(rows, states_MH[rows]) for rows in _slices(len(states_MH), chunk_rows)]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch types it with *args
        ctx: Any, slope_MQ: Tensor
    ) -> tuple[Tensor | None, ...]:
        states_MH, *parameters = ctx.saved_tensors
        gradient_MH = torch.empty_like(states_MH)
        sums: list[Tensor | None] = [None] * len(parameters)
        for rows in _slices(len(states_MH), ctx.chunk_rows):
            states = states_MH[rows].detach().requires_grad_()
            with torch.enable_grad():
                measured = ctx.measure(rows, states)
            found = torch.autograd.grad(
                measured, (states, *parameters), slope_MQ[rows], allow_unused=True
            )
            del measured  # with its graph, before the next chunk
            gradient_MH[rows] = found[0]
            _add(sums, found[1:])
            del found  # likewise
        return None, None, gradient_MH, *sums


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for number, gradient in enumerate(gradients):
        before = sums[number]
        if gradient is not None:
            sums[number] = gradient if before is None else before.add_(gradient)
