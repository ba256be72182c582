"""The arms of one file on the same requests, side by side, into one run folder."""

from __future__ import annotations

import math
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cosched.build.embedded import Arm, World, build_arm, build_recorder, build_world
from cosched.build.served_arm import ServedArm, ServedWorld, build_served_arm, build_served_world
from cosched.errors import ConfigError
from cosched.protocols import ServesAdapters
from cosched.report.by_text import figures_by_text
from cosched.report.intervals import cut
from cosched.runs import resume as resume_state
from cosched.runs.resume import ArmProgress, Progress
from cosched.settings.arms import adapts, draft_of
from cosched.settings.schema import Config, to_yaml
from cosched.telemetry.metrics import (
    ArmSummary,
    Part,
    RequestLog,
    RunSummary,
    TextFigures,
    Turn,
    lossless_mismatches,
    round_figures,
)
from cosched.telemetry.run_folder import EventLog, RunFolder, explained

if TYPE_CHECKING:
    from cosched.engines.request import FinishedRequest, GenerationRequest
    from cosched.engines.trace import TraceWriter

TURN_TOKENS = 32  # that an arm commits before it is the next one's turn: less than a second's drift

OnTokens = Callable[[str, int], None]
"""``on_tokens(arm, n)``: an arm committed n more tokens."""


@dataclass(slots=True)
class _Running:
    """An arm with what has been measured of it."""

    arm: Arm | ServedArm
    logs: list[RequestLog] = field(default_factory=list)
    wall_seconds: float = 0.0
    turns: list[Turn] = field(default_factory=list)


