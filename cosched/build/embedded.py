"""From a configuration to running parts. The files ``build/`` name concrete classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosched.build.coscheduler import build_pool, follower_or_coscheduler
from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.packing import as_at_first, pack, rows_are_alike
from cosched.engines.embedded.proof import prove
from cosched.engines.embedded.rows import LiveRows, RowSource
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import (
    ForcedKind,
    ForcedVerifier,
    GreedyVerifier,
    SamplingVerifier,
    Verifier,
)
from cosched.engines.trace import RecordedRows, TraceMeta, TraceWriter, read_meta
from cosched.errors import ConfigError
from cosched.loop.lengths import DraftLengths
from cosched.loop.per_adapter import CoschedulerPool
from cosched.loop.publish import InPlacePublisher
from cosched.memory.footprint import check_fits
from cosched.memory.sketch import sketch
from cosched.registry import DRAFTERS, LENGTHS
from cosched.settings.arms import PLAIN, adapts, split_arm
from cosched.settings.device import device_of
from cosched.settings.load import check_paths
from cosched.workload.requests import check_owners, first_of_each, load_requests

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.coscheduler import Coscheduler
    from cosched.engines.embedded.engine import OnRow
    from cosched.engines.request import GenerationRequest
    from cosched.loop.roles import Sink
    from cosched.protocols import Drafter
    from cosched.records import Acceptance
    from cosched.settings.schema import Config
    from cosched.sidecar.follower import Follower


@dataclass(frozen=True, slots=True)
class World:
    """What all arms share: the target, the requests, and how they are judged."""

    config: Config
    target: Target
    tokenizer: Any
    requests: list[GenerationRequest]
    sampling: SamplingParams
    trace: TraceMeta | None

    @property
    def text_kind(self) -> ForcedKind:
        """Where the text comes from: the target's best token, its samples, or documents."""
        if self.trace is not None:
            return self.trace.kind
        if self.config.workload.documents is not None:
            return "document"
        return "greedy" if self.sampling.greedy else "sampled"

    @property
    def forced(self) -> bool:
        """Whether the text is given rather than generated."""
        return self.trace is not None or self.config.workload.documents is not None

    @property
    def acceptance(self) -> Acceptance:
        """How a drafted token of a text that is sampled is accepted."""
        return self.config.engine.acceptance

    @property
    def device(self) -> str:
        return str(self.target.device)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding: an engine, with what adapts its draft."""

    name: str
    engine: EmbeddedEngine
    drafter: Drafter | None
    coscheduler: Coscheduler | CoschedulerPool | Follower | None


def build_world(config: Config) -> World:
    """Load the target and the requests.

    Raises:
        CoschedError: anything that the user's files or settings get wrong.
    """
    check_paths(config)
    check_fits(config, *sketch(config))  # what does not fit is named before anything is loaded
    device = device_of(config.engine.device)
    if config.engine.num_threads is not None:
        torch.set_num_threads(config.engine.num_threads)
    target = Target.load(config.target.folder, device, getattr(torch, config.engine.dtype))
    if config.engine.pack:
        pack(target.model, alike=config.engine.exact)
    if config.engine.exact and not rows_are_alike(target.model, _rows_a_round(config)):
        raise ConfigError(
            f"engine.exact: this processor computes rows in different ways, {_rows_a_round(config)} "
            f"at a time in {config.engine.dtype}; use false, or engine.dtype: float32"
        )
    tokenizer = target.tokenizer
    workload = config.workload
    if config.engine.kind == "trace":
        assert config.engine.trace is not None
        directory = Path(config.engine.trace)
        trace = read_meta(directory)
        if trace.target_checksum != target.checksum():
            raise ConfigError(
                f"engine.trace: {directory} was recorded from another target than "
                f"target.path = {config.target.path} (checksums differ)"
            )
        recorded = RecordedRows(directory, trace, target, ()).requests()
        requests = first_of_each(recorded, workload.max_prompts)
        sampling = SamplingParams(trace.temperature, trace.top_p)
    else:
        trace = None
        requests = load_requests(workload, tokenizer, target.max_length, device, target.end_tokens)
        sampling = SamplingParams(workload.temperature, workload.top_p)
    if trace is None or config.engine.live:
        prove(target, max(request.max_length_of_turns for request in requests))
    teachers = {config.for_arm(arm).adapt.replay.teacher for arm in config.arms}
    if "hidden" in teachers or config.engine.kind == "trace":
        target.require_plain_head()
    check_owners(config, requests)
    return World(config, target, tokenizer, requests, sampling, trace)


def load_drafter(world: World, config: Config | None = None) -> Drafter:
    """A fresh serving draft from its checkpoint; ``config`` where it is one arm's own."""
    settings = (config or world.config).drafter_settings
    return DRAFTERS.get(settings.kind).load(settings, world.target)


