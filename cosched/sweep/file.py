"""The keys of a sweep's own file."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cosched.settings.sections import Section

Changes = dict[str, Any]  # {"key.sub": value}
# Values of one key, or named bundles of settings that change together.
Axis = Annotated[list[Any], Meta(min_length=1)] | Annotated[dict[str, Changes], Meta(min_length=1)]


class RecordPlan(Section, frozen=True):
    """``record``: the ``texts`` that every cell is judged on, each recorded once into ``dir``.

    ``set`` holds for all recordings, a text's own settings for its own. Sweeps whose recordings have
    the same settings share them.
    """

    texts: Annotated[dict[str, Changes], Meta(min_length=1)]
    dir: str = "runs/traces"
    set: Changes = msgspec.field(default_factory=dict)


class SweepFile(Section, frozen=True):
    """A sweep: an experiment (``base``, a file beside this one, or ``experiment``, inline) and axes.

    ``set`` changes the experiment for all cells. ``grid`` is the cross product of its axes;
    ``around`` changes one of its axes at a time, and is done for each point of the grid; ``cells``
    are points of their own. The key ``arm`` says which arm is judged, ``adapted`` or a variant.
    An override of a key that is an axis of ``grid`` takes the place of that axis.
    """

    record: RecordPlan
    base: str | None = None
    experiment: dict[str, Any] | None = None
    set: Changes = msgspec.field(default_factory=dict)
    grid: dict[str, Axis] = msgspec.field(default_factory=dict)
    around: dict[str, Axis] = msgspec.field(default_factory=dict)
    cells: dict[str, Changes] = msgspec.field(default_factory=dict)
