"""A sweep file, and the experiments that it stands for.

Every experiment is known by a digest of its resolved settings, so what has been run once, in this
sweep or an earlier one, is known again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import DictConfig, OmegaConf

from cosched.errors import ConfigError
from cosched.memory.sketch import sketch
from cosched.settings.arms import ADAPTED, FROZEN, PLAIN, VARIANT_NAME, WINDOW_SUFFIX, adapts
from cosched.settings.convert import convert
from cosched.settings.load import check_paths, resolved, typed
from cosched.settings.merge import from_keys, from_words, merge, read_yaml
from cosched.settings.sections import AdaptSettings, CheckpointSettings
from cosched.sweep.file import SweepFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cosched.settings.schema import Config
    from cosched.sweep.file import Axis, Changes, RecordPlan

DIGEST = 8  # hexadecimal digits: among thousands of experiments, none is mistaken for another


@dataclass(frozen=True, slots=True)
class Job:
    """One experiment for a worker."""

    id: str
    config: Config
    record: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the sweep on one text; ``settings`` are labels by axis, ``control`` a job's id."""

    job: Job
    drafter: str
    text: str
    settings: dict[str, str]
    control: str

    @property
    def arm(self) -> str:
        return self.job.config.arms[0]


class AxisInfo(msgspec.Struct, frozen=True):
    """An axis as the results show it; ``default`` is what an axis of ``around`` has elsewhere."""

    labels: list[str]
    default: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a sweep runs; ``recordings`` by text."""

    folder: Path
    recordings: dict[str, Job]
    controls: dict[str, Job]
    cells: list[Cell]
    axes: dict[str, AxisInfo]


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a sweep file; ``key.sub=value`` overrides change the experiment behind all cells.

    Raises:
        CoschedError: a setting of the file, of a recording or of any cell is not allowed.
    """
    raw = OmegaConf.to_container(read_yaml(path))  # references are the experiment's, not ours
    sweep = _narrowed(convert(raw, SweepFile, ""), overrides)
    base = merge(_experiment(sweep, path), from_keys(sweep.set, "set"), "set")
    base = merge(base, from_words(overrides), "override")
    points = list(_points(sweep))
    shared = twice.pop() if (twice := sweep.grid.keys() & sweep.around.keys()) else None
    if shared:
        raise ConfigError(f"around.{shared}: stands in grid as well; keep one of them")
    configs = [(settings, _at(base, changes, settings)) for settings, changes in points]
    layers = _layers(config for _, config in configs)
    recordings = recordings_of(sweep.record, base, layers, _typed)
    folder = configs[0][1].run_folder
    cells, controls = _cells(folder, configs, recordings)
    grid = {name: AxisInfo(list(values_of(name, a)), None) for name, a in sweep.grid.items()}
    around = {
        name: AxisInfo(list(values_of(name, a)), _default(configs[0][1], name, a))
        for name, a in sweep.around.items()
    }
    return Plan(folder, recordings, controls, cells, grid | around)


def _narrowed(sweep: SweepFile, overrides: Sequence[str]) -> SweepFile:
    """Without the axes of the grid whose keys are overridden: they would undo what was asked for."""
    fixed = {word.partition("=")[0] for word in overrides}
    grid = {name: axis for name, axis in sweep.grid.items() if name not in fixed}
    return msgspec.structs.replace(sweep, grid=grid)


def _experiment(sweep: SweepFile, path: Path) -> DictConfig:
    if (sweep.base is None) == (sweep.experiment is None):
        raise ConfigError("base: give exactly one of base, a file, and experiment")
    if sweep.base is not None:
        return read_yaml(path.parent / sweep.base)
    return OmegaConf.create(sweep.experiment or {})


def _points(sweep: SweepFile) -> Iterator[tuple[dict[str, str], Changes]]:
    """Labels by axis and changes of every point: the grid, times what varies around each of it."""
    single: list[tuple[dict[str, str], Changes]] = []
    if sweep.around or not sweep.cells:
        single.append(({}, {}))
    for name, axis in sweep.around.items():
        single += [({name: label}, changes) for label, changes in values_of(name, axis).items()]
    single += [({"cells": label}, changes) for label, changes in sweep.cells.items()]
    axes = [
        [(name, *value) for value in values_of(name, a).items()] for name, a in sweep.grid.items()
    ]
    for point in itertools.product(*axes):
        of_grid = {name: label for name, label, _ in point}
        changed = {key: value for _, _, changes in point for key, value in changes.items()}
        for settings, changes in single:
            yield {**of_grid, **settings}, {**changed, **changes}


def values_of(name: str, axis: Axis) -> dict[str, Changes]:
    """What an axis changes at each of its labels."""
    if isinstance(axis, dict):
        return axis
    return {_label(value): {name: value} for value in axis}


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _default(config: Config, name: str, axis: Axis) -> str:
    """What the axis is where it does not vary."""
    if name == "arm":
        return ADAPTED
    everything = OmegaConf.create(resolved(config))
    value = None if isinstance(axis, dict) else OmegaConf.select(everything, name)
    return "as set" if value is None else _label(value)


