"""A suite's file: which runs it is made of, or which script, and how its figures are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta
from omegaconf import OmegaConf

from cosched.errors import ConfigError
from cosched.settings.convert import convert
from cosched.settings.merge import read_yaml
from cosched.settings.sections import Positive, Section
from cosched.sweep.file import Axis, Changes, RecordPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path("configs/bench")
Compared = Literal["tokens_per_s", "tau", "tau_novel", "tau_novel_behind"]
Words = Annotated[tuple[str, ...], Meta(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]


class Comparison(Section, frozen=True):
    """``against.NAME``: a figure over that of the best of other ``arms``, by this ``figure``.

    An arm named without its draft is that of the same draft; ``plain`` has none. One that was not
    run in full does not count, and an arm is not compared with itself.
    """

    arms: Words
    figure: Compared = "tokens_per_s"


class View(Section, frozen=True):
    """``views.NAME``: how a page shows the suite, ``<!-- bench: SUITE NAME -->``.

    A line for each place, with these ``figures``; or with ``cell`` a grid, the axis ``down`` by the axis
    ``across``, in each cell ``{ARM: FIGURE}`` filled in, or ``{FIGURE}`` where arms go ``down``, with their
    ``intervals`` where asked. ``names`` are shown in the place of labels; ``only`` keeps these labels of an
    axis, in this order. ``source`` adds the line that says where the figures come from.
    """

    figures: tuple[str, ...] = ()
    down: str = "draft"
    across: str = "text"
    cell: str | None = None
    intervals: bool = False
    names: dict[str, str] = msgspec.field(default_factory=dict)
    only: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    source: bool = True


class Suite(Section, frozen=True, kw_only=True):
    """What all suites have: ``about`` what is asked, ``minutes`` it took on two cores, and ``views``."""

    about: str
    minutes: Positive
    views: dict[str, View] = msgspec.field(default_factory=dict)


class RunsSuite(Suite, frozen=True, kw_only=True, tag_field="kind", tag="runs"):
    """``kind: runs``: the experiment ``base``, a file beside this one, once for each of ``seeds`` and point of ``grid``.

    ``set`` changes it for all runs; an axis of ``grid`` has values of one key, or named bundles.
    ``rotate_texts`` begins with another of ``workload.documents`` for each seed: what learning may spend
    in advance it spends on the first. With ``record`` every text is recorded once, and the runs are on
    the recordings, with speeds where ``engine.live`` is set. ``against`` says what is compared.
    ``behind`` is a generated position, the beginning of a bucket of the reports, from which on the figure
    ``tau_novel_behind`` counts. A figure below ``at_least``, of an arm that learns, fails the suite.
    ``figures: candidates`` asks the guard instead: what became of each request's first candidate.
    """

    base: str
    set: Changes = msgspec.field(default_factory=dict)
    seeds: Seeds = (0,)
    rotate_texts: bool = False
    record: RecordPlan | None = None
    grid: dict[str, Axis] = msgspec.field(default_factory=dict)
    figures: Literal["arms", "candidates"] = "arms"
    against: dict[str, Comparison] = msgspec.field(default_factory=dict)
    behind: int | None = None
    at_least: dict[str, float] = msgspec.field(default_factory=dict)


class ScriptSuite(Suite, frozen=True, kw_only=True, tag_field="kind", tag="script"):
    """``kind: script``: a measurement of its own, ``script`` with ``words``, which writes figures with ``--json``.

    ``python`` is the interpreter where it is another one than ours, and ``env`` is added to its
    environment.
    """

    script: str
    words: tuple[str, ...] = ()
    python: str | None = None
    env: dict[str, str] = msgspec.field(default_factory=dict)


AnySuite = RunsSuite | ScriptSuite


def load_suite(path: Path) -> AnySuite:
    """Read a suite's file.

    Raises:
        ConfigError: it cannot be read, or a key of it is not allowed.
    """
    raw: Any = OmegaConf.to_container(read_yaml(path))
    try:
        return convert(raw, AnySuite, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def suite_file(name: str) -> Path:
    """The file of a suite that is shipped.

    Raises:
        ConfigError: there is no such suite.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(file.stem for file in suite_files())
        raise ConfigError(
            f"no suite {name!r}: there is no {path}; "
            + (f"there are {known}" if known else "`cosched bench` runs in the repository's folder")
        )
    return path


def suite_files(root: Path | None = None) -> Iterator[Path]:
    """All that are shipped, by name; in the folder ``root`` of the repository, or here."""
    yield from sorted(((root or Path()) / FOLDER).glob("*.yaml"))
