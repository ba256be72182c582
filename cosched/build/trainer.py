"""From a configuration to what trains: a copy of the draft, its loss, DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.registry import LOSSES
from cosched.training.background import BackgroundTrainer
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.group import TrainingGroup
from cosched.training.lora import MergingTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.scope import lora_of, parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.loop.roles import Trainer
    from cosched.protocols import Drafter, TargetInfo
    from cosched.settings.schema import Config
    from cosched.training.lora import Lora
    from cosched.training.ranks import Ranks


def build_trainer(
    config: Config, target: TargetInfo, copy: Drafter, ranks: Ranks | None = None
) -> Trainer:
    """A DeepSpeed trainer over a float32 ``copy`` of the serving draft."""
    if (lora := lora_of(copy, config.adapt.scope)) is not None:
        return build_adapter_trainer(config, target, copy, lora, ranks, merge=True)
    trainable = parameters_of(copy, config.adapt.scope.kind)
    return _beside(_trainer(config, target, copy, trainable, ranks), config, target, ranks)


def build_adapter_trainer(
    config: Config,
    target: TargetInfo,
    copy: Drafter,
    lora: Lora,
    ranks: Ranks | None = None,
    merge: bool = False,
) -> Trainer:
    """A trainer of new adapters on a copy of the draft; ``merge`` gives weights that need none."""
    network = copy.network()
    assert network is not None, "adapters are of a network"
    trainable = lora.inject(network, config.run.seed)
    trainer: Trainer = _trainer(config, target, copy, trainable, ranks)
    if merge:
        trainer = MergingTrainer(trainer, network, lora)
    return _beside(trainer, config, target, ranks)


def _trainer(
    config: Config,
    target: TargetInfo,
    copy: Drafter,
    trainable: Sequence[str],
    ranks: Ranks | None,
) -> DeepSpeedTrainer:
    adapt = config.adapt
    losses = [loss for loss, _ in config.experts] or [config.loss_settings]
    loss, *others = [LOSSES.get(settings.kind)(settings) for settings in losses]
    batch_loss = BatchLoss(
        copy, loss, target.head, adapt.replay.teacher, others, adapt.trainer.precision
    )
    group = None
    if ranks and ranks.size > 1:
        group = TrainingGroup(ranks.rank, ranks.size, ranks.together, ranks.alone)
    return DeepSpeedTrainer(
        batch_loss,
        trainable,
        zero_stage=adapt.trainer.zero_stage,
        learning_rate=adapt.trainer.lr,
        max_grad_norm=adapt.trainer.max_grad_norm,
        weight_decay=adapt.trainer.weight_decay,
        group=group,
    )


def _beside(trainer: Trainer, config: Config, target: TargetInfo, ranks: Ranks | None) -> Trainer:
    """The trainer in the background, where the settings want it there."""
    if not config.adapt.trainer.background:
        return trainer
    if ranks and ranks.size > 1:
        raise ConfigError(
            f"adapt.trainer.background: true needs one rank, and {ranks.size} train together; "
            f"use false"
        )
    return BackgroundTrainer(trainer, target.embedding.weight.device)
