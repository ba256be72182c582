"""From a configuration to running parts. The files ``build*.py`` name concrete classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosched.build_trainer import build_adapter_trainer, build_trainer
from cosched.config import Config, check_paths, split_arm
from cosched.coscheduler import Coscheduler
from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.judges import (
    ForcedJudge,
    ForcedKind,
    GreedyJudge,
    Judge,
    SamplingJudge,
)
from cosched.engines.embedded.rows import LiveRows, RowSource
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.sglang.ranks import SamePolicy
from cosched.engines.trace import RecordedRows, TraceMeta, TraceWriter, read_meta
from cosched.errors import ConfigError
from cosched.footprint import replay_limits
from cosched.guard import FiniteGuard, WithinTimeShare
from cosched.pool import CoschedulerPool, check_tenants
from cosched.protocols import ServesAdapters
from cosched.publish import InPlacePublisher, Serving
from cosched.registry import DRAFTERS, POLICIES
from cosched.replay import ReplayBuffer
from cosched.training.lora import on_base_of, weight_names
from cosched.training.scope import lora_of
from cosched.workload import load_requests

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.engines.embedded.request import GenerationRequest
    from cosched.engines.sglang.ranks import Ranks
    from cosched.protocols import Drafter, Publisher, Sink, TargetInfo, Trainer


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
    def device(self) -> str:
        return str(self.target.device)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding: an engine, with what adapts its draft."""

    name: str
    engine: EmbeddedEngine
    drafter: Drafter | None
    coscheduler: Coscheduler | CoschedulerPool | None


def build_world(config: Config) -> World:
    """Load the target and the requests.

    Raises:
        CoschedError: anything that the user's files or settings get wrong.
    """
    check_paths(config)
    device = _device(config.engine.device)
    if config.engine.num_threads is not None:
        torch.set_num_threads(config.engine.num_threads)
    target = Target.load(config.target.path, device, getattr(torch, config.engine.dtype))
    if config.adapt.replay.teacher == "hidden" or config.engine.kind == "trace":
        target.require_plain_head()
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
        requests = RecordedRows(directory, trace, target, ()).requests()[: workload.max_prompts]
        sampling = SamplingParams(trace.temperature, trace.top_p)
    else:
        trace = None
        requests = load_requests(workload, tokenizer, target.max_length, device)
        sampling = SamplingParams(workload.temperature, workload.top_p)
    scope = config.adapt.scope
    if scope.state == "per_tenant" and any(arm.startswith("adapted") for arm in config.arms):
        check_tenants(requests, scope.tenants)
    return World(config, target, tokenizer, requests, sampling, trace)


def load_drafter(world: World) -> Drafter:
    """A fresh serving draft from its checkpoint."""
    settings = world.config.drafter_settings
    return DRAFTERS.get(settings.kind).load(settings, world.target)


def build_arm(
    world: World,
    name: str,
    sink: Sink,
    writer: TraceWriter | None = None,
    on_tokens: Callable[[int], None] = lambda _n: None,
) -> Arm:
    """An engine for one arm. With a ``writer`` it captures what the configured drafter needs."""
    config = world.config
    base, windowed = split_arm(name)
    drafter = None if base == "plain" else load_drafter(world)
    window = config.drafter_settings.window if windowed else None
    coscheduler = None
    if base == "adapted" and drafter is not None and config.num_adapters:
        coscheduler = build_pool(config, world.target, drafter, window, sink)
    elif base == "adapted" and drafter is not None:
        publish, network = config.adapt.publish, drafter.network()
        publisher = network and InPlacePublisher.of_modules(
            network, world.target.model, publish.target_check_every, publish.keep
        )
        coscheduler = build_coscheduler(config, world.target, drafter, publisher, window, sink)
    layers = writer.feature_layers if writer else ()
    if drafter is not None:
        layers = drafter.signal.feature_layers
        if writer is not None and writer.feature_layers != layers:
            raise ConfigError(
                f"record.feature_layers: the arm {name!r} has the features of its own draft only; "
                f"record with plain as the first arm"
            )
    max_length = max(request.max_length for request in world.requests)
    num_drafted = drafter.num_draft_tokens if drafter else 0
    engine = EmbeddedEngine(
        rows=_rows(world, max_length + num_drafted + 1, layers),
        judge=_judge(world),
        drafter=drafter,
        options=EngineOptions(
            max_batch=config.engine.max_batch,
            max_length=max_length,
            seed=config.run.seed,
            stop_tokens=_stop_tokens(world),
            window=window,
            teacher=config.adapt.replay.teacher,
        ),
        device=world.target.device,
        observer=coscheduler,
        recorder=writer.record if writer else None,
        on_tokens=on_tokens,
        admit=coscheduler.admit if isinstance(coscheduler, CoschedulerPool) else None,
    )
    return Arm(name, engine, drafter, coscheduler)


