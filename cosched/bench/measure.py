"""Runs what a suite lacks, one run after the other, and says how far it is."""

from __future__ import annotations

import time
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cosched.bench.machine import Provenance, provenance
from cosched.errors import CoschedError
from cosched.report.table import load_summary
from cosched.runs import resume
from cosched.runs.experiment import Experiment
from cosched.settings.load import to_yaml
from cosched.sweep.results import finished
from cosched.telemetry.run_folder import RunFolder, read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.bench.plan import BenchPlan
    from cosched.sweep.plan import Job

MEASURED_WITH = "measured_with.json"  # beside the summary: a run may be older than the code is now
TELLING = 0.02  # of a run done, before which most of its time went into its start


class SuiteInterruptedError(CoschedError):
    """Ctrl-C; what was measured stays, and the same command goes on."""


class Progress(NamedTuple):
    """Where a suite is: a job's place among ``total``, its share done, and about how long is left."""

    name: str
    place: int
    total: int
    share: float = 0.0
    seconds_left: float | None = None


def measure(plan: BenchPlan, on_progress: Callable[[Progress], None]) -> None:
    """Run all that is missing; an interrupted run goes on from its last group of requests.

    Raises:
        SuiteInterruptedError: by Ctrl-C.
        CoschedError: a run cannot be done.
    """
    jobs = plan.jobs
    took = {job.id: _seconds(job) for job in jobs if finished(job.config.run_folder)}
    for place, job in enumerate(jobs, 1):
        if job.id not in took:
            others = [took.get(other.id) for other in jobs if other.record == job.record]
            alike = [seconds for seconds in others if seconds is not None]
            left = sum(other.id not in took for other in jobs[place:])
            _run(job, _Clock(Progress(job.id, place, len(jobs)), alike, left, on_progress))
            took[job.id] = _seconds(job)


class _Clock:
    """Tells how far a job is, and guesses how long it and the ``left`` behind it will take.

    ``alike`` are the seconds of jobs like it; without any it goes by its own.
    """

    def __init__(
        self,
        progress: Progress,
        alike: list[float],
        left: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._progress, self._on_progress = progress, on_progress
        self._each, self._left = (fmean(alike) if alike else None), left
        self._started = time.monotonic()

    def tell(self, share: float) -> None:
        spent = time.monotonic() - self._started
        own = spent / share if share >= TELLING else None
        each, left = self._each or own, None
        if each is not None:
            left = max(0.0, (own or each) - spent) + each * self._left
        self._on_progress(self._progress._replace(share=share, seconds_left=left))


def _run(job: Job, clock: _Clock) -> None:
    """One run into its folder: anew, or on from where it was interrupted."""
    clock.tell(0.0)
    path = job.config.run_folder
    going_on = not job.record and (path / resume.FOLDER).exists()
    folder, experiment = RunFolder(path), Experiment(job.config, job.record)
    now, before = provenance(), measured_with(path) if going_on else None
    if not going_on:
        folder.create(overwrite=True)
        folder.write("config.yaml", to_yaml(job.config))  # what makes it a run's folder comes first
    elif before is None or before.commit != now.commit:
        now = msgspec.structs.replace(now, dirty=True)  # of two commits
    folder.write(MEASURED_WITH, msgspec.json.encode(now))
    done = 0

    def advance(_arm: str, number: int) -> None:
        nonlocal done
        done += number
        clock.tell(min(1.0, done / max(1, experiment.total_tokens)))

    experiment.run(folder, advance, resume=going_on)
    if experiment.interrupted:
        raise SuiteInterruptedError(f"interrupted; {path} is gone on with by the same command")


def measured_with(run_folder: Path) -> Provenance | None:
    """The commit and machine of a run; None where it was not this command that ran it.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = run_folder / MEASURED_WITH
    return read_json(path, Provenance) if path.exists() else None


def _seconds(job: Job) -> float | None:
    """What a job took that is done; None where its summary is of a time that did not say."""
    return load_summary(job.config.run_folder).run.get("seconds")
