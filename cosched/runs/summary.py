"""What was measured of the arms, as the summary of a run."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.report.by_text import figures_by_text
from cosched.report.intervals import cut
from cosched.report.memory import footprint_rows
from cosched.settings.arms import adapts, draft_of
from cosched.telemetry.groups import figures_by_group
from cosched.telemetry.metrics import (
    ArmSummary,
    GroupFigures,
    Part,
    RequestLog,
    RunSummary,
    TextFigures,
    Turn,
    lossless_mismatches,
    round_figures,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.build.embedded import Arm, World
    from cosched.build.served_arm import ServedArm, ServedWorld
    from cosched.engines.request import GenerationRequest
    from cosched.settings.schema import Config


@dataclass(slots=True)
class Running:
    """An arm with what has been measured of it."""

    arm: Arm | ServedArm
    logs: list[RequestLog] = field(default_factory=list)
    wall_seconds: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(log.generated) for log in self.logs)

    def stages(self) -> dict[str, float]:
        """Seconds so far by what they were spent on."""
        engine, learner = self.arm.engine.seconds, self.arm.coscheduler
        return {
            "prefill": engine.prefill,
            "draft": engine.draft,
            "verify": engine.verify,
            "update": learner.counters.update_seconds_total if learner else 0.0,
            "publish": learner.counters.publish_seconds if learner else 0.0,
        }


def groups_of(requests: list[GenerationRequest], size: int) -> Iterator[list[GenerationRequest]]:
    """So many at a time, all of one file."""
    for _, own in groupby(requests, key=lambda request: request.source):
        while group := list(islice(own, size)):
            yield group


def run_summary(
    config: Config,
    world: World | ServedWorld,
    running: list[Running],
    seconds: float,
    interrupted: bool,
    recorded: bool,
    command: str | None = None,
) -> RunSummary:
    """What ``summary.json`` says; the first arm's text is what greedy text is compared with."""
    greedy = world.sampling.greedy or world.forced
    reference = running[0].logs if greedy else None
    turns = {one.arm.name: one.turns for one in running}
    parts, parts_of = cut(turns)
    groups = list(groups_of(world.requests, config.engine.max_batch))
    ids = [[request.id for request in group] for group in groups]
    logs = {one.arm.name: one.logs for one in running}
    by_text = figures_by_text(logs, turns, [group[0].source for group in groups])
    return RunSummary(
        run={
            "name": config.run.name,
            "command": command,
            "interrupted": interrupted,
            "seconds": seconds,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "engine": config.engine.kind,
            "text": world.text_kind,
            "acceptance": world.acceptance,
            "temperature": world.sampling.temperature,
            "lossless_reference": running[0].arm.name if greedy else None,
            "max_batch": config.engine.max_batch,
            "parts_of": parts_of,
            "recorded": recorded,
            **_about_drafts(config, running),
            **_about_trainer(config, running),
            "device": world.device,
            "num_threads": torch.get_num_threads(),
            "memory": footprint_rows(footprint(config, *sketch(config))),
            "cosched": version("cosched"),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "machine": f"{platform.machine()} {platform.system()}",
        },
        arms={
            one.arm.name: _arm_summary(
                one,
                reference,
                parts[one.arm.name],
                by_text[one.arm.name],
                figures_by_group(one.logs, one.turns, ids),
            )
            for one in running
        },
    )


def _about_drafts(config: Config, running: list[Running]) -> dict[str, Any]:
    """What drafted, and of each of ``drafts`` the same by its name."""
    drafting = [one.arm for one in running if one.arm.drafter is not None]
    found: dict[str, Any] = _about(config) if config.drafter is not None else {}
    found["learns_by_itself"] = bool(drafting) and all(map(_learns_by_itself, drafting))
    if config.drafts:
        named = {
            draft: _about(config.for_arm(name))
            for name in config.arms
            if (draft := draft_of(name)) is not None
        }
        found["drafts"] = named
    return found


def _about_trainer(config: Config, running: list[Running]) -> dict[str, Any]:
    """Of each arm that learns in a side-car and has had nothing of it, or has lost it, why."""
    troubles: dict[str, str] = {}
    for one in running:
        name, learner = one.arm.name, one.arm.coscheduler
        if not adapts(name) or config.for_arm(name).adapt.placement != "sidecar":
            continue
        trouble: str | None = getattr(learner, "trouble", None)
        if learner is not None and not learner.version:
            troubles[name] = f"no version came ({trouble})" if trouble else "no version came"
        elif trouble:
            troubles[name] = trouble
    return {"trainer_troubles": troubles} if troubles else {}


def _about(config: Config) -> dict[str, Any]:
    settings = config.drafter_settings
    return {
        "num_draft_tokens": settings.num_draft_tokens,
        "length": config.length_settings.kind,
        "drafter": settings.kind,
        "window": settings.window,
    }


def _learns_by_itself(arm: Arm | ServedArm) -> bool:
    return arm.drafter is not None and arm.drafter.network() is None


def _arm_summary(
    one: Running,
    reference: list[RequestLog] | None,
    parts: list[Part],
    by_text: dict[str, TextFigures],
    by_group: list[GroupFigures],
) -> ArmSummary:
    figures = round_figures(one.logs)
    coscheduler, stages = one.arm.coscheduler, one.stages()
    counters = coscheduler.counters if coscheduler else None
    return ArmSummary(
        **msgspec.structs.asdict(figures),
        tokens_per_s=figures.tokens / one.wall_seconds if one.wall_seconds else 0.0,
        seconds={
            **stages,
            "other": max(0.0, one.wall_seconds - sum(stages.values())),
            "wall": one.wall_seconds,
        },
        lossless_mismatches=(
            None if reference is None else lossless_mismatches(reference, one.logs)
        ),
        versions=coscheduler.version if coscheduler else 0,
        updates=counters.updates if counters else 0,
        skipped_steps=counters.skipped_steps if counters else 0,
        losses=list(counters.losses) if counters else [],
        peak_bytes=_peak_bytes(),
        refused_updates=counters.refused if counters else 0,
        rollbacks=counters.rolled_back if counters else 0,
        guard_seconds=counters.guard_seconds if counters else 0.0,
        parts=parts,
        evicted_requests=counters.evicted if counters else 0,
        cut_conversations=sum(log.cut for log in one.logs),
        by_text=by_text,
        by_group=by_group,
    )


def _peak_bytes() -> int:
    """Most memory this process has held so far: of the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
