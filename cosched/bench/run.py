"""A suite from its file to its result."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cosched.bench.candidates import candidate_rows
from cosched.bench.figures import read_rows
from cosched.bench.machine import Machine, provenance
from cosched.bench.measure import measure, measured_with
from cosched.bench.plan import plan_suite
from cosched.bench.result import RunRecord, SuiteResult
from cosched.bench.rows import rows_of, too_low
from cosched.bench.suite import RunsSuite, ScriptSuite
from cosched.errors import ConfigError, RunFolderError
from cosched.report.table import load_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cosched.bench.measure import Progress
    from cosched.bench.plan import BenchPlan, BenchRun
    from cosched.bench.suite import AnySuite


def run_suite(
    file: Path,
    suite: AnySuite,
    overrides: Sequence[str],
    command: str,
    on_progress: Callable[[Progress], None],
) -> SuiteResult:
    """Measure what is not there yet; ``overrides`` change the settings of every run.

    ``command`` is what repeats it.

    Raises:
        CoschedError: a setting is not allowed, or something cannot be measured.
    """
    if isinstance(suite, RunsSuite):
        plan = plan_suite(file.stem, suite, file, overrides)
        measure(plan, on_progress)
        return _of_runs(file, suite, overrides, command, plan)
    if overrides:
        raise ConfigError(f"{file.stem}: a script takes no settings, got {overrides[0]!r}")
    return _of_script(file, suite, command)


def _of_runs(
    file: Path, suite: RunsSuite, overrides: Sequence[str], command: str, plan: BenchPlan
) -> SuiteResult:
    candidates = suite.figures == "candidates"
    rows = candidate_rows(plan.runs) if candidates else rows_of(suite, plan.runs)
    records = [_record(run) for run in plan.runs]
    return SuiteResult(
        name=file.stem,
        about=suite.about,
        command=command,
        commit=_one(record.commit for record in records),
        dirty=any(record.dirty for record in records),
        date=max(record.finished_at for record in records)[:10],
        machine=_one_machine([record.machine for record in records]),
        seconds=sum(record.seconds for record in records),
        suite=msgspec.to_builtins(suite),
        overrides=list(overrides),
        runs=records,
        rows=rows,
        failures=[] if candidates else too_low(suite, rows),
    )


def _record(run: BenchRun) -> RunRecord:
    path = run.job.config.run_folder
    facts, by = load_summary(path).run, measured_with(path)
    return RunRecord(
        name=run.job.id,
        seed=run.seed,
        seconds=facts["seconds"],
        finished_at=facts["finished_at"],
        commit=by.commit if by else None,
        dirty=by.dirty if by else True,
        machine=by.machine if by else None,
    )


def _of_script(file: Path, suite: ScriptSuite, command: str) -> SuiteResult:
    """Run it as a process of its own; what it prints is shown on standard error."""
    python = suite.python or sys.executable
    if suite.python and not Path(suite.python).exists():
        raise ConfigError(f"{file.stem}: there is no {suite.python}; `make sglang` makes it")
    by, started = provenance(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        words = [python, suite.script, *suite.words]
        with subprocess.Popen(
            [*words, "--json", str(figures)],
            env={**os.environ, **suite.env},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stdout or ():
                sys.stderr.write(line)
        if process.returncode:
            raise RunFolderError(
                f"{file.stem}: {shlex.join(words)} ended with {process.returncode}"
            )
        rows = read_rows(figures)
    return SuiteResult(
        name=file.stem,
        about=suite.about,
        command=command,
        commit=by.commit,
        dirty=by.dirty,
        date=time.strftime("%Y-%m-%d"),
        machine=by.machine,
        seconds=time.monotonic() - started,
        suite=msgspec.to_builtins(suite),
        overrides=[],
        runs=[],
        rows=rows,
    )


def command_of(file: Path, words: Sequence[str]) -> str:
    """What measures that suite with these options and overrides."""
    shipped = file.parent.as_posix().endswith("configs/bench")
    named = [file.stem] if shipped else ["-c", str(file)]
    return shlex.join(["cosched", "bench", *named, *words])


def _one(values: Iterable[str | None]) -> str | None:
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _one_machine(machines: Sequence[Machine | None]) -> Machine | None:
    return machines[0] if all(one == machines[0] for one in machines) else None