class Experiment:
    """Runs the arms in turn, some tokens at a time, so that a machine's drift hits all of them.

    Where one trains in the background, a turn is a whole group of requests: its training would go on
    in the time of the next. Arms in SGLang run one after the other: an engine takes the memory that
    there is.

    ``total_tokens`` is known before ``run`` and at most what the arms will commit.
    """

    def __init__(self, config: Config, record: bool = False) -> None:
        self.config = config
        self._served = config.engine.kind == "sglang"
        if self._served and record:
            raise ConfigError("--record: SGLang's arms are not recorded; use engine.kind=embedded")
        self.world: World | ServedWorld = (
            build_served_world(config) if self._served else build_world(config)
        )
        self.interrupted = False
        self._events = EventLog()
        self._writer = (
            build_recorder(self.world) if record and isinstance(self.world, World) else None
        )
        self._arms = [
            _Running(self._build(name, self._writer if index == 0 else None))
            for index, name in enumerate(config.arms)
        ]
        self._on_tokens: OnTokens = lambda _arm, _n: None
        self._tokens = Counter[str]()
        adapted = (config.for_arm(name) for name in config.arms if adapts(name))
        background = any(one.adapt.trainer.background for one in adapted)
        self._turn_tokens = math.inf if background else TURN_TOKENS

    @property
    def not_for_sglang(self) -> dict[str, list[str]]:
        """Why stock SGLang cannot run a draft as it is, by the key of its section."""
        return {
            self.config.for_arm(one.arm.name).drafter_key: list(one.arm.drafter.not_for_sglang())
            for one in self._arms
            if one.arm.drafter is not None
        }

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

        With ``resume`` it goes on behind the last group of requests that all arms had finished.

        Raises:
            RunFolderError: the folder cannot be written, or has nothing to resume.
        """
        groups_done = self._restore(folder) if resume else self._start(folder)
        self._on_tokens = on_tokens
        if groups_done:
            on_tokens(self._arms[-1].arm.name, sum(_num_tokens(one) for one in self._arms))
        started = time.perf_counter()
        try:
            if self._served:
                self._run_served(folder)
            else:
                self._run_in_turn(folder, groups_done)
        except KeyboardInterrupt:
            self.interrupted = True
            for one in self._arms:
                for finished in one.arm.engine.abandon():
                    self._keep(one, finished, complete=False)
        if self._writer is not None:
            with explained(self._writer.directory):
                self._writer.close()
        self._events.close()
        summary = self._summary(time.perf_counter() - started)
        folder.write("summary.json", msgspec.json.format(msgspec.json.encode(summary)))
        self._save_drafts(folder)
        if not self.interrupted:
            resume_state.forget(folder)
        return summary

    def _run_in_turn(self, folder: RunFolder, groups_done: int) -> None:
        """Each group in every arm, by turns."""
        groups = _groups(self.world.requests, self.config.engine.max_batch)
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
            self._keep_progress(folder, number)

    def _run_served(self, folder: RunFolder) -> None:
        """One arm after the other: memory holds one engine of SGLang's."""
        for one in self._arms:
            assert isinstance(one.arm, ServedArm)
            checkpoint = folder.path.absolute() / "checkpoints" / one.arm.name
            with one.arm.engine.running(checkpoint if adapts(one.arm.name) else None):
                groups = _groups(self.world.requests, self.config.engine.max_batch)
                for number, group in enumerate(groups, 1):
                    with self._timed(one, number) as finished:
                        finished.extend(one.arm.engine.generate(group))

    def _start(self, folder: RunFolder) -> int:
        folder.write("config.yaml", to_yaml(self.config))
        self._events.open(folder.path / "events.jsonl")
        if self._writer is not None:
            with explained(folder.path / "trace"):
                self._writer.open(folder.path / "trace")
        self._keep_progress(folder, groups_done=0)
        return 0

    def _restore(self, folder: RunFolder) -> int:
        """Put every arm where an interrupted run left it; returns how many groups are done."""
        progress, tensors = resume_state.load(folder)
        self._events.open(folder.path / "events.jsonl", keep_bytes=progress.events_bytes)
        for one in self._arms:
            kept = progress.arms[one.arm.name]
            one.logs, one.wall_seconds, one.turns = kept.logs, kept.wall_seconds, kept.turns
            one.arm.engine.seconds = kept.engine_seconds
            learner = one.arm.coscheduler if isinstance(one.arm, Arm) else None
            if learner is not None and kept.totals is not None:
                learner.restore(kept.totals, kept.version, tensors.get(one.arm.name, {}))
        return progress.groups_done

    def _keep_progress(self, folder: RunFolder, groups_done: int) -> None:
        """No request is running: what an interrupted run can go on from."""
        if self._writer is not None or self._served:
            return  # a recording, or what other processes hold, is whole or is made again
        arms, tensors = {}, {}
        for one in self._arms:
            totals, version = None, 0
            if isinstance(one.arm, Arm) and one.arm.coscheduler is not None:
                totals, version, tensors[one.arm.name] = one.arm.coscheduler.state()
            seconds = one.arm.engine.seconds
            arms[one.arm.name] = ArmProgress(
                one.logs, one.wall_seconds, seconds, totals, version, one.turns
            )
        resume_state.save(folder, Progress(groups_done, self._events.flush(), arms), tensors)

    def _build(self, name: str, writer: TraceWriter | None) -> Arm | ServedArm:
        if isinstance(self.world, ServedWorld):
            return build_served_arm(
                self.world,
                name,
                self._events.for_arm(name),
                lambda number: self._count(name, number),
            )
        return build_arm(
            self.world,
            name,
            self._events.for_arm(name),
            writer,
            lambda number: self._count(name, number),
        )

    def _count(self, name: str, number: int) -> None:
        self._tokens[name] += number
        self._on_tokens(name, number)

    def _turn(self, one: _Running, rounds: Iterator[list[FinishedRequest]], group: int) -> bool:
        """Decode on in one arm; whether there is more to do."""
        until, more = self._tokens[one.arm.name] + self._turn_tokens, True
        with self._timed(one, group) as finished_requests:
            while more and self._tokens[one.arm.name] < until:
                finished = next(rounds, None)
                more = finished is not None
                finished_requests += finished or []
        return more

    @contextmanager
    def _timed(self, one: _Running, group: int) -> Generator[list[FinishedRequest]]:
        """A turn: its time counts, and what is in the list is kept, also when it is interrupted."""
        before, started = self._tokens[one.arm.name], time.perf_counter()
        finished_requests: list[FinishedRequest] = []
        try:
            yield finished_requests
        finally:
            seconds = time.perf_counter() - started
            one.wall_seconds += seconds
            if tokens := self._tokens[one.arm.name] - before:
                one.turns.append(Turn(group, tokens, seconds))
                self._events.emit("turn", arm=one.arm.name, turn=one.turns[-1])
            for finished in finished_requests:
                self._keep(one, finished)
                if self._writer is not None and one is self._arms[0]:
                    with explained(self._writer.directory):
                        self._writer.finish(finished.request, finished.tokens)

    def _keep(self, one: _Running, finished: FinishedRequest, complete: bool = True) -> None:
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
        for row in finished.rounds:
            self._events.emit("round", arm=one.arm.name, row=row)
        text = self.world.tokenizer.decode(finished.tokens)
        source = {} if log.source is None else {"source": log.source}
        self._events.emit(
            "request", arm=one.arm.name, id=log.request_id, text=text, cut=log.cut, **source
        )

    def _summary(self, seconds: float) -> RunSummary:
        running = self._arms
        greedy = self.world.sampling.greedy or self.world.forced
        reference = running[0].logs if greedy else None
        turns = {one.arm.name: one.turns for one in running}
        parts, parts_of = cut(turns)
        groups = _groups(self.world.requests, self.config.engine.max_batch)
        logs = {one.arm.name: one.logs for one in running}
        by_text = figures_by_text(logs, turns, [group[0].source for group in groups])
        return RunSummary(
            run={
                "name": self.config.run.name,
                "interrupted": self.interrupted,
                "seconds": seconds,
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "engine": self.config.engine.kind,
                "text": self.world.text_kind,
                "temperature": self.world.sampling.temperature,
                "lossless_reference": running[0].arm.name if greedy else None,
                "max_batch": self.config.engine.max_batch,
                "parts_of": parts_of,
                "recorded": self._writer is not None,
                **self._about_drafts(),
                "device": self.world.device,
                "num_threads": torch.get_num_threads(),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "machine": f"{platform.machine()} {platform.system()}",
            },
            arms={
                one.arm.name: _arm_summary(
                    one, reference, parts[one.arm.name], by_text[one.arm.name]
                )
                for one in running
            },
        )

    def _about_drafts(self) -> dict[str, Any]:
        """What drafted, and of each of ``drafts`` the same by its name."""
        drafting = [one.arm for one in self._arms if one.arm.drafter is not None]
        found: dict[str, Any] = _about(self.config) if self.config.drafter is not None else {}
        found["learns_by_itself"] = bool(drafting) and all(map(_learns_by_itself, drafting))
        if self.config.drafts:
            named = {
                draft: _about(self.config.for_arm(name))
                for name in self.config.arms
                if (draft := draft_of(name)) is not None
            }
            found["drafts"] = named
        return found

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