def _at(base: DictConfig, changes: Changes, settings: dict[str, str]) -> Config:
    """The experiment at one point, with the arm that is judged there; its text comes later."""
    where = _named(settings)
    arm = changes.get("arm", ADAPTED)
    if not isinstance(arm, str) or not adapts(arm):
        raise ConfigError(f"{where}: arm: {arm!r} does not learn; use {ADAPTED} or a variant")
    kept = {key: value for key, value in changes.items() if key != "arm"}
    fixed = {"arms": [arm], "engine.kind": "trace", "engine.trace": "of each text"}
    merged = merge(base, from_keys(kept, where), where)
    return _typed(merge(merged, from_keys(fixed, where), where), where)


def _named(settings: dict[str, str]) -> str:
    return ", ".join(f"{axis}={label}" for axis, label in settings.items()) or "the base point"


def _layers(configs: Iterable[Config]) -> set[int]:
    """Target layers whose features some cell's drafter needs."""
    drafters = {f"{config.target} {config.drafter}": config for config in configs}
    found = [sketch(config)[1].signal.feature_layers for config in drafters.values()]
    return {layer for layers in found for layer in layers}


def _typed(merged: DictConfig, where: str) -> Config:
    try:
        config = typed(merged, "experiment")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if config.drafts:
        raise ConfigError(
            f"{where}: drafts: a sweep judges one draft at a time, got {', '.join(config.drafts)}; "
            f"use drafter, and drafter.kind as an axis"
        )
    if config.adapt.checkpoint != CheckpointSettings():
        raise ConfigError(
            f"{where}: adapt.checkpoint: a sweep goes on with whole cells, and saves nothing of one; "
            f"leave it out"
        )
    return config


def recordings_of(
    record: RecordPlan,
    base: DictConfig,
    layers: set[int],
    read: Callable[[DictConfig, str], Config],
) -> dict[str, Job]:
    """A job for each text of ``record``, with the features of these layers; ``read`` makes its settings.

    Raises:
        CoschedError: a text's name or one of its settings is not allowed, or a file is missing.
    """
    jobs: dict[str, Job] = {}
    base = merge(base, from_keys(record.set, "record.set"), "record.set")
    for text, changes in record.texts.items():
        where = f"record.texts.{text}"
        if not VARIANT_NAME.fullmatch(text):
            raise ConfigError(f"{where}: a text's name has letters, digits, - and _ only")
        merged = merge(base, from_keys(changes, where), where)
        given = OmegaConf.select(merged, "record.feature_layers") or ()
        fixed = {
            "engine.kind": "embedded",
            "arms": [PLAIN],
            "record.feature_layers": sorted({*given, *layers}),
        }
        config = read(merge(merged, from_keys(fixed, where), where), where)
        check_paths(config)
        said = b"".join(Path(path).read_bytes() for path in config.workload.files.values())
        jobs[text] = named_job(text, Path(record.dir), without_learning(config), said, record=True)
    return jobs


def _cells(
    folder: Path, configs: list[tuple[dict[str, str], Config]], recordings: dict[str, Job]
) -> tuple[list[Cell], dict[str, Job]]:
    """A cell for each point and text, and the frozen arms that they are held against."""
    cells: dict[str, Cell] = {}
    controls: dict[str, Job] = {}
    place = folder / "cells"
    for settings, config in configs:
        drafter = config.drafter_settings
        frozen = [FROZEN] if drafter.window is None else [FROZEN, FROZEN + WINDOW_SUFFIX]
        for text, recording in recordings.items():
            trace = str(recording.config.run_folder / "trace")
            engine = msgspec.structs.replace(config.engine, trace=trace)
            judged = msgspec.structs.replace(config, engine=engine)
            control = msgspec.structs.replace(without_learning(judged), arms=tuple(frozen))
            held_against = named_job(f"{drafter.kind}-{text}-frozen", place, control)
            controls[held_against.id] = held_against
            job = named_job(f"{drafter.kind}-{text}", place, judged)
            cells.setdefault(job.id, Cell(job, drafter.kind, text, settings, held_against.id))
    return list(cells.values()), controls


def without_learning(config: Config) -> Config:
    """The same whatever is said of learning, for arms that do not."""
    return msgspec.structs.replace(config, adapt=AdaptSettings(), variants={})


def named_job(
    prefix: str, place: Path, config: Config, said: bytes = b"", record: bool = False
) -> Job:
    """An experiment under its own name; ``said`` is what a file has that the settings only name."""
    nameless = msgspec.structs.replace(
        config, run=msgspec.structs.replace(config.run, name="", dir="")
    )
    everything = msgspec.json.encode(resolved(nameless)) + said
    digest = hashlib.sha256(everything).hexdigest()[:DIGEST]
    name = f"{prefix}-{digest}"
    run = msgspec.structs.replace(config.run, name=name, dir=os.fspath(place))
    return Job(name, msgspec.structs.replace(config, run=run), record)
