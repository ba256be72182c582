"""The speculative algorithms that cosched registers: the built-in ones, with workers of its own."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker import pard_algorithm
from cosched.engines.sglang.worker.as_builtin import adapted_algorithm

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.engines.sglang.worker.adaptation import Adaptation
    from cosched.engines.sglang.worker.adapted import WorkerParts

ALGORITHMS = {  # ours: the built-in one that SGLang is to take it for, our worker
    "COSCHED_EAGLE3": ("EAGLE3", "cosched.engines.sglang.worker.eagle3:Eagle3Worker"),
    "COSCHED_DFLASH": ("DFLASH", "cosched.engines.sglang.worker.dflash:DFlashWorker"),
    "COSCHED_PARD": ("STANDALONE", "cosched.engines.sglang.worker.adapted_pard:AdaptedPardWorker"),
}
ALGORITHM_OF = {"eagle3": "COSCHED_EAGLE3", "dflash": "COSCHED_DFLASH", "pard": "COSCHED_PARD"}
"""By drafter."""


def register(build: Callable[[WorkerParts], Adaptation]) -> None:
    """Register all of them; ``build`` makes the adaptation of a worker once it has its models."""
    with_arguments = {pard_algorithm.NAME: pard_algorithm.algorithm}
    for name, (builtin, worker) in ALGORITHMS.items():
        make = with_arguments.get(name, adapted_algorithm)
        compat.SpeculativeAlgorithm.register(name, supports_overlap=True, spec_class=make(builtin))(
            _factory(worker, build)
        )


def has_worker(algorithm: str) -> bool:
    """Whether the worker of one of ``ALGORITHMS`` is there; imports nothing."""
    return importlib.util.find_spec(ALGORITHMS[algorithm][1].partition(":")[0]) is not None


def _factory(path: str, build: Callable[[WorkerParts], Adaptation]) -> Callable[[Any], type]:
    def create(_server_args: Any) -> type:
        module, _, name = path.partition(":")
        worker = getattr(importlib.import_module(module), name)
        return type(name, (worker,), {"build": staticmethod(build)})

    return create
