"""What every objective owes: a pure choice among what there is to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from cosched.protocols import Expert, ExpertSettings
from cosched.records import Choice
from cosched.registry import OBJECTIVES
from cosched.testing.policies import ask_without_torch, random_snapshot
from cosched.testing.registered import registered

if TYPE_CHECKING:
    from cosched.protocols import Objective
    from cosched.registry import Plugin

NUM_EXPERTS = 3


class ObjectiveContract:
    """Every registered objective, or those in ``names``."""

    names: ClassVar[tuple[str, ...] | None] = None

    def settings(self, plugin: Plugin) -> list[Any]:
        """What to test an objective with, three experts where it has any; override it for more."""
        experts = tuple(Expert(lr=10.0**-n) for n in range(NUM_EXPERTS))
        chooses = issubclass(plugin.cls.Settings, ExpertSettings)
        return [plugin.cls.Settings(kind=plugin.name, **({"experts": experts} if chooses else {}))]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases = [
            pytest.param((plugin, settings), id=f"{plugin.name}{number or ''}")
            for plugin in registered(OBJECTIVES, self.names)
            for number, settings in enumerate(self.settings(plugin))
        ]
        metafunc.parametrize("case", cases)

    def test_it_is_pure(self, case: tuple[Plugin, Any]) -> None:
        """The same snapshot gives the same choice, whatever was asked before and of whom."""
        plugin, settings = case
        assert plugin.summary
        objective: Objective = plugin.cls(settings)
        snapshots = [random_snapshot(seed, NUM_EXPERTS) for seed in range(200)]
        choices = [objective.choose(snapshot) for snapshot in snapshots]
        assert [objective.choose(snapshot) for snapshot in reversed(snapshots)] == choices[::-1]
        other: Objective = plugin.cls(settings)
        assert [other.choose(snapshot) for snapshot in snapshots[100:]] == choices[100:]

    def test_choices_are_among_what_there_is(self, case: tuple[Plugin, Any]) -> None:
        """An expert that exists; without experts the first objective, and nothing to try."""
        plugin, settings = case
        objective: Objective = plugin.cls(settings)
        number = len(settings.experts) if isinstance(settings, ExpertSettings) else 1
        for seed in range(500):
            choice = objective.choose(random_snapshot(seed, NUM_EXPERTS))
            assert isinstance(choice, Choice)
            assert 0 <= choice.objective < number
            assert number > 1 or not choice.trial

    def test_it_does_without_a_tensor_library(self, case: tuple[Plugin, Any]) -> None:
        """It is imported and chooses where neither torch nor numpy can be imported."""
        ask_without_torch(*case, "choose", random_snapshot(0, NUM_EXPERTS))
