"""Which plugins a contract runs over, and on how many threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from cosched.registry import Plugin, Registry


def registered(registry: Registry, names: tuple[str, ...] | None) -> list[Plugin]:
    """All plugins of a role, or those of these names.

    Raises:
        PluginError: no such name; the message lists those there are.
    """
    if names is None:
        return registry.plugins()
    known = {plugin.name: plugin for plugin in registry.plugins()}
    for name in names:
        registry.get(name)
    return [known[name] for name in names]


class OneThread:
    """Tests of small tensors: one thread is faster, many times so on a busy machine."""

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Generator[None]:
        number = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(number)
