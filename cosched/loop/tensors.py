"""Records whose tensors are somewhere else, or copies."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Record = TypeVar("Record")


def with_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """A record whose tensors, and those of the records and tuples in it, are changed."""
    return _changed(record, change)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_changed(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {one.name: getattr(value, one.name) for one in fields(value)}
        return replace(value, **{name: _changed(one, change) for name, one in found.items()})
    return value
