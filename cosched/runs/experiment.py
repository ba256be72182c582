"""The arms of one file on the same requests, side by side, into one run folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from cosched.build.embedded import Arm, World, build_arm, build_recorder, build_world
from cosched.build.served_arm import ServedArm, ServedWorld, build_served_arm, build_served_world
from cosched.errors import ConfigError
from cosched.protocols import ServesAdapters
from cosched.runs import resume as resume_state
from cosched.runs.keeping import (
    Keeping,
    check_kept,
    origin_of,
    point_of,
    put_back,
    settle,
    updates_of,
)
from cosched.runs.summary import Running, groups_of, run_summary
from cosched.runs.tracking import Tracking
from cosched.settings.arms import adapts
from cosched.settings.load import to_yaml
from cosched.telemetry.metrics import RequestLog, RunSummary, Turn
from cosched.telemetry.run_folder import EventLog, RunFolder, explained

if TYPE_CHECKING:
    from cosched.engines.request import FinishedRequest
    from cosched.engines.trace import TraceWriter
    from cosched.runs.resume import RunOrigin
    from cosched.settings.schema import Config

TURN_TOKENS = 32  # that an arm commits before it is the next one's turn: less than a second's drift

OnTokens = Callable[[str, int], None]
"""``on_tokens(arm, n)``: an arm committed n more tokens."""


class Experiment:
    """Runs the arms in turn, some tokens at a time, so that a machine's drift hits all of them.

    A turn ends when no update is under way in the background: it would go on in the time of the next. That
    is waited for also behind the last request, where it is nobody's time.
    Arms in SGLang run one after the other: an engine takes the memory that there is.

    ``total_tokens`` is known before ``run`` and at most what the arms will commit. ``command`` is what
    the run was asked for with, for who wants to repeat it.
    """

    def __init__(self, config: Config, record: bool = False, command: str | None = None) -> None:
        self.config = config
        self._command = command
        self._served = config.engine.kind == "sglang"
        if self._served and record:
            raise ConfigError("--record: SGLang's arms are not recorded; use engine.kind=embedded")
        check_kept(config, record)
        self.world: World | ServedWorld = (
            build_served_world(config) if self._served else build_world(config)
        )
        self.interrupted = False
        self._events = EventLog()
        self._tracking = Tracking(config)
        self._sinks = {
            arm: self._tracking.sink_of(arm, self._events.for_arm(arm)) for arm in config.arms
        }
        self._writer = (
            build_recorder(self.world) if record and isinstance(self.world, World) else None
        )
        self._arms = [
            Running(self._build(name, self._writer if index == 0 else None))
            for index, name in enumerate(config.arms)
        ]
        self._keeping: Keeping | None = None
        self._origin = self._began_with()
        self._on_tokens: OnTokens = lambda _arm, _n: None
        self._tokens = Counter[str]()

    @property
    def total_tokens(self) -> int:
        """Tokens that all arms together have to decode, if no request stops early."""
        one = sum(r.max_new_tokens * r.num_turns for r in self.world.requests)
        return one * len(self.config.arms)

    def run(
        self,
        folder: RunFolder,
        on_tokens: OnTokens = lambda _arm, _n: None,
        resume: bool = False,
    ) -> RunSummary:
        """Decode everything and write all files; Ctrl-C ends it early and keeps what there is.

        With ``resume`` it goes on behind the last group of requests that was saved.

        Raises:
            RunFolderError: the folder cannot be written, or has nothing to resume.
        """
        groups_done = self._restore(folder) if resume else self._start(folder)
        self._on_tokens = on_tokens
        if groups_done:
            on_tokens(self._arms[-1].arm.name, sum(one.num_tokens for one in self._arms))
        started = time.perf_counter()
        try:
            self._decode(folder, groups_done)
            summary = self._summary(time.perf_counter() - started)
            folder.write("summary.json", msgspec.json.format(msgspec.json.encode(summary)))
            self._save_drafts(folder)
        finally:
            self._tracking.close()
            if self._keeping is not None:
                self._keeping.close()
        if not self.interrupted:
            resume_state.forget(folder)
        return summary

    def _decode(self, folder: RunFolder, groups_done: int) -> None:
        """All that is to be decoded, or what there is when it is interrupted."""
        try:
            if self._served:
                self._run_served(folder)
            else:
                self._run_in_turn(groups_done)
        except BaseException as error:
            if self._keeping is not None:
                self._keeping.interrupted()  # first: who interrupts may not wait
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.interrupted = True
            for one in self._arms:
                for finished in one.arm.engine.abandon():
                    self._keep(one, finished, complete=False)
        if self._writer is not None:
            with explained(self._writer.directory):
                self._writer.close()
        self._events.close()

    def _summary(self, seconds: float) -> RunSummary:
        return run_summary(
            self.config,
            self.world,
            self._arms,
            seconds=seconds,
            interrupted=self.interrupted,
            recorded=self._writer is not None,
            command=self._command,
        )

    def _run_in_turn(self, groups_done: int) -> None:
        """Each group in every arm, by turns."""
        groups = groups_of(self.world.requests, self.config.engine.max_batch)
        for number, group in enumerate(groups, 1):
            if number <= groups_done:
                continue
            going = {
                one.arm.name: (one, one.arm.engine.rounds(group))
                for one in self._arms
                if isinstance(one.arm, Arm)
            }
            while going:
                for name, (one, rounds) in list(going.items()):
                    if not self._turn(one, rounds, number):
                        del going[name]
            self._keep_progress(number)

    def _run_served(self, folder: RunFolder) -> None:
        """One arm after the other: memory holds one engine of SGLang's."""
        for one in self._arms:
            assert isinstance(one.arm, ServedArm)
            checkpoint = folder.path.absolute() / "checkpoints" / one.arm.name
            with one.arm.engine.running(checkpoint if adapts(one.arm.name) else None):
                groups = groups_of(self.world.requests, self.config.engine.max_batch)
                for number, group in enumerate(groups, 1):
                    with self._timed(one, number) as finished:
                        finished.extend(one.arm.engine.generate(group))

    def _start(self, folder: RunFolder) -> int:
        folder.write("config.yaml", to_yaml(self.config))
        self._events.open(folder.path / "events.jsonl")
        if self._writer is not None:
            with explained(folder.path / "trace"):
                self._writer.open(folder.path / "trace")
        if self._origin is not None:  # a recording, or what other processes hold, is made again
            self._keeping = Keeping(folder, self.config.adapt.checkpoint)
        self._tracking.open(folder.path, self._arms)
        self._keep_progress(groups_done=0)
        return 0

    def _restore(self, folder: RunFolder) -> int:
        """Put every arm where an interrupted run left it; returns how many groups are done."""
        progress, tensors = resume_state.load(folder)
        assert self._origin is not None, "there is a state to resume, so one was saved"
        resume_state.check_same(progress, self._origin, set(self.config.arms), folder)
        self._keeping = Keeping(folder, self.config.adapt.checkpoint)
        self._events.open(folder.path / "events.jsonl", keep_bytes=progress.events_bytes)
        put_back(self._arms, progress, tensors)
        self._tracking.open(folder.path, self._arms)
        self._keeping.start_from(updates_of(self._arms))
        return progress.groups_done

    def _began_with(self) -> RunOrigin | None:
        """What it is to be gone on from with; None where there is nothing to go on from."""
        if self._writer is not None or isinstance(self.world, ServedWorld):
            return None
        return origin_of(self.world, self._arms)

    def _keep_progress(self, groups_done: int) -> None:
        """No request is running: what an interrupted run can go on from."""
        if self._keeping is None or self._origin is None:
            return
        origin = self._origin
        self._keeping.behind_group(
            updates_of(self._arms),
            lambda: point_of(self._arms, groups_done, self._events.flush(durable=True), origin),
        )

    def _build(self, name: str, writer: TraceWriter | None) -> Arm | ServedArm:
        if isinstance(self.world, ServedWorld):
            return build_served_arm(
                self.world,
                name,
                self._sinks[name],
                lambda number: self._count(name, number),
                self._tracking.on_row(name),
            )
        return build_arm(
            self.world,
            name,
            self._sinks[name],
            writer,
            lambda number: self._count(name, number),
            self._tracking.on_row(name),
        )

    def _count(self, name: str, number: int) -> None:
        self._tokens[name] += number
        self._on_tokens(name, number)

    def _turn(self, one: Running, rounds: Iterator[list[FinishedRequest]], group: int) -> bool:
        """Decode on in one arm; whether there is more to do."""
        until, more = self._tokens[one.arm.name] + TURN_TOKENS, True
        learner = one.arm.coscheduler if isinstance(one.arm, Arm) else None
        with self._timed(one, group) as finished_requests:
            while more and (self._tokens[one.arm.name] < until or (learner and learner.busy)):
                finished = next(rounds, None)
                more = finished is not None
                finished_requests += finished or []
        if learner:
            settle(learner)
        return more

    @contextmanager
    def _timed(self, one: Running, group: int) -> Generator[list[FinishedRequest]]:
        """A turn: its time counts, and what is in the list is kept, also when it is interrupted."""
        before, stages = self._tokens[one.arm.name], one.stages()
        started = time.perf_counter()
        finished_requests: list[FinishedRequest] = []
        try:
            yield finished_requests
        finally:
            seconds = time.perf_counter() - started
            one.wall_seconds += seconds
            if tokens := self._tokens[one.arm.name] - before:
                spent = {stage: after - stages[stage] for stage, after in one.stages().items()}
                one.turns.append(Turn(group, tokens, seconds, spent))
                self._sinks[one.arm.name].emit("turn", turn=one.turns[-1])
            for finished in finished_requests:
                self._keep(one, finished)
                if self._writer is not None and one is self._arms[0]:
                    with explained(self._writer.directory):
                        self._writer.finish(finished.request, finished.tokens)

    def _keep(self, one: Running, finished: FinishedRequest, complete: bool = True) -> None:
        prompt = finished.request.prompt_P.tolist()
        log = RequestLog(
            finished.request.id,
            prompt,
            finished.tokens,
            finished.rounds,
            complete,
            cut=complete and finished.cut,
            source=finished.request.source,
        )
        one.logs.append(log)
        sink = self._sinks[one.arm.name]
        for row in finished.rounds:
            sink.emit("round", row=row)
        text = self.world.tokenizer.decode(finished.tokens)
        source = {} if log.source is None else {"source": log.source}
        sink.emit("request", id=log.request_id, text=text, cut=log.cut, **source)

    def _save_drafts(self, folder: RunFolder) -> None:
        """Adapted drafts as checkpoints, one of each tenant; none outlives a request of its own."""
        for one in self._arms:
            config, drafter = self.config.for_arm(one.arm.name), one.arm.drafter
            if config.adapt.scope.state == "per_request":
                continue
            if one.arm.coscheduler is None or drafter is None:
                continue
            directory = folder.path / "checkpoints" / one.arm.name
            with explained(folder.path / "checkpoints"):
                if isinstance(drafter, ServesAdapters) and config.num_adapters:
                    for index, tenant in enumerate(config.adapt.scope.tenants):
                        drafter.alone(index).save(directory / tenant)
                else:
                    drafter.save(directory)
