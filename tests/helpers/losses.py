"""Losses by name, and logits to put to them. Letters: M rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosched.registry import LOSSES
from losses.reduction import RowLoss

some_rows = given(
    seed=st.integers(0, 1 << 20), vocab=st.integers(2, 12), scale=st.floats(0.01, 10.0)
)
few = settings(max_examples=25, deadline=None)


def make_loss(kind: str, **own: Any) -> RowLoss:
    cls = LOSSES.get(kind)
    if kind == "top_k_cross_entropy":
        own.setdefault("k", 2)
    return cls(msgspec.convert({"kind": kind, **own}, cls.Settings))


def draw(seed: int, vocab: int, scale: float, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Student and teacher logits ``[M, V]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, rows, vocab, dtype=torch.float64, generator=generator)).unbind()


def gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student).sum(), student)[0]


def close(found: Tensor, expected: Tensor) -> None:
    """Float64 through sums of at most twelve terms of size 1 to 100, two ways."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
