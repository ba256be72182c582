"""How much memory a computation holds at once, counted operation by operation.

It counts on any device, the meta device included, where nothing is computed and no memory taken:
there the figure is that of the sizes alone.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable


def _all(operation: Any, result: Tensor) -> bool:
    del operation, result
    return True


class LivePeak(TorchDispatchMode):
    """Counts the bytes of what is made while it is on, as long as it lives.

    ``peak`` is the most that lived at once. Only results are counted that ``counts(operation,
    result)`` says yes to: each storage once, with the size it was made in; views and changes in
    place are no new storage. What an operation takes and gives back within itself is not seen.

    A storage is one object in Python for as long as anything holds it, a graph for its backward pass
    included, so its end is told by a weak reference and need not be looked for.
    """

    def __init__(self, counts: Callable[[Any, Tensor], bool] = _all) -> None:
        super().__init__()
        self.peak = 0
        self._counts = counts
        self._total = 0
        self._live: dict[int, weakref.ref[UntypedStorage]] = {}  # by id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if self._counts(func, tensor) and id(storage) not in given:
                self._count(storage)
        self.peak = max(self.peak, self._total)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._live:
            return

        def ended(_: weakref.ref[UntypedStorage]) -> None:
            del self._live[key]
            self._total -= size

        self._live[key] = weakref.ref(storage, ended)
        self._total += size


def _tensors(values: Any) -> list[Tensor]:
    """Those that have a storage: weights packed for a CPU have none that could be asked for."""
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if not tensor.is_mkldnn]
