"""From a plan to its results: recordings first, then the cells, each of them once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from cosched.errors import RunFolderError
from cosched.sweep.pool import Event, Pool
from cosched.sweep.results import Failure, SweepSummary, finished, read_cell
from cosched.telemetry.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.sweep.plan import Cell, Job, Plan

MARKER = "sweep.yaml"  # what makes a folder a sweep's, and may be replaced


class Sweep:
    """Runs what has not been run yet.

    ``jobs`` are those to come, recordings first; one whose folder has whole figures is not among
    them. ``num_known`` counts the others.
    """

    def __init__(self, plan: Plan, num_workers: int) -> None:
        self.plan = plan
        self.interrupted = False
        self._num_workers = num_workers
        self._failures: dict[str, str] = {}
        everything = [*plan.controls.values(), *(cell.job for cell in plan.cells)]
        self._recordings = [
            job for job in plan.recordings.values() if not finished(job.config.run_folder)
        ]
        self._rest = [job for job in everything if not finished(job.config.run_folder)]
        self.num_known = len(everything) + len(plan.recordings) - len(self.jobs)

    @property
    def jobs(self) -> list[Job]:
        return [*self._recordings, *self._rest]

    def run(self, on_event: Callable[[Event], None]) -> SweepSummary:
        """Run, and write ``sweep.json``; Ctrl-C ends it early and keeps the cells that are done."""
        started = time.perf_counter()
        pool = Pool(self._num_workers, self.plan.folder / "logs")
        try:
            self._failures |= pool.run(self._recordings, on_event)
            self._failures |= pool.run(self._possible(), on_event)
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            pool.close()
        summary = self._summary(time.perf_counter() - started)
        content = msgspec.json.format(msgspec.json.encode(summary))
        RunFolder(self.plan.folder, MARKER).write("sweep.json", content)
        return summary

    def _possible(self) -> list[Job]:
        """Those whose text is there."""
        lost = {
            str(job.config.run_folder / "trace"): f"its text was not recorded: {why}"
            for job in self.plan.recordings.values()
            if (why := self._failures.get(job.id)) is not None
        }
        for job in self._rest:
            if (trace := str(job.config.engine.trace)) in lost:
                self._failures[job.id] = lost[trace]
        return [job for job in self._rest if job.id not in self._failures]

    def _summary(self, seconds: float) -> SweepSummary:
        cells, failures, num_missing = [], [], 0
        for cell in self.plan.cells:
            why = self._failures.get(cell.job.id)
            if why is None and (control := self._failures.get(cell.control)) is not None:
                why = f"its frozen control failed: {control}"
            if why is not None:
                failures.append(_failure(cell, why))
                continue
            try:
                cells.append(read_cell(self.plan, cell))
            except RunFolderError:
                num_missing += 1  # interrupted before it was done
        return SweepSummary(
            sweep={
                "name": self.plan.folder.name,
                "interrupted": self.interrupted,
                "seconds": seconds,
                "workers": self._num_workers,
                "run_now": len(self.jobs),
                "known": self.num_known,
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
            axes=self.plan.axes,
            cells=cells,
            failures=failures,
            num_missing=num_missing,
        )


def _failure(cell: Cell, message: str) -> Failure:
    return Failure(
        id=cell.job.id,
        drafter=cell.drafter,
        text=cell.text,
        settings=cell.settings,
        message=message,
    )
