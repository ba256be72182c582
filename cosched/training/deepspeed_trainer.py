"""Micro-steps through DeepSpeed ZeRO, inside the process that serves.

No launcher, no port, no compiler: a process group of one is made in memory where none exists, and
DeepSpeed's shared-memory collective, which it would compile for CPUs at first use, is switched off
(one rank has nobody to talk to).
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from cosched.errors import TrainingError
from cosched.loop.learner_state import taken
from cosched.records import Decision, SignalBatch, UpdateResult
from cosched.training.captured import Captured
from cosched.training.clipping import clip_finite
from cosched.training.moments import moments_of, owners_of
from cosched.training.shares import KnownGradient, accumulate, shares_of

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from cosched.training.captured import Passes
    from cosched.training.frames import Frames
    from cosched.training.group import TrainingGroup
    from cosched.training.micro_step import BatchLoss
    from cosched.training.shares import Share

Capture = Callable[["BatchLoss", "Sequence[Tensor]", int], Captured]
"""``capture(batch_loss, trained, longest)``."""

BETAS = (0.9, 0.99)  # a request is short: the second moment must settle within some hundred steps


class DeepSpeedTrainer:
    """AdamW on float32 masters under ZeRO stage 0, 1 or 2, over its own copy of the draft.

    ``batch_loss.network`` is trained in place; ``trainable`` names its parameters that move, all
    others are frozen. Steps whose loss or gradient is not finite are skipped and counted; in stage 0
    the device decides it, and the host waits for an update once, at its end. In a
    ``group`` of ranks, all given the same batches, each takes its share of the anchors. Whatever may
    fail on one of them, its own passes forward and backward, is done before they meet: none waits in
    a collective for one that is not coming, which NCCL answers by ending the process. Gradients are
    accumulated over ``accumulation_steps`` parts of each batch; with ``offload`` ZeRO keeps what the optimizer
    holds in the host's memory. Batches that fill one of the ``frames``
    go through captured passes, which are for one rank in stage 0 and whole batches.

    Raises:
        TrainingError: DeepSpeed cannot be set up.
    """

    def __init__(
        self,
        batch_loss: BatchLoss,
        trainable: Sequence[str],
        zero_stage: int,
        learning_rate: float,
        max_grad_norm: float,
        weight_decay: float = 0.0,
        group: TrainingGroup | None = None,
        clock: Callable[[], float] = time.perf_counter,
        frames: Frames | None = None,
        capture: Capture = Captured,
        accumulation_steps: int = 1,
        offload: bool = False,
    ) -> None:
        assert frames is None or (group is None and not zero_stage), "ZeRO goes back by itself"
        assert frames is None or accumulation_steps == 1, "a frame is a whole batch"
        assert zero_stage or not offload, "it is ZeRO that offloads"
        names = set(trainable)
        for name, parameter in batch_loss.network.named_parameters():
            parameter.requires_grad_(name in names)
        self.batch_loss = batch_loss
        self.learning_rate = learning_rate
        self._clock = clock
        self._zero_stage = zero_stage
        self._max_grad_norm = max_grad_norm
        self._group = group
        self._trained = {
            name: p for name, p in batch_loss.network.named_parameters() if p.requires_grad
        }
        self._accumulation_steps = accumulation_steps
        self._goes_back = group is None and accumulation_steps == 1  # through the engine itself
        self._initial = {name: p.detach().clone() for name, p in self._trained.items()}
        self._engine = _initialize(
            batch_loss if self._goes_back else KnownGradient(batch_loss.network, self._trained),
            list(self._trained.values()),
            zero_stage,
            learning_rate,
            max_grad_norm,
            weight_decay,
            group,
            offload,
        )
        self._frames = frames
        self._captured = None
        if frames is not None:
            self._captured = capture(batch_loss, list(self._trained.values()), frames.longest)

    busy = False  # an update is done when it returns

    def finished(self) -> None:
        """Nothing is ever under way."""

    def update(self, batch: SignalBatch, decision: Decision) -> UpdateResult:
        """``decision.num_steps`` micro-steps on one batch."""
        started = self._clock()
        rate = decision.rate_share * (decision.learning_rate or self.learning_rate)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        num_rows, passes = batch.num_rows, None
        if self._frames is not None:
            batch = self._frames.fill(batch)
        place = (self._group.rank, self._group.size) if self._group else (0, 1)
        shares = shares_of(batch, self._accumulation_steps, *place)
        batches = [share.batch for share in shares]
        self.batch_loss.begin_update(*batches, objective=decision.objective)
        if self._captured is not None:
            passes = self._captured.passes(self.batch_loss.begun, decision.objective)
        steps = [self.step(shares, passes) for _ in range(decision.num_steps)]
        losses, skipped, lost_mass = self._read(steps, self.batch_loss.lost_mass)
        return UpdateResult(
            num_steps=decision.num_steps,
            num_skipped=sum(map(bool, skipped)),
            losses=tuple(losses),
            num_rows=num_rows,
            seconds=self._clock() - started,
            lost_mass=lost_mass,
            objective=decision.objective,
        )

    def step(self, shares: Sequence[Share], passes: Passes | None = None) -> tuple[Tensor, Tensor]:
        """One micro-step; its loss, and 1 where it was skipped, as numbers on the device."""
        with torch.enable_grad():
            if passes is not None:
                value = passes()
            else:
                loss = self._loss(shares)
                value = self._over_ranks(loss.detach())
                if self._zero_stage:
                    return value, self._step_of_zero(loss, value)
                self._engine.backward(loss)
            skipped = clip_finite(list(self._trained.values()), value, self._max_grad_norm)
            optimizer: Any = self._base_optimizer
            optimizer.found_inf = skipped  # as a GradScaler tells a fused optimizer
            self._engine.step()
        return value, skipped

    def _step_of_zero(self, loss: Tensor, value: Tensor) -> Tensor:
        """ZeRO 1 and 2 clip by themselves, and look for overflow: the host waits several times."""
        skipped = value.new_ones(())
        if not math.isfinite(value):  # host waits for the device
            return skipped
        self._engine.backward(loss)
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        return skipped.fill_(self._engine.skipped_steps - skipped_before)

    @staticmethod
    def _read(
        steps: Sequence[tuple[Tensor, Tensor]], lost_mass: Tensor | None
    ) -> tuple[list[float], list[float], float | None]:
        """Losses, what was skipped, and the lost mass, all at once."""
        losses, skipped = zip(*steps, strict=True)
        others = () if lost_mass is None else (lost_mass,)
        numbers = [number.to(losses[0].dtype) for number in (*losses, *skipped, *others)]
        read: list[float] = torch.stack(numbers).tolist()  # host waits for the device
        first, last = read[: len(steps)], read[len(steps) : 2 * len(steps)]
        return first, last, read[-1] if others else None

    def _loss(self, shares: Sequence[Share]) -> Tensor:
        """This rank's share of the loss, from which DeepSpeed goes back."""
        if self._goes_back:
            return self._engine(shares[0].batch)
        value, gradients = accumulate(self.batch_loss, shares, self._trained)
        if self._group is not None:
            self._group.meet()
        return self._engine(value, gradients)

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch; not finite on any rank is not finite on all."""
        if self._group is not None:
            loss = loss.clone()
            dist.all_reduce(loss, group=self._group.whole)
            loss /= self._group.size
        return loss

    def weights(self) -> Mapping[str, Tensor]:
        """The trained parameters as they are now (whole in every ZeRO stage up to 2)."""
        return {name: p.detach() for name, p in self._trained.items()}

    def reset(self) -> None:
        """The first weights and an empty optimizer, to the bit."""
        self.load(self._initial)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """These weights and an empty optimizer."""
        for name, parameter in self._trained.items():
            parameter.copy_(weights[name])
        self._refresh_masters()
        self._empty_optimizer()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on: weights and the optimizer's moments."""
        tensors = {f"weight.{name}": weight.clone() for name, weight in self.weights().items()}
        optimizer = self._base_optimizer
        for number, owner in enumerate(owners_of(optimizer)):
            for key, value in optimizer.state.get(owner, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{key}"] = value.detach().clone()
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state()`` of a trainer built the same way, to the bit.

        One that had not stepped yet has no moments in its state: they become zero, as at its start.

        Raises:
            RunFolderError: the state is of other weights; then this trainer is as it was.
        """
        weights = [taken(tensors, f"weight.{name}", p) for name, p in self._trained.items()]
        optimizer = self._base_optimizer
        moments = moments_of(tensors, owners_of(optimizer))
        for parameter, weight in zip(self._trained.values(), weights, strict=True):
            parameter.copy_(weight)
        self._refresh_masters()
        self._empty_optimizer()
        for owner, entry, value in moments:
            optimizer.state[owner][entry] = value.to(owner.device, copy=True)

    def _empty_optimizer(self) -> None:
        for state in self._base_optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _refresh_masters(self) -> None:
        """Tell ZeRO that the weights were written, else its masters would bring the old ones back."""
        if hasattr(self._engine.optimizer, "refresh_fp32_params"):
            self._engine.optimizer.refresh_fp32_params()

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The AdamW under DeepSpeed's wrapper."""
        optimizer = self._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _device_for_deepspeed(device: torch.device) -> Generator[None]:
    """DeepSpeed takes the device that ``LOCAL_RANK`` names, whoever has set it and for what."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _initialize(
    module: nn.Module,
    parameters: list[torch.nn.Parameter],
    zero_stage: int,
    learning_rate: float,
    max_grad_norm: float,
    weight_decay: float,
    group: TrainingGroup | None,
    offload: bool,
) -> Any:
    device = parameters[0].device
    deepspeed = _import_deepspeed(device, zero_stage)
    _ensure_process_group(device)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True
    )
    # One bucket for everything: a draft is small, and each bucket costs a pass.
    bucket = max(1, sum(p.numel() for p in parameters))
    config = {
        # It measures what nobody reads, and waits for the device twice a step to measure it well.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm if zero_stage else 0.0,  # else ``step`` clips
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if offload else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW wants a compiler
        "steps_per_print": 1_000_000_000,
    }
    with _device_for_deepspeed(device):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=parameters,  # pyright: ignore[reportArgumentType]
            config=config,
            dist_init_required=False,
            mpu=group,
        )
    if zero_stage == 0 and group is None:
        engine.enable_backward_allreduce = False  # one rank: it would copy all gradients twice
    return engine


def _import_deepspeed(device: torch.device, zero_stage: int) -> Any:
    """DeepSpeed without what it says on import: probes of optional compilers, advice on devices.

    Raises:
        TrainingError: it cannot be imported; the message ends with what it said.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryFile() as said, _output_into(said):
        try:
            import deepspeed
            from deepspeed.utils import logger
        except ImportError as error:
            said.seek(0)
            raise TrainingError(
                f"adapt.trainer.kind is deepspeed, but it cannot be imported: {error}\n"
                f"{said.read().decode(errors='replace')}"
            ) from error
        if zero_stage:
            with suppress(ImportError):  # else the first step does, which takes seconds
                importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    logger.setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _output_into(file: IO[bytes]) -> Generator[None]:
    """Send the process's output there, that of its subprocesses included."""
    kept = os.dup(1), os.dup(2)
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    finally:
        for original, copy in enumerate(kept, 1):
            os.dup2(copy, original)
            os.close(copy)


def _ensure_process_group(device: torch.device) -> None:
    """A group of one in memory, unless the host (SGLang, torchrun) has made one already."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
