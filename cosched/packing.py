"""Linear layers whose weights are laid out once for this CPU, not at every call.

A few rows against a large matrix, which is what decoding and verification are, take the time that
the matrix takes to be read. PyTorch's own linear layer reads it in an order that the processor does
not like, and for more than one row copies it into a better one first, at every call. Here the copy
is kept:

``half``     FBGEMM's: weights in half precision, activations and sums in float32. Half the bytes,
             and the same numbers where every weight is a half-precision number, as weights that
             were stored in bfloat16 or float16 usually are.
``blocked``  oneDNN's: the weights as they are, in blocks. For bfloat16 where the processor computes
             in it, and for float32 weights that half precision would change.

A product that needs gradients takes the plain way over the weight itself, which stays where it is.
Written in place, the weight is laid out again at its next use: ``publish`` needs to know nothing.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

Layout = Literal["half", "blocked"]
LARGEST_HALF = torch.finfo(torch.float16).max


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with its weight laid out for this CPU as well; made by ``pack``."""

    _rounds: bool
    _packed: Callable[[Tensor], Tensor] | None
    _written: int

    @classmethod
    def take_over(cls, layer: nn.Linear, rounds: bool) -> None:
        """Make that very layer one of these; who holds it or its weight need not know."""
        layer.__class__ = cls
        made = cast("PackedLinear", layer)
        made._rounds, made._packed, made._written = rounds, None, -1

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., I]`` to ``[..., O]``."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return F.linear(input, self.weight, self.bias)
        if self._packed is None or self._written != self.weight._version:
            self._written = self.weight._version
            self._packed = _packed(self.weight, self.bias, self._rounds) or self._plain
        return self._packed(input)

    def _plain(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays out its own weight."""
        return {**self.__dict__, "_packed": None}


def pack(module: nn.Module, rounds: bool = False) -> int:
    """Lay out every plain linear layer on a CPU, ``module`` itself included; returns how many.

    With ``rounds`` float32 weights may be rounded to half precision: a draft that learns has weights
    between two such numbers, and what it loses by it is less than an update brings. Without, they
    are laid out in half precision only where that changes none of them.
    """
    packed = 0
    for one in module.modules():
        if type(one) is not nn.Linear or one.weight.device.type != "cpu":
            continue  # a subclass has a product of its own
        if layout_of(one.weight, rounds) is None:
            continue
        PackedLinear.take_over(one, rounds)
        packed += 1
    return packed


def layout_of(weight_OI: Tensor, rounds: bool) -> Layout | None:
    """How this processor reads such a weight best; None where the plain way is all there is."""
    if weight_OI.dtype == torch.float32:
        if _has_half() and _fits_half(weight_OI, rounds):
            return "half"
        return "blocked" if torch.backends.mkldnn.is_available() else None
    if weight_OI.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return "blocked" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return None


def _has_half() -> bool:
    return torch.backends.quantized.engine in {"fbgemm", "x86"}


def _fits_half(weight_OI: Tensor, rounds: bool) -> bool:
    if rounds:
        return bool((weight_OI.abs() <= LARGEST_HALF).all())  # a NaN is not
    return torch.equal(weight_OI.half().to(weight_OI.dtype), weight_OI)


def _packed(
    weight_OI: Tensor, bias_O: Tensor | None, rounds: bool
) -> Callable[[Tensor], Tensor] | None:
    """The product over a copy of the weight; None: the plain one."""
    weight, bias = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    match layout_of(weight, rounds):
        case "half":
            half = torch.ops.quantized.linear_prepack_fp16(weight, bias)
            return lambda rows: torch.ops.quantized.linear_dynamic_fp16(rows, half)
        case "blocked":
            blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
            return lambda rows: torch.ops.mkldnn._linear_pointwise(
                rows, blocked, bias, "none", [], ""
            )
        case None:
            return None
