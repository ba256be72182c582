"""How much a piece of code asks of a device, counted where there is none.

On a GPU the host hands over operations and runs ahead; what costs is each operation handed over, and
each time that the host stands and waits for a result. A CPU waits for nothing, but the operations are
the same, so they are counted by name.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Sequence

# They give a number or a size that the host must have before it can go on.
WAITING_OPERATORS = frozenset(
    {
        "_local_scalar_dense",  # item, float, int, bool
        "_unique2",
        "equal",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
        "unique_dim_consecutive",
    }
)
# To the host all at once, and from the host out of memory that is not pinned, which waits as well.
WAITING_CALLS = frozenset({"cpu", "numpy", "tolist", "__array__", "tensor", "as_tensor"})
FREE = frozenset(
    {"_local_scalar_dense", "_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh",
     "new_empty", "promote_types"}
)  # fmt: skip


class Counting:
    """Counts while it is entered: ``launches`` and ``waits``, each by name.

    An operator that computes is one launch, also where a GPU takes several kernels for it (a sort),
    so launches are a lower bound; views, and memory that is only set aside, are none. A wait is an
    operator that gives the host a number or a size, a copy of a tensor to the host (``cpu``, ``numpy``,
    ``tolist``), and one from the host out of ordinary memory, as ``torch.tensor`` of a list makes.
    Work of other threads, what numpy does on the host, and on a CPU ``to``, are not seen.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._entered = ExitStack()

    def __enter__(self) -> Counting:
        self._entered.enter_context(_Calls(self))
        self._entered.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()


class _Operators(TorchDispatchMode):
    """What reaches a device, forwards and backwards."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING_OPERATORS or _picks_by_mask(name, args) or _crosses(name, args, kwargs):
            self._counting.waits[name] += 1
        if name not in FREE and not _is_view(func):
            self._counting.launches[name] += 1
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """What never reaches an operator where host and device are one."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in WAITING_CALLS:
            self._counting.waits[name] += 1
        elif name == "__getitem__" and _has_list(args[1]):
            self._counting.waits["index by a list"] += 1
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    """Whether what it returns is storage of its arguments, which it does not write."""
    return any(
        out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns
    )


def _picks_by_mask(name: str, args: Sequence[Any]) -> bool:
    """Rows chosen by a mask: how many there are is known to the device only."""
    return name == "index" and any(
        isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
    )


def _crosses(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """A copy between host and device for which the host waits."""
    if name == "copy_":
        pinned = len(args) > 2 and bool(args[2])
        return args[0].device.type != args[1].device.type and not pinned
    if name == "_to_copy" and kwargs.get("device") is not None:
        return kwargs["device"].type != args[0].device.type and not kwargs.get("non_blocking")
    return False


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (
        isinstance(index, tuple) and any(isinstance(one, list) for one in index)
    )
