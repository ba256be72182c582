"""What everything owes that chooses from numbers alone: policies, objectives and draft lengths."""

from __future__ import annotations

import subprocess
import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest

from cosched.testing.registered import registered

if TYPE_CHECKING:
    from cosched.registry import Plugin, Registry

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "deepspeed"):
    sys.modules[name] = None  # importing it raises
import importlib, msgspec
module, name, ask, home, seen = sys.argv[1:]
cls = getattr(importlib.import_module(module), name)
settings, snapshot = msgspec.json.decode(sys.stdin.buffer.read(), type=list[msgspec.Raw])
snapshot = msgspec.json.decode(snapshot, type=getattr(importlib.import_module(home), seen))
getattr(cls(msgspec.json.decode(settings, type=cls.Settings)), ask)(snapshot)
"""


class ChoosingContract:
    """Every plugin of a registry, or those in ``names``; ``ask`` is the method that chooses."""

    registry: ClassVar[Registry]
    ask: ClassVar[str] = "choose"
    names: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def snapshot(self, seed: int) -> msgspec.Struct:
        """A state that a run might be in."""

    def settings(self, plugin: Plugin) -> list[Any]:
        """What to test a plugin with; override it where one has settings worth more cells."""
        return [plugin.cls.Settings(kind=plugin.name)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases = [
            pytest.param((plugin, settings), id=f"{plugin.name}{number or ''}")
            for plugin in registered(self.registry, self.names)
            for number, settings in enumerate(self.settings(plugin))
        ]
        metafunc.parametrize("case", cases)

    def test_it_is_pure(self, case: tuple[Plugin, Any]) -> None:
        """The same snapshot gives the same choice, whatever was asked before and of whom."""
        plugin, settings = case
        assert plugin.summary
        ask = getattr(plugin.cls(settings), self.ask)
        snapshots = [self.snapshot(seed) for seed in range(400)]
        choices = [ask(snapshot) for snapshot in snapshots]
        assert [ask(snapshot) for snapshot in reversed(snapshots)] == choices[::-1]
        ask_other = getattr(plugin.cls(settings), self.ask)
        assert [ask_other(snapshot) for snapshot in snapshots[200:]] == choices[200:]

    def test_it_does_without_a_tensor_library(self, case: tuple[Plugin, Any]) -> None:
        """It is imported and chooses where neither torch nor numpy can be imported."""
        plugin, settings = case
        snapshot = self.snapshot(0)
        classes = plugin.cls, type(snapshot)
        one, other = ([cls.__module__, cls.__qualname__] for cls in classes)
        process = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *one, self.ask, *other],
            input=msgspec.json.encode([settings, snapshot]),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == 0, process.stderr.decode()