def build_arm(
    world: World,
    name: str,
    sink: Sink,
    writer: TraceWriter | None = None,
    on_tokens: Callable[[int], None] = lambda _n: None,
    on_row: OnRow | None = None,
) -> Arm:
    """An engine for one arm. With a ``writer`` it captures what the configured drafter needs."""
    config = world.config.for_arm(name)
    base, windowed = split_arm(name)
    drafter = None if base == PLAIN else load_drafter(world, config)
    window = config.drafter_settings.window if windowed else None
    network = drafter.network() if drafter else None
    coscheduler = None
    if adapts(name) and drafter is not None and config.num_adapters:
        coscheduler = build_pool(config, world.target, drafter, window, sink, world.acceptance)
    elif adapts(name) and drafter is not None:
        publish = config.adapt.publish
        publisher = network and InPlacePublisher.of_modules(
            network,
            world.target.model,
            publish.target_check_every,
            publish.keep,
            as_loaded=partial(as_at_first, network),
        )
        build = follower_or_coscheduler(config)
        coscheduler = build(
            config,
            world.target,
            drafter,
            publisher,
            window,
            sink,
            acceptance=world.acceptance,
        )
    if network is not None and config.engine.pack and not config.num_adapters:
        pack(network, rounds=True)  # after the trainer has taken its copy
    layers = writer.feature_layers if writer else ()
    if drafter is not None:
        layers = drafter.signal.feature_layers
        if writer is not None and writer.feature_layers != layers:
            raise ConfigError(
                f"record.feature_layers: the arm {name!r} has the features of its own draft only; "
                f"record with plain as the first arm"
            )
    max_length = max(request.max_length_of_turns for request in world.requests)
    num_drafted = drafter.num_verified if drafter else 0
    verifier = _verifier(world)
    if drafter is not None and drafter.num_tree_tokens:
        _check_trees(config, drafter, verifier)
    engine = EmbeddedEngine(
        rows=_rows(world, max_length + num_drafted + 1, layers),
        verifier=verifier,
        drafter=drafter,
        options=EngineOptions(
            max_batch=config.engine.max_batch,
            max_length=max_length,
            seed=config.run.seed,
            stop_tokens=_stop_tokens(world),
            window=window,
            teacher=config.adapt.replay.teacher,
            teacher_top_k=config.adapt.replay.teacher_top_k,
        ),
        device=world.target.device,
        observer=coscheduler,
        recorder=writer.record if writer else None,
        on_tokens=on_tokens,
        admit=coscheduler.admit if isinstance(coscheduler, CoschedulerPool) else None,
        lengths=_lengths(config, drafter) if drafter else None,
        on_row=on_row,
    )
    return Arm(name, engine, drafter, coscheduler)


def build_recorder(world: World) -> TraceWriter:
    """A trace of what the target says in this run, with the features that drafters need."""
    world.target.require_plain_head()
    record = world.config.record
    return TraceWriter(
        world.text_kind,
        world.sampling.temperature,
        world.sampling.top_p,
        world.target.checksum(),
        _recorded_layers(world),
        getattr(torch, record.dtype),
        record.max_bytes,
    )


def _recorded_layers(world: World) -> tuple[int, ...]:
    wanted = world.config.record.feature_layers
    most = world.target.num_layers
    if beyond := [layer for layer in wanted if layer > most]:
        raise ConfigError(
            f"record.feature_layers: the target has layers 0 to {most - 1} (and {most}, after its "
            f"final norm), not {beyond[0]}"
        )
    drafters = [load_drafter(world, own) for own in world.config.by_draft.values()]
    needed = [layer for drafter in drafters for layer in drafter.signal.feature_layers]
    return tuple(dict.fromkeys((*needed, *wanted)))


def _rows(world: World, max_length: int, feature_layers: tuple[int, ...]) -> RowSource:
    config = world.config
    if world.trace is not None and not config.engine.live:
        directory = Path(config.engine.trace or "")
        return RecordedRows(directory, world.trace, world.target, feature_layers)
    exact_rows = _rows_a_round(config) if config.engine.exact else None
    return LiveRows(world.target, config.engine.max_batch, max_length, feature_layers, exact_rows)


def _rows_a_round(config: Config) -> int:
    """As many as the draft that drafts most has verified."""
    return 1 + max(own.drafter_settings.num_draft_tokens for own in config.by_draft.values())


def _check_trees(config: Config, drafter: Drafter, verifier: Verifier) -> None:
    """Whether this text and this engine can have drafts that are trees."""
    if config.engine.exact:
        raise ConfigError(
            f"engine.exact: {config.drafter_key} drafts trees, whose rows are not computed as those of "
            f"plain decoding are; use false, or a drafter that drafts chains"
        )
    if isinstance(verifier, ForcedVerifier):
        verifier.require_trees_fit(drawn=drafter.network() is not None)


def _lengths(config: Config, drafter: Drafter) -> DraftLengths:
    settings = config.length_settings
    return DraftLengths(LENGTHS.get(settings.kind)(settings), drafter.num_draft_tokens)


def _verifier(world: World) -> Verifier:
    if world.forced:
        return ForcedVerifier(world.text_kind, world.sampling, world.acceptance)
    if world.sampling.greedy:
        return GreedyVerifier()
    return SamplingVerifier(world.sampling, world.acceptance, world.config.engine.tree_rule)


def _stop_tokens(world: World) -> frozenset[int]:
    if world.forced or not world.config.workload.stop_at_end_of_text:
        return frozenset()
    return world.target.end_tokens
