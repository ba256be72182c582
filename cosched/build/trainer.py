"""From a configuration to what trains: a copy of the draft, its loss, DeepSpeed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
import torch

from cosched.build.tables import tables_of
from cosched.errors import ConfigError
from cosched.guard.scorer import AcceptanceScorer
from cosched.guard.settings import ShadowSettings
from cosched.memory.capturing import frames_of
from cosched.memory.footprint import losses_of, offloads
from cosched.memory.full_size import batch_of_look, batches_of_update
from cosched.records import Decision
from cosched.registry import DRAFTERS
from cosched.training.background import BackgroundScorer, BackgroundTrainer
from cosched.training.beside import ProcessScorer, ProcessTrainer
from cosched.training.captured import Captured
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.group import TrainingGroup
from cosched.training.lasting import LastingLearner, LastingScorer, LastingTrainer
from cosched.training.lora import MergingTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.process import Worker
from cosched.training.scope import lora_of, parameters_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from cosched.build.tables import Tables
    from cosched.loop.roles import Publisher, Scorer, Trainer
    from cosched.protocols import Drafter, TargetInfo
    from cosched.records import Acceptance
    from cosched.settings.schema import Config
    from cosched.training.frames import Frames
    from cosched.training.lora import Lora
    from cosched.training.process import Build
    from cosched.training.ranks import Ranks

NICENESS = 10  # beside a server, whose other processes answer clients; measured on two cores


def build_learner(
    config: Config,
    target: TargetInfo,
    drafter: Drafter,
    acceptance: Acceptance,
    ranks: Ranks | None = None,
    publisher: Publisher | None = None,
) -> tuple[Trainer, Scorer]:
    """What trains a float32 copy of the serving draft, and what scores its weights for a guard.

    In the background both are in a process of their own on a CPU, and elsewhere in a thread. On a GPU
    they come rehearsed. Where a process is lost the next goes on from what the ``publisher`` serves.

    Raises:
        ConfigError: it is to train in the background, and several ranks train together.
    """
    background, device = config.adapt.trainer.background, target.embedding.weight.device
    if background and ranks and ranks.size > 1:
        raise ConfigError(
            f"adapt.trainer.background: true needs one rank, and {ranks.size} train together; "
            f"use false"
        )
    if background and device.type == "cpu":
        sent = config, tables_of(target), drafter.num_draft_tokens, acceptance
        return _lasting(config, partial(_build_alone, *sent), publisher)
    copy = drafter.clone(torch.float32)
    trainer = build_trainer(config, target, copy, ranks)
    scorer = build_scorer(config, target, copy, acceptance, ranks)
    if device.type == "cuda":
        rehearse(config, target, copy, trainer, scorer, ranks)
    if not background:
        return trainer, scorer
    behind = BackgroundTrainer(trainer, device)
    return behind, BackgroundScorer(scorer, behind)


def _lasting(
    config: Config, build: Build, publisher: Publisher | None
) -> tuple[LastingTrainer, LastingScorer]:
    """Both in a process, with another behind it."""
    settings, num_threads = config.adapt.trainer, torch.get_num_threads()
    niceness = NICENESS if config.engine.kind == "sglang" else 0

    def start() -> tuple[ProcessTrainer, ProcessScorer]:
        worker = Worker(build, num_threads, settings.limit_seconds, niceness=niceness)
        return ProcessTrainer(worker), ProcessScorer(worker)

    def serving() -> Mapping[str, Tensor] | None:
        if publisher is None or not publisher.version:
            return None
        return publisher.weights_of(publisher.version)

    learner = LastingLearner(start, serving, settings.restarts)
    return LastingTrainer(learner), LastingScorer(learner)


def build_trainer(
    config: Config, target: TargetInfo, copy: Drafter, ranks: Ranks | None = None
) -> Trainer:
    """A DeepSpeed trainer of a ``copy`` of the draft, in this process, for whose updates one waits."""
    if (lora := lora_of(copy, config.adapt.scope)) is None:
        trainable = parameters_of(copy, config.adapt.scope.kind)
        return _trainer(config, target, copy, trainable, ranks)
    network = copy.network()
    assert network is not None, "adapters are of a network"
    return MergingTrainer(_adapters(config, target, copy, lora, ranks), network, lora)


def build_scorer(
    config: Config,
    target: TargetInfo,
    copy: Drafter,
    acceptance: Acceptance,
    ranks: Ranks | None = None,
) -> AcceptanceScorer:
    """It puts weights into a trainer's ``copy`` for the while."""
    return AcceptanceScorer(
        copy,
        target.head,
        config.adapt.replay.teacher,
        target.embedding.weight.dtype,
        acceptance,
        ranks,
        config.adapt.memory.chunk_rows,
        config.adapt.trainer.precision,
    )


