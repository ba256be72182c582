"""From a configuration to what adapts a draft: buffer, policy, trainer, guard, publisher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cosched.build.trainer import build_adapter_trainer, build_learner, build_scorer
from cosched.coscheduler import Coscheduler
from cosched.errors import ConfigError
from cosched.guard.guard import FiniteGuard, ShadowGuard
from cosched.guard.settings import ShadowSettings
from cosched.loop.budget import WithinTimeShare
from cosched.loop.per_adapter import CoschedulerPool
from cosched.loop.publish import InPlacePublisher, Serving
from cosched.loop.replay import ReplayBuffer
from cosched.memory.full_size import replay_limits
from cosched.protocols import ServesAdapters
from cosched.registry import OBJECTIVES, POLICIES
from cosched.training.lora import on_base_of, weight_names
from cosched.training.ranks import SamePolicy
from cosched.training.scope import lora_of
from cosched.training.trying import TryingTrainer, WithObjective

if TYPE_CHECKING:
    from collections.abc import Callable

    from cosched.engines.embedded.target import Target
    from cosched.loop.roles import Guard, Publisher, Scorer, Sink, Trainer
    from cosched.protocols import Drafter, TargetInfo
    from cosched.records import Acceptance
    from cosched.settings.schema import Config
    from cosched.training.ranks import Ranks


def build_coscheduler(
    config: Config,
    target: TargetInfo,
    drafter: Drafter,
    publisher: Publisher | None,
    window: int | None,
    sink: Sink,
    ranks: Ranks | None = None,
    acceptance: Acceptance = "sampled",
    learner: tuple[Trainer, Scorer] | None = None,
) -> Coscheduler:
    """All that adapts a serving draft; ``ranks`` where several train it.

    ``acceptance`` is the engine's, by which a guard scores, at the temperature of each request. Without
    a ``learner``, what trains a copy of the draft and what scores it, one is made if anything is published.
    """
    adapt, loss, settings = config.adapt, config.loss_settings, config.policy_settings
    chosen, rates = config.objective_settings, [rate for _, rate in config.experts]
    policy = WithObjective(
        WithinTimeShare(POLICIES.get(settings.kind)(settings), settings.max_time_share),
        OBJECTIVES.get(chosen.kind)(chosen),
        rates,
        chosen.warm_tokens,
    )
    # A chain's rows behind a refusal stand on the very path that it drafted: they count like others.
    refused_weight = 1.0 if drafter.signal.conditioning == "chain" else loss.refused_weight
    shadow = adapt.guard if isinstance(adapt.guard, ShadowSettings) else None
    buffer = ReplayBuffer(
        replay_limits(config, target, drafter),
        loss.rows,
        window,
        refused_weight,
        adapt.replay.keep_finished,
        fresh=adapt.replay.fresh,
        held_out=shadow.anchors if shadow else 0,
        device=target.embedding.weight.device,
    )
    guard: Guard = FiniteGuard()
    trainer: Trainer | None = None
    if publisher is not None:
        if learner is None:
            learner = build_learner(config, target, drafter, acceptance, ranks, publisher)
        trainer, scorer = learner
        if shadow is not None:
            length_is_chosen = config.length_settings.kind != "fixed"
            guard = ShadowGuard(shadow, scorer, buffer, publisher, length_is_chosen)
            if rates:
                trainer = TryingTrainer(trainer, rates, scorer, buffer, publisher, shadow.anchors)
    return Coscheduler(
        buffer=buffer,
        policy=policy if ranks is None else SamePolicy(policy, ranks),
        trainer=trainer,
        guard=guard,
        publisher=publisher,
        sink=sink,
        reset_when_finished=adapt.scope.state == "per_request",
    )


def follower_or_coscheduler(config: Config) -> Callable[..., Any]:
    """What makes of the same arguments that which ``adapt.placement`` asks for."""
    if config.adapt.placement == "colocated":
        return build_coscheduler
    from cosched.build.follower import build_follower  # with ZeroMQ, which nothing else needs

    return build_follower


def build_pool(
    config: Config,
    target: Target,
    drafter: Drafter,
    window: int | None,
    sink: Sink,
    acceptance: Acceptance = "sampled",
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
        scorer = build_scorer(config, target, copies[index], acceptance)
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
            config,
            target,
            drafter,
            publisher,
            window,
            events,
            acceptance=acceptance,
            learner=(trainer, scorer),
        )

    return CoschedulerPool(count, config.adapt.scope.tenants, make, sink)
