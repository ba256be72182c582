"""What an experiment will take in memory, from its settings and ``config.json`` files alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from cosched.errors import ConfigError
from cosched.guard.settings import ShadowSettings
from cosched.loop.teacher_rows import copies_words
from cosched.memory.capturing import frames_of
from cosched.memory.full_size import (
    batch_of_look,
    batch_of_update,
    batches_of_update,
    replay_limits,
)
from cosched.memory.peaks import bytes_of, scores_peak, step_peak
from cosched.memory.sketch import sketch_draft
from cosched.registry import LOSSES
from cosched.settings.arms import adapts
from cosched.settings.device import device_of
from cosched.settings.schema import own_keys
from cosched.training.process import SLOTS
from cosched.training.scope import lora_of, scope_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cosched.memory.sketch import TargetSketch
    from cosched.protocols import Drafter, Loss
    from cosched.records import SignalBatch
    from cosched.settings.schema import Config
    from cosched.training.frames import Frames

R = TypeVar("R")

# Of a process that trains: the interpreter with PyTorch and DeepSpeed, as it begins. Measured.
PROCESS_BYTES = 400 << 20


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by what they are for, and the rates behind them; None where the files do not say.

    ``serving_adapters`` are those that serve beside one another. ``trainer_copy`` is the float32
    draft that learns, once, with its adapters if it has any, and ``first_weights`` what a reset
    goes back to; ``masters`` (ZeRO's own, and its flat copy of the weights) and ``moments`` are DeepSpeed's.
    ``merged`` are the weights with adapters merged in, which are there only while they are
    published. ``last_good`` is what can be served again: the draft as loaded, and the versions
    kept. ``reference`` is the copy of before the update, where the loss compares with it.
    ``trials`` are the trainer's states between which an objective chooses. ``words`` are the rows of
    the target's head that the draft has words for, copied out where it lacks most of them. ``step`` is
    the most that a micro-step takes at once: activations, logits and what is made of them, gradients.
    ``scores`` is the most that a guard takes at once which scores drafts: the same but for gradients, and
    the weights that it puts into the draft. It scores between updates, so of ``step`` and ``scores``
    only the larger one adds. ``process`` is what a
    process of its own that trains takes besides: itself, the target's embedding and head, and the
    weights that both sides see. (Several adapters that learn in the background may do both at once:
    each of them by itself is counted as said.) ``draft_store`` is what a drafter without a network
    learns, of each running request and of those that are done.
    """

    num_target_parameters: int | None
    num_draft_parameters: int
    num_trained: int
    target: int | None
    draft: int
    serving_adapters: int
    trainer_copy: int
    first_weights: int
    merged: int
    last_good: int
    masters: int
    moments: int
    reference: int
    trials: int
    words: int
    step: int
    scores: int
    graphs: int
    process: int
    replay: int
    draft_cache: int
    draft_store: int
    target_cache: int
    feature_bytes_per_token: int
    teacher_bytes_per_row: int
    cache_bytes_per_token: int

    @property
    def added(self) -> int:
        """Everything but the target: what speculation and adaptation cost on top of it."""
        return sum(
            (
                self.draft,
                self.serving_adapters,
                self.trainer_copy,
                self.first_weights,
                self.merged,
                self.last_good,
                self.masters,
                self.moments,
                self.reference,
                self.trials,
                self.words,
                max(self.step, self.scores),
                self.graphs,
                self.process,
                self.replay,
                self.draft_cache,
                self.draft_store,
            )
        )

    @property
    def within_sglang(self) -> int:
        """What SGLang's ``mem_fraction_static`` has to hold beside the target and its cache.

        SGLang gives its caches what is left of that share when its workers stand
        (``Scheduler.init_model_worker``, 0.5.20 to 0.5.23). So it holds not only what SGLang loads,
        but what is made with our worker too: the draft as we load it, the one that learns with its
        first weights, the masters, and what updates that are rehearsed there leave, moments and graphs.
        """
        loaded = self.draft if self.num_trained else 0
        made = loaded + self.trainer_copy + self.first_weights + self.masters + self.moments
        return self.draft + self.draft_cache + made + self.graphs

    @property
    def beside_sglang(self) -> int:
        """What comes later, and has to find room outside of that share; activations not counted."""
        return self.added - self.within_sglang


def footprint(config: Config, target: TargetSketch, drafter: Drafter) -> Footprint:
    """Add up a run of these settings, for the arm that takes most.

    ``drafter`` is that of these settings and may be a sketch; other ``drafts`` are sketched.

    Raises:
        CheckpointError: one of those cannot be read, or does not fit.
        ConfigError: an arm's settings do not fit this target or its draft.
    """
    found = _each_arm(config, target, drafter, _footprint_of_arm)
    return max(found, key=lambda one: one.added)


