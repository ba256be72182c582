"""Stand-ins for packages that the peers import and that the compared code never calls.

A wheel of each costs hundreds of megabytes (``datasets``), another build of torch
(``torchvision``), or does not exist for a CPU (``sgl_kernel``).
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

PACKAGES = ("datasets", "sgl_kernel", "torchvision")


class _StandIns(MetaPathFinder, Loader):
    """Finds every module of some packages; whatever is imported from one is a mock."""

    def __init__(self, packages: list[str]) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] in self._packages
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):  # Python asks for some of these, and takes any answer
                raise AttributeError(name)
            return MagicMock(name=f"{module.__name__}.{name}")

        module.__dict__.update(__version__="1.0", __getattr__=attribute)


def install() -> None:
    """Put stand-ins in the place of those packages that are not there."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_StandIns(absent))
