"""What every objective owes: a pure choice among what there is to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.protocols import Expert, ExpertSettings
from cosched.records import Choice
from cosched.registry import OBJECTIVES
from cosched.testing.choosing import ChoosingContract
from cosched.testing.policies import random_snapshot

if TYPE_CHECKING:
    from cosched.protocols import Objective
    from cosched.records import Snapshot
    from cosched.registry import Plugin

NUM_EXPERTS = 3


class ObjectiveContract(ChoosingContract):
    """Every registered objective, or those in ``names``."""

    registry = OBJECTIVES

    def snapshot(self, seed: int) -> Snapshot:
        return random_snapshot(seed, NUM_EXPERTS)

    def settings(self, plugin: Plugin) -> list[Any]:
        """What to test an objective with, three experts where it has any; override it for more."""
        experts = tuple(Expert(lr=10.0**-n) for n in range(NUM_EXPERTS))
        chooses = issubclass(plugin.cls.Settings, ExpertSettings)
        return [plugin.cls.Settings(kind=plugin.name, **({"experts": experts} if chooses else {}))]

    def test_choices_are_among_what_there_is(self, case: tuple[Plugin, Any]) -> None:
        """An expert that exists; without experts the first objective, and nothing to try."""
        plugin, settings = case
        objective: Objective = plugin.cls(settings)
        number = len(settings.experts) if isinstance(settings, ExpertSettings) else 1
        for seed in range(500):
            choice = objective.choose(self.snapshot(seed))
            assert isinstance(choice, Choice)
            assert 0 <= choice.objective < number
            assert number > 1 or not choice.trial
