"""The speculative algorithms that cosched registers with SGLang: those that the drafters name."""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat
from cosched.errors import PluginError
from cosched.registry import DRAFTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.engines.sglang.worker.adaptation import Adaptation
    from cosched.engines.sglang.worker.adapted import WorkerParts
    from cosched.records import SglangWorker


def workers() -> dict[str, SglangWorker]:
    """What drafts in SGLang, by drafter; without the drafters that nothing does it for."""
    named = {plugin.name: plugin.cls.sglang for plugin in DRAFTERS.plugins()}
    return {name: worker for name, worker in named.items() if worker is not None}


def algorithms() -> dict[str, SglangWorker]:
    """The same by algorithm; drafters may share one.

    Raises:
        PluginError: two drafters mean different things by one name.
    """
    found: dict[str, SglangWorker] = {}
    for drafter, worker in workers().items():
        if found.setdefault(worker.algorithm, worker) != worker:
            raise PluginError(
                f"the drafter {drafter!r} names {worker.worker} for SGLang's algorithm "
                f"{worker.algorithm}, another {found[worker.algorithm].worker}; rename one"
            )
    return found


def register(build: Callable[[WorkerParts], Adaptation]) -> None:
    """Register all of them; ``build`` makes the adaptation of a worker once it has its models."""
    for name, named in algorithms().items():
        spec_class: type = compat.resolve(named.algorithm_class)(named.builtin)
        compat.SpeculativeAlgorithm.register(name, supports_overlap=True, spec_class=spec_class)(
            _factory(named.worker, build)
        )


def has_worker(named: SglangWorker) -> bool:
    """Whether the module of a worker is there; the worker itself, and SGLang, are not imported."""
    try:
        return importlib.util.find_spec(named.worker.partition(":")[0]) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _factory(path: str, build: Callable[[WorkerParts], Adaptation]) -> Callable[[Any], type]:
    def create(_server_args: Any) -> type:
        worker: type = compat.resolve(path)
        return type(worker.__name__, (worker,), {"build": staticmethod(build)})

    return create
