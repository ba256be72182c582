"""Linear layers whose weights are laid out once for this CPU, not at every call.

A few rows against a large matrix, which is what decoding and verification are, take the time that
the matrix takes to be read. PyTorch's own linear layer reads it in an order that the processor does
not like, and for more than one row copies it into a better one first, at every call. Here the copy
is kept:

``half``     FBGEMM's: weights in half precision, activations and sums in float32. Half the bytes,
             and the same numbers where every weight is a half-precision number, as weights that
             were stored in bfloat16 or float16 usually are.
``blocked``  oneDNN's: the weights as they are, in blocks. For bfloat16 where the processor computes
             in it, and for float32 weights that half precision would change. A row's product does
             not depend on how many rows there are, as those of the others do: what ``alike`` asks.
``brief``    the same with weights and activations rounded to bfloat16, sums in float32. As fast as
             ``half``, and laid out in a tenth of its time: for weights that are written again and
             again, those of a draft that learns.

A product that needs gradients takes the plain way over the weight itself, which stays where it is.
Written in place, the weight is laid out again at its next use: ``publish`` needs to know nothing. Who
writes the very weights that were there at first may say so (``as_at_first``).

Letters: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosched.training.precision import has_bfloat16

Layout = Literal["half", "blocked", "brief"]
Product = Callable[[Tensor], Tensor]
LARGEST_HALF = torch.finfo(torch.float16).max


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with its weight laid out for this CPU as well; made by ``pack``."""

    _rounds: bool
    _alike: bool
    _product: Product | None
    _first: Product | None
    _written: int

    @classmethod
    def take_over(cls, layer: nn.Linear, layout: Layout, rounds: bool, alike: bool) -> None:
        """Make that very layer one of these; who holds it or its weight need not know."""
        layer.__class__ = cls
        made = cast("PackedLinear", layer)
        made._rounds, made._alike = rounds, alike
        made._first = made._lay_out(layout)

    def as_at_first(self) -> None:
        """The weight is as it was when it was first laid out, so that need not be done again."""
        if self._first is not None:
            self._product, self._written = self._first, self.weight._version

    def _lay_out(self, layout: Layout | None) -> Product:
        self._written = self.weight._version
        self._product = _product(layout, self.weight, self.bias)
        return self._product

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., I]`` to ``[..., O]``."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return F.linear(input, self.weight, self.bias)
        product = self._product
        if product is None or self._written != self.weight._version:
            layout = layout_of(
                self.weight, self._rounds, self._alike, rewritten=product is not None
            )
            product = self._lay_out(layout)
        return product(input)

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays out its own weight."""
        return {**self.__dict__, "_product": None, "_first": None}


def pack(module: nn.Module, rounds: bool = False, alike: bool = False) -> int:
    """Lay out every plain linear layer on a CPU, ``module`` itself included; returns how many.

    A module that multiplies by its embedding shows it as a layer, ``tied_head``, which is one of them.

    With ``rounds`` float32 weights may be rounded to half precision: a draft that learns has weights
    between two such numbers, and what it loses by it is less than an update brings. Without, they
    are laid out in half precision only where that changes none of them. With ``alike`` only in a way
    that computes every row alike (``rows_are_alike`` tries it).
    """
    packed = 0
    for one in layers_of(module):
        if type(one) is not nn.Linear or one.weight.device.type != "cpu":
            continue  # a subclass has a product of its own
        if (layout := layout_of(one.weight, rounds, alike)) is not None:
            PackedLinear.take_over(one, layout, rounds, alike)
            packed += 1
    return packed


def as_at_first(module: nn.Module) -> None:
    """All weights are again what they were when ``pack`` laid them out."""
    for one in layers_of(module):
        if isinstance(one, PackedLinear):
            one.as_at_first()


def layers_of(module: nn.Module) -> Iterator[object]:
    """Its modules, and the layers that tied heads are shown as."""
    yield from module.modules()
    yield from (getattr(one, "tied_head", None) for one in module.modules())


@torch.no_grad()
def rows_are_alike(module: nn.Module, num_rows: int) -> bool:
    """Whether linear layers give equal rows for equal inputs, to the bit, in any place of so many."""
    generator = torch.Generator().manual_seed(0)
    for one in module.modules():
        if not isinstance(one, nn.Linear):
            continue
        row_I = torch.randn(one.in_features, generator=generator).to(one.weight)
        product = one(row_I.expand(num_rows, -1).contiguous())
        if not torch.equal(product, product[:1].expand_as(product)):
            return False
    return True


def layout_of(
    weight_OI: Tensor, rounds: bool, alike: bool = False, rewritten: bool = False
) -> Layout | None:
    """How this processor reads such a weight best; None where the plain way is all there is.

    One that is ``rewritten`` will be again, so that the time to lay it out counts too.
    """
    if weight_OI.dtype == torch.bfloat16:
        blocked = has_bfloat16()
    else:
        blocked = torch.backends.mkldnn.is_available() and weight_OI.dtype == torch.float32
    if rewritten and rounds and not alike and blocked:
        rounded = weight_OI.dtype == torch.float32 and has_bfloat16()
        return "brief" if rounded else "blocked"
    if weight_OI.dtype == torch.float32 and not alike and _fits_half(weight_OI, rounds):
        return "half"
    return "blocked" if blocked else None


def _fits_half(weight_OI: Tensor, rounds: bool) -> bool:
    if torch.backends.quantized.engine not in {"fbgemm", "x86"}:
        return False  # no FBGEMM
    if rounds:
        least, most = torch.aminmax(weight_OI)  # NaN where any is
        return bool(least >= -LARGEST_HALF) and bool(most <= LARGEST_HALF)
    return torch.equal(weight_OI.half().to(weight_OI.dtype), weight_OI)


def _product(layout: Layout | None, weight_OI: Tensor, bias_O: Tensor | None) -> Product:
    """The product over a copy of the weight in that layout; None: over the weight itself."""
    weight, bias = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    match layout:
        case "half":
            half = torch.ops.quantized.linear_prepack_fp16(weight, bias)
            return lambda rows: torch.ops.quantized.linear_dynamic_fp16(rows, half)
        case "blocked":
            blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
            return lambda rows: torch.ops.mkldnn._linear_pointwise(
                rows, blocked, bias, "none", [], ""
            )
        case "brief":
            brief = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
            least = None if bias is None else bias.bfloat16()
            return lambda rows: torch.ops.mkldnn._linear_pointwise(
                rows.bfloat16(), brief, least, "none", [], ""
            ).to(rows.dtype)
        case None:
            return lambda rows: F.linear(rows, weight, bias)
