"""From a file, a run and what is asked to what is to be expected, for each number of servers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cosched.errors import ConfigError
from cosched.plan.behaviour import given
from cosched.plan.costs import costs_of
from cosched.plan.figures import Figure
from cosched.plan.limits import Limit, limits_of
from cosched.plan.run import plain_speed, read_run
from cosched.plan.settings import curve_of
from cosched.plan.simulate import Scene, simulate
from cosched.plan.subject import subject_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cosched.plan.behaviour import Behaviour, Observed
    from cosched.plan.costs import Costs
    from cosched.plan.run import Run
    from cosched.plan.settings import PlanSettings
    from cosched.plan.simulate import Outcome
    from cosched.plan.subject import Subject
    from cosched.settings.schema import Config

CONTROLS = 16  # servers that are simulated with the draft as loaded, whatever is asked


class Band(msgspec.Struct, frozen=True):
    """The run as it was, and the lowest and highest of its repeats on requests drawn anew."""

    value: float
    low: float
    high: float


class Line(msgspec.Struct, frozen=True):
    """What is expected of so many servers. Rates are a second's; shares are of 1.

    ``speed`` is tokens a second with learning over those without, ``tau_end`` of the last fifth of the time.
    ``busy`` is the trainer's, ``seen`` is of the tokens that are served those that an update trains on.
    """

    servers: int
    tau_frozen: Band
    tau: Band
    tau_end: Band
    tokens_per_server: Band
    tokens: Band
    speed: Band
    exposed: Band
    updates: Band
    busy: Band
    seen: Band
    dropped: Band
    bytes_to_trainer: Band
    bytes_to_servers: Band
    server_memory: int | None
    queue_memory: int
    trainer_memory: int | None


class Forecast(msgspec.Struct, frozen=True):
    """All of it. ``costs`` are by name, with where they come from; ``notes`` are what cannot be known."""

    arm: str
    source: str | None
    requests: int
    seconds: float
    repeats: int
    plain_tokens: float | None
    costs: dict[str, Figure]
    lines: list[Line]
    limits: list[Limit]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Repeat:
    """One course with the draft as loaded, and one in which it learns."""

    frozen: Outcome
    learning: Outcome


def forecast(
    config: Config,
    asked: PlanSettings,
    folder: Path | None,
    progress: Callable[[str], None] = lambda _what: None,
) -> Forecast:
    """Predict.

    Raises:
        CoschedError: a setting or a file is wrong, or something is known neither from a run nor given.
    """
    curve = curve_of(asked)
    run = None if folder is None else read_run(folder, asked.arm)
    if run is None and curve is None:
        raise ConfigError(
            "--from RUN_FOLDER: required, or plan.frozen_tau, plan.learnt_tau and plan.learning_updates: "
            "how far a draft is accepted, and what learning adds, cannot be computed"
        )
    observed = None if run is None else run.observed()
    if observed is not None and not observed.num_requests:
        raise ConfigError(f"--from {folder}: its arms have no request in common; run it to the end")
    recorded = None if observed is None else observed.fit().lengths
    subject = subject_of(config, asked, recorded)
    if run is not None:
        _check_same_draft(subject, run)
    behaviours = list(_behaviours(subject, observed, curve))
    usual = float(behaviours[0].tau_at.mean())
    costs = costs_of(subject, run, usual)
    scene = _scene(subject, costs)
    control = replace(scene, servers=CONTROLS, cadence=0.0)
    progress("the draft as loaded")
    frozen = [simulate(control, one, asked.seed + n) for n, one in enumerate(behaviours)]
    lines: list[Line] = []
    for servers in asked.servers:
        progress(f"{servers} servers")
        seconds = costs.update_seconds(servers * subject.requests, subject.most_sampled)
        own = replace(scene, servers=servers, update=seconds)
        repeats = [
            _Repeat(before, simulate(own, one, asked.seed + n))
            for n, (before, one) in enumerate(zip(frozen, behaviours, strict=True))
        ]
        lines.append(_line(subject, servers, repeats))
    return Forecast(
        arm=asked.arm,
        source=None if folder is None else str(folder),
        requests=subject.requests,
        seconds=asked.seconds,
        repeats=asked.repeats,
        plain_tokens=_plain(subject, run),
        costs=costs.by_name(subject.elsewhere, scene.by_tokens),
        lines=lines,
        limits=limits_of(
            subject, costs, frozen[0].rounds / frozen[0].seconds / CONTROLS, lines[0].tau.value
        ),
        notes=_notes(subject, run, behaviours[0]),
    )


def _check_same_draft(subject: Subject, run: Run) -> None:
    own, theirs = subject.config.drafter_settings, run.config.drafter_settings
    for name in ("kind", "num_draft_tokens"):
        if getattr(own, name) != getattr(theirs, name):
            raise ConfigError(
                f"{subject.config.drafter_key}.{name}: {getattr(own, name)!r}, and {run.folder} was run "
                f"with {getattr(theirs, name)!r}: what it measured says nothing of another draft"
            )


def _behaviours(
    subject: Subject, observed: Observed | None, curve: tuple[float, float, float] | None
) -> Iterator[Behaviour]:
    """As observed, or given; each but the first on requests drawn anew."""
    asked, most = subject.asked, subject.drafter.num_draft_tokens + 1
    random = np.random.default_rng(asked.seed)
    for number in range(asked.repeats):
        if curve is not None:
            yield given(*curve, most, subject.lengths)
            continue
        assert observed is not None, "one of the two is there, or it was refused"
        size = observed.num_requests
        chosen = None if number == 0 else random.integers(size, size=size)
        found = observed.fit(chosen)
        own_lengths = asked.answer_tokens is not None or asked.answer_file is not None
        yield replace(found, lengths=subject.lengths) if own_lengths else found


def _scene(subject: Subject, costs: Costs) -> Scene:
    """One server; what goes by their number is put in later."""
    return Scene(
        servers=1,
        requests=subject.requests,
        seconds=subject.asked.seconds,
        round_seconds=costs.round.value,
        prefill=costs.prefill.value,
        elsewhere=subject.elsewhere,
        per_request=subject.config.adapt.scope.state == "per_request",
        cadence=costs.cadence.value,
        by_tokens=subject.config.policy_settings.kind == "every_n_tokens",
        update=costs.update.value,
        updates_per_version=costs.per_version.value,
        first_version=int(costs.first_version.value),
        exposed=costs.exposed.value,
        handover=costs.handover.value,
        publish=costs.publish.value,
        intake=costs.intake.value,
        link_in=costs.link_in.value,
        link_out=costs.link_out.value,
        queue_rounds=subject.config.adapt.sidecar.queue_rounds,
        round_bytes=subject.round_bytes,
        row_bytes=subject.row_bytes,
        prompt_rows=subject.prompt_rows,
        version_bytes=subject.version_bytes,
    )


def _line(subject: Subject, servers: int, repeats: list[_Repeat]) -> Line:
    def band(of: Callable[[_Repeat], float]) -> Band:
        values = [of(one) for one in repeats]
        return Band(values[0], min(values), max(values))

    def speed(one: Outcome, among: int) -> float:
        return one.tokens / one.seconds / among

    learners = 1 if subject.elsewhere else servers
    anchors = subject.config.adapt.replay.anchors
    return Line(
        servers=servers,
        tau_frozen=band(lambda one: one.frozen.tau),
        tau=band(lambda one: one.learning.tau),
        tau_end=band(lambda one: one.learning.late_tau),
        tokens_per_server=band(lambda one: speed(one.learning, servers)),
        tokens=band(lambda one: speed(one.learning, 1)),
        speed=band(lambda one: speed(one.learning, servers) / speed(one.frozen, CONTROLS)),
        exposed=band(lambda one: one.learning.exposed / one.learning.serving),
        updates=band(lambda one: learners * one.learning.updates / one.learning.seconds),
        busy=band(lambda one: min(1.0, one.learning.busy / one.learning.seconds)),
        seen=band(
            lambda one: min(1.0, learners * anchors * one.learning.updates / one.learning.committed)
        ),
        dropped=band(lambda one: one.learning.dropped / max(1.0, one.learning.sent)),
        bytes_to_trainer=band(lambda one: one.learning.bytes_in / one.learning.seconds),
        bytes_to_servers=band(lambda one: one.learning.bytes_out / one.learning.seconds),
        server_memory=subject.server_memory,
        queue_memory=subject.queue_memory,
        trainer_memory=subject.trainer_memory(servers),
    )


def _plain(subject: Subject, run: Run | None) -> float | None:
    """Tokens a second of a server without a draft, where the run has it for as many requests."""
    asked = subject.asked
    if (roofline := subject.roofline) is not None:
        return subject.requests / roofline.round_seconds(subject.requests, subject.context, False)
    same = run is not None and run.max_batch == subject.requests and asked.round_seconds is None
    speed = plain_speed(run) if run is not None and same else None
    return None if speed is None else speed / asked.round_factor


def _notes(subject: Subject, run: Run | None, behaviour: Behaviour) -> list[str]:
    """What the figures rest on, and nobody can know from here."""
    asked = subject.asked
    if run is None or asked.frozen_tau is not None:
        notes = ["acceptance lengths are given, not measured"]
    else:
        text = run.summary.run.get("text", "text")
        notes = [
            f"learning is that of {run.folder} ({text}, {len(run.arms[run.control].rounds)} requests): on "
            f"other text, and with another model, it is another; set plan.frozen_tau, plan.learnt_tau and "
            f"plan.learning_updates for what you expect",
            f"after {behaviour.most_updates:.0f} updates, the most that served there, nothing is taken to be added",
        ]
        if behaviour.most_updates == 0:
            notes.append(
                "nothing that was learnt ever served there, so learning brings nothing here"
            )
    if subject.elsewhere:
        notes.append(
            "rows of several servers are taken to teach as those of one do, update by update: what one request "
            "teaches of itself is less among many"
        )
    if asked.device is not None:
        notes.append(
            f"{asked.device} is an estimate from its data sheet, as benchmarks/gpu_model.md"
        )
    return notes
