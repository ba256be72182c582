"""A number, and whether it was measured, scaled, counted, given or assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cosched.errors import ConfigError

How = Literal["measured", "scaled", "counted", "given", "assumed"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, where it comes from, and a word more on it."""

    value: float
    how: How
    why: str

    def times(self, factor: float, why: str) -> Figure:
        """Multiplied; by 1 it is what it was."""
        if factor == 1.0:
            return self
        return Figure(self.value * factor, "scaled", f"{self.why}, {why}")


def missing(key: str, what: str) -> ConfigError:
    """Of a cost that is neither given nor measured."""
    return ConfigError(
        f"plan.{key}: required without a run that {what} was measured in (--from RUN_FOLDER)"
    )