def check_fits(config: Config, target: TargetSketch, drafter: Drafter) -> None:
    """Raise what ``footprint`` would, and count nothing."""
    _each_arm(config, target, drafter, _check_arm)


def _each_arm(
    config: Config,
    target: TargetSketch,
    drafter: Drafter,
    do: Callable[[Config, TargetSketch, Drafter], R],
) -> list[R]:
    """With each arm's own settings and draft; an error names its own keys."""
    drafters = {config.drafter_key: drafter}
    done: list[R] = []
    for arm in config.arms:
        own = config.for_arm(arm)
        if own.drafter_key not in drafters:
            drafters[own.drafter_key] = sketch_draft(own, target)
        with own_keys(own):
            done.append(do(own, target, drafters[own.drafter_key]))
    return done


def _check_arm(config: Config, target: TargetSketch, drafter: Drafter) -> None:
    replay_limits(config, target, drafter)
    if drafter.network() is None or not any(map(adapts, config.arms)):
        return
    scope_of(drafter, config.adapt.scope)
    lora_of(drafter, config.adapt.scope)
    ids = drafter.target_ids()
    row_1V = torch.empty(1, target.vocab_size if ids is None else len(ids), device="meta")
    losses = losses_of(config)
    for loss in losses:
        loss.measure(row_1V, row_1V, row_1V if loss.needs_reference else None)
    _frames(config, target, drafter, losses)
    offloads(config, device_of(config.engine.device).type)


def losses_of(config: Config) -> list[Loss]:
    """What updates are made with: the loss, or that of each expert."""
    own = [own for own, _ in config.experts] or [config.loss_settings]
    return [LOSSES.get(settings.kind)(settings) for settings in own]


def offloads(config: Config, device: str) -> bool:
    """Whether what the optimizer holds is in the host's memory.

    Raises:
        ConfigError: it is to be, and that is where everything is.
    """
    if not config.adapt.trainer.offload_optimizer:
        return False
    if device == "cpu":
        raise ConfigError(
            f"{config.adapt_key}.trainer.offload_optimizer: true, but what trains is on the CPU, whose memory "
            f"has everything; use false"
        )
    return True


def _footprint_of_arm(config: Config, target: TargetSketch, drafter: Drafter) -> Footprint:
    network = drafter.network()
    dtype: torch.dtype = getattr(torch, config.engine.dtype)
    parameters = dict(network.named_parameters()) if network is not None else {}
    held = sum(parameter.numel() for parameter in parameters.values())
    scope, served = config.adapt.scope, config.num_adapters
    keep = config.adapt.publish.keep
    adapters = trained = published = versions = 0
    scored: Sequence[str] = ()
    if network is not None and any(map(adapts, config.arms)):
        names = scored = scope_of(drafter, scope).parameters
        trained = published = sum(parameters[name].numel() for name in names)
        versions = held + keep * published
        if (lora := lora_of(drafter, scope)) is not None:
            trained = adapters = (served or 1) * lora.num_parameters(network)
        if served:
            versions = (1 + keep) * adapters
            scored = ()  # an adapter's own weights, next to nothing
    limits = replay_limits(config, target, drafter)
    losses = losses_of(config)
    rows = config.loss_settings.rows
    one = limits.request_bytes(keep_blocks=rows != "delayed")
    requests = (served or 1) * limits.room(one)
    if not config.adapt.replay.keep_finished:
        requests = min(config.engine.max_batch, requests)
    target_parameters = target.num_parameters()
    workload = config.workload
    longest = workload.prompt_tokens + workload.turns * workload.max_new_tokens
    cache = drafter.cache_bytes_per_token
    words = _words(config, target, drafter) if trained else 0
    offloaded = trained > 0 and offloads(config, device_of(config.engine.device).type)
    graphs = _graphs(config, target, drafter, losses, words) if trained else 0
    return Footprint(
        num_target_parameters=target_parameters,
        num_draft_parameters=held,
        num_trained=trained,
        target=None if target_parameters is None else target_parameters * dtype.itemsize,
        draft=held * dtype.itemsize,
        trainer_copy=4 * (held + adapters) if trained else 0,
        first_weights=4 * trained,
        serving_adapters=dtype.itemsize * adapters if served else 0,
        merged=4 * published if adapters and not served else 0,
        last_good=dtype.itemsize * versions,
        masters=(4 if offloaded else 8) * trained if _divides(config) else 0,
        moments=0 if offloaded else 8 * trained,
        reference=4 * trained * any(loss.needs_reference for loss in losses),
        trials=2 * (12 * trained + 4 * published * (adapters > 0)) if config.experts else 0,
        words=words,
        step=0 if graphs else _most_of_a_step(config, target, drafter, losses, words, trained),
        scores=_scores_peak(config, target, drafter, scored) if trained else 0,
        graphs=graphs,
        process=_process(config, target, published) if trained else 0,
        replay=requests * one if trained else 0,
        draft_cache=cache * config.engine.max_batch * longest,
        draft_store=drafter.slot_bytes * config.engine.max_batch + drafter.shared_bytes,
        target_cache=target.cache_width * dtype.itemsize * config.engine.max_batch * longest,
        feature_bytes_per_token=limits.feature_row_bytes,
        teacher_bytes_per_row=limits.teacher_row_bytes,
        cache_bytes_per_token=cache,
    )


