"""A registered algorithm that SGLang takes for one of its own."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat

if TYPE_CHECKING:
    from collections.abc import Callable

OWN = {"create_worker"}  # what SGLang's own class for registered algorithms does


def adapted_algorithm(builtin: str) -> type:
    """A class of registered algorithms that answers every question as the built-in one does.

    SGLang asks ``is_eagle()`` and the like all over; its class for registered algorithms says no to
    all of them and lacks some.
    """
    member = compat.SpeculativeAlgorithm[builtin]

    def answer(name: str) -> Callable[..., Any]:
        return lambda _self, *args, **kwargs: getattr(member, name)(*args, **kwargs)

    questions = {
        name: answer(name)
        for name, value in vars(type(member)).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in OWN
    }
    return type(f"As{builtin.title()}", (compat.CustomSpecAlgo,), questions)