def build_adapter_trainer(config: Config, target: TargetInfo, copy: Drafter, lora: Lora) -> Trainer:
    """A trainer of new adapters on a copy of the draft: one of many, all in this process."""
    trainer = _adapters(config, target, copy, lora)
    if not config.adapt.trainer.background:
        return trainer
    return BackgroundTrainer(trainer, target.embedding.weight.device)


def _adapters(
    config: Config, target: TargetInfo, copy: Drafter, lora: Lora, ranks: Ranks | None = None
) -> DeepSpeedTrainer:
    network = copy.network()
    assert network is not None, "adapters are of a network"
    return _trainer(config, target, copy, lora.inject(network, config.run.seed), ranks)


def _trainer(
    config: Config,
    target: TargetInfo,
    copy: Drafter,
    trainable: Sequence[str],
    ranks: Ranks | None,
) -> DeepSpeedTrainer:
    adapt = config.adapt
    loss, *others = losses_of(config)
    batch_loss = BatchLoss(
        copy,
        loss,
        target.head,
        adapt.replay.teacher,
        others,
        adapt.trainer.precision,
        adapt.memory.chunk_rows,
    )
    group = None
    if ranks and ranks.size > 1:
        group = TrainingGroup(ranks.rank, ranks.size, ranks.together, ranks.alone, ranks.meet)
    return DeepSpeedTrainer(
        batch_loss,
        trainable,
        zero_stage=adapt.trainer.stage_of(group.size if group else 1),
        learning_rate=adapt.trainer.lr,
        max_grad_norm=adapt.trainer.max_grad_norm,
        weight_decay=adapt.trainer.weight_decay,
        group=group,
        frames=_frames(config, target, copy, ranks),
        capture=partial(Captured, must=adapt.trainer.cuda_graph == "always"),
        accumulation_steps=adapt.trainer.gradient_accumulation_steps,
        offload=offloads(config, target.embedding.weight.device.type),
    )


def _frames(
    config: Config, target: TargetInfo, copy: Drafter, ranks: Ranks | None
) -> Frames | None:
    device, num_ranks = target.embedding.weight.device.type, ranks.size if ranks else 1
    return frames_of(config, target, copy, losses_of(config), device, num_ranks)


def _build_alone(
    config: Config,
    target: Tables,
    num_draft_tokens: int,
    acceptance: Acceptance,
) -> tuple[Trainer, Scorer]:
    """In a process that does nothing else, of the draft's checkpoint, as what serves is; rehearsed."""
    settings = msgspec.structs.replace(config.drafter_settings, num_draft_tokens=num_draft_tokens)
    drafter = DRAFTERS.get(settings.kind).load(settings, target)
    return build_rehearsed(config, target, drafter, acceptance)


def build_rehearsed(
    config: Config,
    target: Tables,
    drafter: Drafter,
    acceptance: Acceptance,
    ranks: Ranks | None = None,
) -> tuple[Trainer, Scorer]:
    """What trains a copy of this draft, and what scores with it, by themselves; rehearsed."""
    copy: Drafter = drafter.clone(torch.float32)
    trainer = build_trainer(config, target, copy, ranks)
    scorer = build_scorer(config, target, copy, acceptance, ranks)
    rehearse(config, target, copy, trainer, scorer, ranks)
    return trainer, scorer


def rehearse(
    config: Config,
    target: TargetInfo,
    copy: Drafter,
    trainer: Trainer,
    scorer: Scorer,
    ranks: Ranks | None = None,
) -> None:
    """Updates and a look of full size, of which nothing is left but graphs and what the optimizer keeps.

    The first ones take many times as long as others, moments are there only after the first step, and
    each frame is captured as it first comes: SGLang gives its caches what is left by then.
    """
    frames = _frames(config, target, copy, ranks)
    for batch in batches_of_update(config, target, copy, frames):
        for number, _ in enumerate(losses_of(config) if frames else [None]):
            trainer.update(batch, Decision(1, objective=number))
    if isinstance(config.adapt.guard, ShadowSettings) or config.experts:  # else nobody looks
        scorer.scores(batch_of_look(config, target, copy), [trainer.weights()])
    trainer.reset()
