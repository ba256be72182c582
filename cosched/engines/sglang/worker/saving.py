"""What a draft has learnt outlives its process: taken between two rounds, written beside them."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from cosched.errors import CoschedError
from cosched.loop.learner_state import LearnerState, on_host, write_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.coscheduler import Coscheduler
    from cosched.loop.learner_state import Origin, Tensors
    from cosched.settings.sections import CheckpointSettings
    from cosched.telemetry.saved_states import SavedStates
    from cosched.training.ranks import Ranks

WRITING_S = 12.0  # that an ending server waits for the disk: SGLang kills it after fifteen

logger = logging.getLogger("cosched")


class Saving:
    """Saves the state of a co-scheduler when it is due, and when the server ends.

    All ranks ``take`` at the same round, and rank 0, which alone has ``states``, writes: of the others
    it gets what their optimizers hold. ``draft`` copies the draft that serves, for a thread that may
    write it later. What cannot be saved is a ``trouble``, is tried again when it is due again, and
    stops nothing.
    """

    def __init__(
        self,
        coscheduler: Coscheduler,
        settings: CheckpointSettings,
        origin: Origin,
        ranks: Ranks,
        states: SavedStates | None,
        draft: Callable[[], Callable[[Path], None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trouble: str | None = None
        self._coscheduler = coscheduler
        self._settings = settings
        self._origin = origin
        self._ranks = ranks
        self._states = states
        self._draft = draft
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cosched-saving")
        self._writing: Future[Path] | None = None
        self._tried = self._saved = self._learnt
        self._tried_at = clock()

    @property
    def _learnt(self) -> tuple[int, int]:
        return self._coscheduler.counters.updates, self._coscheduler.version

    def due(self) -> bool:
        """Whether to take now; asked between two rounds, on rank 0. Never waits."""
        self._look()
        if self._states is None or self._writing or self._learnt == self._tried:
            return False
        updates = self._learnt[0] - self._tried[0]
        due = self._settings.due(updates, self._clock() - self._tried_at)
        return due and not self._coscheduler.busy  # else half an update would be saved

    def take(self, trains: bool = True) -> None:
        """Copy the state on all ranks, and have it written; the time is learning's.

        Without ``trains`` it is of what serves alone, and no rank asks another.
        """
        started = time.perf_counter()
        self._tried, self._tried_at = self._learnt, self._clock()
        problem, own, fill = "", {}, None
        try:
            own, fill = self._copied(trains)
        except (CoschedError, RuntimeError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        mine = problem, _of_one_rank(own) if self._ranks.rank else {}
        all_ranks = self._ranks.gather(mine) if trains else [mine]  # also where this one has none
        if problems := [problem for problem, _ in all_ranks if problem]:
            self._failed(problems[0])
        elif fill is not None and self._states is not None:
            tensors = [own, *(shard for _, shard in all_ranks[1:])]
            self._writing = self._thread.submit(self._states.save, partial(fill, tensors=tensors))
        self._coscheduler.counters.update_seconds_total += time.perf_counter() - started

    def _copied(self, trains: bool) -> tuple[Tensors, Callable[..., None] | None]:
        """This rank's tensors and, where they are written, what writes those of all."""
        counters, version, tensors = self._coscheduler.state(trains)
        own = on_host(tensors)
        if self._states is None:
            return own, None
        state = LearnerState(version=version, trains=trains, counters=counters, origin=self._origin)
        encoded = msgspec.json.encode(state)  # now: the counters go on
        return own, partial(write_state, state=encoded, save_draft=self._draft())

    def end(self, trains: bool) -> None:
        """The last state, if there is anything new in it, on the disk when this returns."""
        self._look(WRITING_S)
        wanted = self._settings.at_end and self._learnt[0] > 0 and self._learnt != self._saved
        if not (self._ranks.from_first(wanted) if trains else wanted):
            return
        self.take(trains)
        if trains and self._writing is None and self._ranks.size == 1:
            self.take(trains=False)  # the trainer has just been lost: what serves is there
        self._look(WRITING_S)

    def _look(self, patience_s: float = 0.0) -> None:
        """Take note of what has been written."""
        if self._writing is None or not wait_for([self._writing], patience_s).done:
            return
        done, self._writing = self._writing, None
        try:
            path = done.result()
        except (CoschedError, OSError, RuntimeError, MemoryError) as error:
            self._failed(str(error))
        else:
            self.trouble, self._saved = None, self._tried
            logger.info("cosched: what was learnt is saved in %s", path)

    def _failed(self, why: str) -> None:
        self.trouble = f"what was learnt is not saved: {why}"


def _of_one_rank(tensors: Tensors) -> Tensors:
    """What differs from rank to rank: ZeRO divides the optimizer."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