def _process(config: Config, target: TargetSketch, num_published: int) -> int:
    """Of a trainer that is in a process of its own (``build_learner``); nothing where it is not."""
    on_cpu = device_of(config.engine.device).type == "cpu"
    if not (on_cpu and config.adapt.trainer.background) or config.num_adapters:
        return 0
    table = target.vocab_size * target.hidden_size * target.embedding.weight.dtype.itemsize
    return PROCESS_BYTES + (1 if target.tied else 2) * table + 4 * SLOTS * num_published


def _words(config: Config, target: TargetSketch, drafter: Drafter) -> int:
    ids, form = drafter.target_ids(), config.adapt.replay.teacher
    if ids is None or not copies_words(form, len(ids), target.vocab_size):
        return 0
    return len(ids) * target.hidden_size * target.embedding.weight.dtype.itemsize


def _divides(config: Config) -> bool:
    """Whether ZeRO divides among ranks what the optimizer holds, and copies for it."""
    return config.adapt.trainer.stage_of(_num_ranks(config)) > 0


def _num_ranks(config: Config) -> int:
    return config.engine.arguments.get("tp_size", 1)


def _most_of_a_step(
    config: Config,
    target: TargetSketch,
    drafter: Drafter,
    losses: Sequence[Loss],
    words: int,
    trained: int,
) -> int:
    """Of a micro-step, or of the optimizer behind it: ZeRO has gradients three times."""
    if not trained:
        return 0
    batch = batch_of_update(config, target, drafter)
    peak = max(_step_peak(config, target, drafter, loss, batch) for loss in losses) - words
    return max(peak, 12 * trained) if _divides(config) else peak


def _graphs(
    config: Config,
    target: TargetSketch,
    drafter: Drafter,
    losses: Sequence[Loss],
    words: int,
) -> int:
    """They have one memory, and each has inputs of its own; nothing where none are captured."""
    frames = _frames(config, target, drafter, losses)
    if frames is None:
        return 0
    batches = batches_of_update(config, target, drafter, frames)
    peaks = [_step_peak(config, target, drafter, loss, one) for loss in losses for one in batches]
    inputs = len(losses) * sum(map(bytes_of, batches))
    return max(peaks) - words + inputs


def _frames(
    config: Config, target: TargetSketch, drafter: Drafter, losses: Sequence[Loss]
) -> Frames | None:
    device = device_of(config.engine.device).type
    return frames_of(config, target, drafter, losses, device, _num_ranks(config))


def _step_peak(
    config: Config, target: TargetSketch, drafter: Drafter, loss: Loss, batch: SignalBatch
) -> int:
    """Run a micro-step of full size on the meta device, and count."""
    return step_peak(
        drafter,
        scope_of(drafter, config.adapt.scope).parameters,
        loss,
        target.head,
        config.adapt.replay.teacher,
        batch,
        config.adapt.memory.chunk_rows,
        lora_of(drafter, config.adapt.scope),
        config.adapt.trainer.gradient_accumulation_steps,
    )


def _scores_peak(
    config: Config, target: TargetSketch, drafter: Drafter, scored: Sequence[str]
) -> int:
    """Score as many rows as the guard asks for at most, likewise."""
    if not isinstance(config.adapt.guard, ShadowSettings):
        return 0
    return scores_peak(
        drafter,
        scored,
        target.embedding.weight.dtype,
        target.head,
        config.adapt.replay.teacher,
        batch_of_look(config, target, drafter),
        chunk_rows=config.adapt.memory.chunk_rows,
    )
