"""Weighted sums of losses.

Letters: M rows, V vocabulary (that of the draft, both sides).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from cosched.errors import PluginError
from cosched.protocols import LossSettings
from cosched.registry import LOSSES
from losses.reduction import ReducedLoss

if TYPE_CHECKING:
    from torch import Tensor

SHARED = {field.name for field in msgspec.structs.fields(LossSettings)} - {"kind"}


class Weighted(msgspec.Struct, frozen=True):
    """What every term has beside its kind and its kind's fields."""

    weight: Annotated[float, Meta(ge=0)] = 1.0


class SumSettings(LossSettings, frozen=True):
    """``adapt.loss`` of ``sum``: ``terms`` have a ``kind``, a ``weight`` and their kind's fields.

    Fields that all losses share (position decay and the like) stand beside ``terms``, not in them.
    """

    terms: Annotated[tuple[dict[str, Any], ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not sum(weight for weight, _ in self.losses()):
            raise ValueError("the weights of `terms` sum to zero; give one a weight above zero")

    def losses(self) -> list[tuple[float, ReducedLoss]]:
        """Weight and loss of each term.

        Raises:
            ValueError: a term is not what its kind allows; the message names it.
        """
        found: list[tuple[float, ReducedLoss]] = []
        for number, term in enumerate(self.terms):
            try:
                found.append(_term(dict(term)))
            except msgspec.ValidationError as error:
                message, _, tail = str(error).partition(" - at `$")
                raise ValueError(f"terms[{number}]{tail.strip('`')}: {message}") from error
            except (ValueError, PluginError) as error:
                raise ValueError(f"terms[{number}]: {error}") from error
        return found


@LOSSES.register("sum")
class Sum(ReducedLoss):
    r"""Weighted sum of other losses, row by row.

    .. math:: \ell_m = \sum_i w_i \ell_{im}

    The weights are used as they are given; a term of weight zero is not computed. All terms have one
    teacher: at the temperature of the request if one of them asks for that. Source: such
    mixtures are usual for drafts, as 0.9 total variation and 0.1 cross-entropy in DSpark, arXiv
    2607.05147.
    """

    Settings = SumSettings

    def __init__(self, settings: SumSettings) -> None:
        super().__init__(settings)
        self.terms = [(weight, loss) for weight, loss in settings.losses() if weight]
        losses = [loss for _, loss in self.terms]
        self.proper = all(loss.proper for loss in losses)
        self.detaches = self.detaches or any(loss.detaches for loss in losses)
        self.needs_reference = any(loss.needs_reference for loss in losses)
        self.teaches = any(loss.teaches for loss in losses)
        self.at_temperature = any(loss.at_temperature for loss in losses)

    def values(self, student_MV: Tensor, teacher_MV: Tensor, reference_MV: Tensor | None) -> Tensor:
        """Loss of each row ``[M]``, from logits."""
        first, *others = [
            weight * loss.values(student_MV, teacher_MV, reference_MV)
            for weight, loss in self.terms
        ]
        return sum(others, first)


def _term(fields: dict[str, Any]) -> tuple[float, ReducedLoss]:
    weight = msgspec.convert(fields, Weighted).weight
    fields.pop("weight", None)
    kind = fields.get("kind")
    if not isinstance(kind, str):
        raise ValueError("`kind` is required, the name of a loss")
    cls = LOSSES.get(kind)
    if not issubclass(cls, ReducedLoss):
        raise ValueError(f"{kind!r} is no loss of single rows and cannot be a term")
    own = {field.name for field in msgspec.structs.fields(cls.Settings)} - SHARED
    for name in fields.keys() - own:
        beside = "it stands beside `terms`; " if name in SHARED else ""
        allowed = ", ".join(sorted({*own, "weight"}))
        raise ValueError(f"{kind!r} has no field {name!r} here; {beside}allowed here: {allowed}")
    return weight, cls(msgspec.convert(fields, cls.Settings))
