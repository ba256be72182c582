"""In what the matrix products of an update are computed; weights and the optimizer stay float32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

Precision = Literal["auto", "float32", "bfloat16"]


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context for the forward pass, to be entered as often as one likes.

    ``auto`` is bfloat16 where the device multiplies it faster than float32: on GPUs, and on
    processors with instructions for it. On others its products take many times as long.
    """
    products = product_type(precision, device)
    return nullcontext() if products == torch.float32 else torch.autocast(device.type, products)


def product_type(precision: Precision, device: torch.device) -> torch.dtype:
    """That to which both sides of a product are rounded."""
    fast = device.type == "cuda" or (device.type == "cpu" and has_bfloat16())
    if precision == "float32" or (precision == "auto" and not fast):
        return torch.float32
    return torch.bfloat16


def has_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
