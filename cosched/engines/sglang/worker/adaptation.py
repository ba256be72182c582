"""What a worker inside SGLang's scheduler calls: it never raises, and never waits for the device.

An exception in a worker kills SGLang's whole engine. Ours stop the training instead: the server
goes on with the last good draft, says so once in its log, and shows it in its status.
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch

from cosched.engines.sglang.worker.operator import Answer, Command, Operator, Status
from cosched.engines.sglang.worker.standing import status_of
from cosched.errors import ConfigError, CoschedError
from cosched.loop.warning import StandingWarning
from cosched.training.ranks import PartedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cosched.coscheduler import Coscheduler
    from cosched.engines.sglang.worker.collector import Prefill, RoundCollector, Verified
    from cosched.engines.sglang.worker.lengths import ServedLengths
    from cosched.engines.sglang.worker.saving import Saving
    from cosched.engines.sglang.worker.texts import Texts
    from cosched.loop.roles import Sink
    from cosched.records import VerifyRound
    from cosched.sidecar.follower import Follower
    from cosched.telemetry.tally import Tally
    from cosched.telemetry.trackers.curves import Curves
    from cosched.training.ranks import Ranks

logger = logging.getLogger("cosched")

STARVED_AFTER = 64  # decisions in a row that found nothing to train on, until it is reported
SETTLING_S = 2.0  # that an ending server waits for an update that is under way

P = ParamSpec("P")


def _never_raises(
    method: Callable[Concatenate[Adaptation, P], None],
) -> Callable[Concatenate[Adaptation, P], None]:
    """Stop training where the method raises; after that do nothing."""

    @functools.wraps(method)
    def safe(self: Adaptation, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            logger.exception("cosched stops training; the server goes on with the last good draft")
            self.fail(
                str(error) if isinstance(error, PartedError) else f"{type(error).__name__}: {error}"
            )

    return safe


class Adaptation:
    """The co-scheduler inside one scheduler process.

    ``save`` writes the serving draft as a checkpoint, ``saving`` all that was learnt, unasked. ``trouble``
    says what is wrong with what trains while it trains on. With ``watches`` off (a policy that never
    trains) no rows are taken from the device and rounds are only counted. ``lengths`` says how many
    tokens a round drafts; None where that is always the same. Whoever makes the ``collector`` lets it tell
    ``tally`` of every request in every round. ``texts`` records those that it is told of; None records none.
    ``curves`` are closed at the end.
    """

    def __init__(
        self,
        algorithm: str,
        coscheduler: Coscheduler | Follower,
        collector: RoundCollector,
        ranks: Ranks,
        watches: bool,
        window: int,
        save: Callable[[Path], None],
        operator: Operator,
        sink: Sink,
        tally: Tally,
        saving: Saving | None = None,
        trouble: Callable[[], str | None] = lambda: None,
        lengths: ServedLengths | None = None,
        texts: Texts | None = None,
        curves: Curves | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._coscheduler = coscheduler
        self._collector = collector
        self._ranks = ranks
        self._watches = watches
        self.window = window
        self._save = save
        self._operator = operator
        self._sink = sink
        self._tally = tally
        self._saving = saving
        self._trouble = trouble
        self.lengths = lengths
        self._texts = texts
        self._curves = curves
        self._rounds_by_drafted: list[int] = []
        self._num_running = 0
        self._ready: list[VerifyRound] = []
        self._iteration: int | None = None  # whose counts come next
        self._failure: str | None = None
        self._warning = StandingWarning(sink)
        self._starving: str | None = None
        self._adapting = True

    @property
    def watching(self) -> bool:
        """Whether workers should hand over rows."""
        return self._watches and self._adapting and self._failure is None

    @property
    def version(self) -> int:
        return self._coscheduler.version

    # --- what a worker saw -----------------------------------------------------------------

    @_never_raises
    def prefilled(self, look: Callable[[], Prefill]) -> None:
        """A prefill was launched; ``look`` takes what is to be seen of it."""
        with torch.inference_mode(False), torch.no_grad():
            self._collector.prefilled(look())

    @_never_raises
    def verified(self, look: Callable[[], Verified]) -> None:
        """A verification was launched; its counts follow."""
        with torch.inference_mode(False), torch.no_grad():
            self._collector.verified(look())

    @_never_raises
    def counted(self, num_accepted: list[int]) -> None:
        """Accepted drafts of every request of the verification that was announced."""
        rounds = list(self._collector.counted(num_accepted, self._iteration))
        if self.lengths is not None:
            rounds = self.lengths.observe(rounds)
        self._ready.extend(rounds)
        for round_ in rounds:
            if round_.blocks:
                self._count_drafted(len(round_.blocks[0].path_K))

    def _count_drafted(self, tokens: int) -> None:
        missing = tokens + 1 - len(self._rounds_by_drafted)
        self._rounds_by_drafted += [0] * missing
        self._rounds_by_drafted[tokens] += 1

    def counts_follow(self, iteration: int) -> None:
        """The counts that come next are those of that pass of the scheduler's."""
        self._iteration = iteration

    @_never_raises
    def began(self, requests: Iterable[Any]) -> None:
        """Prompts of these requests of SGLang's are run, or pieces of them."""
        if self._texts is not None:
            for request in requests:
                self._texts.began(request)

    @_never_raises
    def finished(self, request_id: str) -> None:
        """The request is done or was aborted."""
        self._finish(request_id)

    def _finish(self, request_id: str) -> None:
        self._collector.finish(request_id)
        if self._texts is not None:
            self._texts.finished(request_id)

    @_never_raises
    def chose(self, num_queued: int, gone: Callable[[set[str]], set[str]]) -> None:
        """A batch was put together, and so many requests found no place in it.

        ``gone`` tells which of some requests the scheduler has no more: they have finished, also
        where SGLang says nothing of it (at the end of a prompt).
        """
        self._collector.num_queued = num_queued
        for request_id in sorted(gone(self._collector.requests)):  # alike on all ranks
            self._finish(request_id)

    # --- between two forward passes --------------------------------------------------------

    @_never_raises
    def step(self, num_running: int = 0) -> None:
        """Do what the operator asked for, and tell the co-scheduler of rounds that are complete.

        What is run next is a round of so many requests, or no round.
        """
        ready, self._ready = self._ready, []
        self._num_running = num_running
        apart = self.lengths.own_time() if self.lengths else nullcontext()
        with apart, torch.inference_mode(False), torch.no_grad():
            well = self._sync_ranks(num_running)
            self._tell(ready)
            if well and ready:
                self._look_after()
            else:
                self._warn()
                if ready:  # nothing is learnt, and what serves is still to be watched
                    self._operator.show(self.status)

    @_never_raises
    def idle(self) -> None:
        """Nothing is running: the policy may train all the same, and requests may have finished."""
        self.step()
        updates = self._coscheduler.counters.updates
        with torch.inference_mode(False), torch.no_grad():
            self._tell([self._collector.idle()])
        if self._coscheduler.counters.updates > updates:
            self._look_after()

    def ending(self) -> None:
        """Everybody has been answered, and the process is about to end."""
        if self._texts is not None:
            self._texts.close()
        if self._saving is not None:
            self._finish_what_goes_on()
            self._save_at_end(self._saving)
        if self._curves is not None:
            self._curves.close()

    @_never_raises
    def _save_at_end(self, saving: Saving) -> None:
        well = self._failure is None and not self._ranks.parted
        with torch.inference_mode(False), torch.no_grad():
            saving.end(trains=well and not self._coscheduler.busy)

    @_never_raises
    def _finish_what_goes_on(self) -> None:
        """Wait for what is under way, so that it is not lost."""
        until = time.monotonic() + SETTLING_S
        with torch.inference_mode(False), torch.no_grad():
            while self._coscheduler.busy and self.watching and time.monotonic() < until:
                time.sleep(0.005)
                self._tell([self._collector.idle()])

    def _tell(self, rounds: Iterable[VerifyRound]) -> None:
        for round_ in rounds:
            try:
                self._coscheduler.on_round(round_)
            except Exception:
                self._ranks.part()  # first of all: others may wait for what this one has to say
                raise

    def _sync_ranks(self, num_running: int) -> bool:
        """Bring all ranks to the same mind; whether they may go on learning."""
        lengths = self.lengths if num_running else None
        tokens = lengths.choose(num_running) if lengths else 0
        if self._ranks.parted:
            self._settle(lengths, tokens)
            self._answer_alone(self._operator.asked())
            return False
        commands = self._operator.asked()
        if self._saving is not None and self._failure is None and self._saving.due():
            # As if an operator of rank 0 had asked for it: so all ranks do it in the same round.
            commands.append((Command(verb="checkpoint"), lambda _answer: None))
        well, asked, tokens = self._ranks.sync(self._failure is None, bool(commands), tokens)
        self._settle(lengths, tokens)
        if asked:
            verbs = self._ranks.from_first([command for command, _ in commands])
            answers = [answer for _, answer in commands] or [lambda _answer: None] * len(verbs)
            self._obey(list(zip(verbs, answers, strict=True)))
        if not well and self._failure is None:
            self.fail("another rank stopped training")
        return well

    def _settle(self, lengths: ServedLengths | None, tokens: int) -> None:
        """Ranks that do not meet any more cannot choose together: they draft as many as can be."""
        if lengths is not None:
            apart = self._ranks.parted and self._ranks.size > 1
            lengths.settle(lengths.max_tokens if apart else tokens)

    def fail(self, reason: str) -> None:
        """Stop training for good, and say why."""
        if self._failure is None:
            self._failure = reason
            self._sink.emit("failure", reason=reason)
        self._coscheduler.learning = False
        self._ready.clear()
        self._operator.show(self.status, at_once=True)

    def _look_after(self) -> None:
        starved = self._coscheduler.counters.starved
        if starved == STARVED_AFTER:
            self._starving = f"the replay buffer had nothing to train on {starved} times in a row"
        elif not starved:
            self._starving = None
        self._warn()
        self._operator.show(self.status)

    def _warn(self) -> None:
        """Say what is wrong, once, and that it is not any more."""
        unsaved = self._saving.trouble if self._saving else None
        reasons = [one for one in (self._trouble(), self._starving, unsaved) if one]
        if self._warning.becomes("; ".join(reasons) or None):
            self._operator.show(self.status)

    # --- for operators ---------------------------------------------------------------------

    def _obey(self, commands: list[tuple[Command, Answer]]) -> None:
        for command, answer in commands:
            try:
                self._do(command)
            except CoschedError as error:
                answer(str(error))
            else:
                answer(self.status())

    def _answer_alone(self, commands: list[tuple[Command, Answer]]) -> None:
        """Training has stopped: ranks no longer meet, so nothing may need more than one."""
        for command, answer in commands:
            if command.verb == "status" or self._ranks.size == 1:
                self._obey([(command, answer)])
            else:
                answer(f"{command.verb}: training has stopped on {self._ranks.size} ranks, which "
                       f"can only say their status: {self._failure}")  # fmt: skip

    def _do(self, command: Command) -> None:
        match command.verb:
            case "status":
                pass
            case "on" | "off":
                self._adapting = command.verb == "on"
                self._coscheduler.learning = self._adapting and self._failure is None
            case "rollback":
                self._coscheduler.roll_back(command.version or 0)
            case "save":
                assert command.path is not None
                if self._ranks.rank == 0:
                    self._save(Path(command.path))  # a full disk stops no training
            case "checkpoint":
                assert self._saving is not None
                self._saving.take()
            case other:
                raise ConfigError(f"{other!r} is no command; status, on, off, rollback, save")
        if command.verb not in {"status", "checkpoint"}:
            logger.info("cosched: %s", command)

    def status(self) -> Status:
        """How it stands now."""
        return status_of(
            self._coscheduler,
            self._tally.figures(),
            algorithm=self._algorithm,
            adapting=self.watching,
            failure=self._failure,
            warning=self._warning.text,
            num_running=self._num_running,
            rounds_by_drafted=tuple(self._rounds_by_drafted),
        )