def build_coscheduler(
    config: Config,
    target: TargetInfo,
    drafter: Drafter,
    publisher: Publisher | None,
    window: int | None,
    sink: Sink,
    ranks: Ranks | None = None,
    trainer: Trainer | None = None,
) -> Coscheduler:
    """Buffer, policy, trainer and guard around a serving draft; ``ranks`` where several train it.

    Without a ``trainer`` one is made for what is published, if anything is.
    """
    adapt, loss = config.adapt, config.loss_settings
    settings = config.policy_settings
    if trainer is None and publisher is not None:
        trainer = build_trainer(config, target, drafter.clone(torch.float32), ranks)
    policy = WithinTimeShare(POLICIES.get(settings.kind)(settings), settings.max_time_share)
    limits = replay_limits(config, target, drafter)
    # A chain's rows behind a refusal stand on the very path that it drafted: they teach like others.
    refused_weight = 1.0 if drafter.signal.conditioning == "chain" else loss.refused_weight
    return Coscheduler(
        buffer=ReplayBuffer(limits, loss.rows, window, refused_weight, adapt.replay.keep_finished),
        policy=policy if ranks is None else SamePolicy(policy, ranks),
        trainer=trainer,
        guard=FiniteGuard(),
        publisher=publisher,
        sink=sink,
        reset_when_finished=adapt.scope.state == "per_request",
    )


def build_pool(
    config: Config, target: Target, drafter: Drafter, window: int | None, sink: Sink
) -> CoschedulerPool:
    """A co-scheduler for each adapter: their trainers stand on one frozen copy of the draft.

    Raises:
        ConfigError: the drafter cannot serve several adapters.
    """
    lora, network, count = (
        lora_of(drafter, config.adapt.scope),
        drafter.network(),
        config.num_adapters,
    )
    if not isinstance(drafter, ServesAdapters) or lora is None or network is None or not count:
        raise ConfigError(
            f"adapt.scope.state: {config.adapt.scope.state} needs a draft with an adapter for each "
            f"request, and this drafter serves one draft to all; use shared"
        )
    base = drafter.clone(torch.float32)
    copies = [on_base_of(drafter.clone(torch.float32), base) for _ in range(count)]
    served = drafter.adapt(lora.layers, count, lora.rank, lora.scale)
    unchanging = dict(target.model.state_dict())
    unchanging |= {f"draft.{name}": p for name, p in network.named_parameters()}

    def make(index: int, events: Sink) -> Coscheduler:
        trainer = build_adapter_trainer(config, target, copies[index], lora)
        storage = {
            name: tensor
            for layer, tensors in served[index].items()
            for name, tensor in zip(weight_names(layer), tensors, strict=True)
        }
        for name, weight in trainer.weights().items():
            storage[name].copy_(weight)
        first = {name: tensor.clone() for name, tensor in storage.items()}
        publish = config.adapt.publish
        publisher = InPlacePublisher(
            Serving(storage, unchanging), first, publish.target_check_every, publish.keep
        )
        return build_coscheduler(
            config, target, drafter, publisher, window, events, trainer=trainer
        )

    return CoschedulerPool(count, config.adapt.scope.tenants, make, sink)


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
    return tuple(dict.fromkeys((*load_drafter(world).signal.feature_layers, *wanted)))


def _rows(world: World, max_length: int, feature_layers: tuple[int, ...]) -> RowSource:
    config = world.config
    if world.trace is not None:
        directory = Path(config.engine.trace or "")
        return RecordedRows(directory, world.trace, world.target, feature_layers)
    return LiveRows(world.target, config.engine.max_batch, max_length, feature_layers)


def _judge(world: World) -> Judge:
    if world.forced:
        return ForcedJudge(world.text_kind, world.sampling)
    return GreedyJudge() if world.sampling.greedy else SamplingJudge(world.sampling)


def _stop_tokens(world: World) -> frozenset[int]:
    if world.forced or not world.config.workload.stop_at_end_of_text:
        return frozenset()
    return world.target.end_tokens


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"engine.device: {name!r} is no device; auto, cpu, cuda, cuda:0 …"
        ) from error
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"engine.device: {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"engine.device: {name!r}, but this machine has no CUDA device")
    return device