def _groups(requests: list[GenerationRequest], size: int) -> Iterator[list[GenerationRequest]]:
    """So many at a time, all of one file."""
    for _, own in groupby(requests, key=lambda request: request.source):
        while group := list(islice(own, size)):
            yield group


def _about(config: Config) -> dict[str, Any]:
    settings = config.drafter_settings
    return {
        "num_draft_tokens": settings.num_draft_tokens,
        "drafter": settings.kind,
        "window": settings.window,
    }


def _learns_by_itself(arm: Arm | ServedArm) -> bool:
    return arm.drafter is not None and arm.drafter.network() is None


def _num_tokens(one: _Running) -> int:
    return sum(len(log.generated) for log in one.logs)


def _arm_summary(
    one: _Running,
    reference: list[RequestLog] | None,
    parts: list[Part],
    by_text: dict[str, TextFigures],
) -> ArmSummary:
    figures = round_figures(one.logs)
    engine, coscheduler = one.arm.engine.seconds, one.arm.coscheduler
    totals = coscheduler.totals if coscheduler else None
    update = totals.update_seconds if totals else 0.0
    publish = totals.publish_seconds if totals else 0.0
    named = engine.prefill + engine.draft + engine.verify + update + publish
    return ArmSummary(
        **msgspec.structs.asdict(figures),
        tokens_per_s=figures.tokens / one.wall_seconds if one.wall_seconds else 0.0,
        seconds={
            "prefill": engine.prefill,
            "draft": engine.draft,
            "verify": engine.verify,
            "update": update,
            "publish": publish,
            "other": max(0.0, one.wall_seconds - named),
            "wall": one.wall_seconds,
        },
        lossless_mismatches=(
            None if reference is None else lossless_mismatches(reference, one.logs)
        ),
        versions=coscheduler.version if coscheduler else 0,
        updates=totals.updates if totals else 0,
        skipped_steps=totals.skipped_steps if totals else 0,
        losses=list(totals.losses) if totals else [],
        peak_bytes=_peak_bytes(),
        refused_updates=totals.watch.refused if totals else 0,
        rollbacks=totals.watch.rolled_back if totals else 0,
        guard_seconds=totals.guard_seconds if totals else 0.0,
        parts=parts,
        cut_conversations=sum(log.cut for log in one.logs),
        by_text=by_text,
    )


def _peak_bytes() -> int:
    """Most memory this process has held so far: of the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
