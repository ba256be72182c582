"""The runs that a suite stands for: each seed of each point of its grid, on each of its texts.

As in a sweep a run is known by a digest of its resolved settings, so what has been run once stays.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import ConfigError
from cosched.memory.sketch import sketch
from cosched.settings.load import check_paths, typed
from cosched.settings.merge import from_keys, from_words, merge, read_yaml
from cosched.sweep.plan import Job, named_job, recordings_of, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from omegaconf import DictConfig

    from cosched.bench.suite import RunsSuite
    from cosched.settings.schema import Config
    from cosched.sweep.file import Changes

WORK = Path("runs/bench")


@dataclass(frozen=True, slots=True)
class BenchRun:
    """A run; ``labels`` say where in the grid it stands, and on which recorded text."""

    labels: dict[str, str]
    seed: int
    job: Job


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What there is to run into ``folder``, recordings first."""

    folder: Path
    recordings: list[Job]
    runs: list[BenchRun]

    @property
    def jobs(self) -> list[Job]:
        return [*self.recordings, *(run.job for run in self.runs)]


def plan_suite(
    name: str, suite: RunsSuite, file: Path, overrides: Sequence[str] = (), work: Path = WORK
) -> BenchPlan:
    """All runs of a suite; ``overrides`` change every run, recordings not.

    Raises:
        CoschedError: a setting of a run is not allowed, or a file that it names is missing.
    """
    base, words = read_yaml(file.parent / suite.base), from_words(overrides)
    folder = work / name
    points = list(_points(suite))
    changed = [
        (labels, merge(_changed(base, {**suite.set, **changes}, labels), words, "override"))
        for labels, changes in points
    ]
    recordings: dict[str, Job] = {}
    if suite.record is not None:
        layers = {layer for _, merged in changed for layer in _layers(merged)}
        recordings = recordings_of(suite.record, base, layers, typed)
    runs = [
        run
        for (labels, one), seed in itertools.product(changed, suite.seeds)
        for run in _on_texts(one, labels, seed, suite, recordings, folder)
    ]
    return BenchPlan(folder, list(recordings.values()), runs)


def _points(suite: RunsSuite) -> Iterator[tuple[dict[str, str], Changes]]:
    """Labels and changes of each point of the grid; one without any where there is no grid."""
    axes = [
        [(axis, label, changes) for label, changes in values_of(axis, values).items()]
        for axis, values in suite.grid.items()
    ]
    for point in itertools.product(*axes):
        labels = {axis: label for axis, label, _ in point}
        yield labels, {key: value for _, _, own in point for key, value in own.items()}


def _changed(base: DictConfig, changes: Mapping[str, Any], labels: Mapping[str, str]) -> DictConfig:
    where = ", ".join(f"{axis}={label}" for axis, label in labels.items()) or "set"
    return merge(base, from_keys(changes, where), where)


def _on_texts(
    merged: DictConfig,
    labels: dict[str, str],
    seed: int,
    suite: RunsSuite,
    recordings: Mapping[str, Job],
    folder: Path,
) -> Iterator[BenchRun]:
    """A point and seed on every text that was recorded, or on the experiment's own."""
    for text, recording in recordings.items() or [(None, None)]:
        own: dict[str, Any] = {"run.seed": seed}
        if recording is not None:
            trace = str(recording.config.run_folder / "trace")
            own |= {"engine.kind": "trace", "engine.trace": trace, "workload.max_prompts": None}
        config = typed(merge(merged, from_keys(own, "seed"), "seed"), suite.base)
        if suite.rotate_texts:
            config = _rotated(config, seed)
        if recording is None:
            check_paths(config)
        shown = labels if text is None or len(recordings) == 1 else {**labels, "text": text}
        prefix = "-".join((*shown.values(), f"seed{seed}"))
        yield BenchRun(shown, seed, named_job(_as_name(prefix), folder, config))


def _as_name(text: str) -> str:
    """What may be a folder's name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)


def _rotated(config: Config, seed: int) -> Config:
    """With another of several texts first."""
    texts = config.workload.documents
    if not isinstance(texts, tuple):
        raise ConfigError("rotate_texts: workload.documents is no list of files")
    first = seed % len(texts)
    workload = msgspec.structs.replace(config.workload, documents=(*texts[first:], *texts[:first]))
    return msgspec.structs.replace(config, workload=workload)


def _layers(merged: DictConfig) -> set[int]:
    """Target layers whose features a draft of the run needs."""
    on_trace = from_keys({"engine.kind": "trace", "engine.trace": "of each text"}, "record")
    drafts = typed(merge(merged, on_trace, "record"), "experiment").by_draft.values()
    return {
        layer
        for own in drafts
        if own.drafter is not None
        for layer in sketch(own)[1].signal.feature_layers
    }
