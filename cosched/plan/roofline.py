"""What rounds and updates take on a GPU that was not measured: bytes, operations and launches, and their speeds.

The formulae and the shares of what is printed on a product that are got are those of
``benchmarks/gpu_model.md``: an estimate, which is wrong by a third now and then. Operations and launches of
a micro-step are counted, on the meta device, for whatever drafter the file has.

Figures of products are from NVIDIA's data sheets (A100 80GB SXM 2021, H100 SXM 2022, H200 2023, HGX B200
2024, a GPU of it), dense, without sparsity: bytes a second, operations a second in bfloat16
and in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch
from torch.utils.flop_counter import FlopCounterMode

from cosched.errors import CheckpointError
from cosched.guard.settings import ShadowSettings
from cosched.memory.footprint import losses_of
from cosched.memory.full_size import batch_of_update
from cosched.memory.peaks import step_peak
from cosched.testing.counting import Counting
from cosched.training.scope import lora_of, scope_of

if TYPE_CHECKING:
    from cosched.memory.footprint import Footprint
    from cosched.memory.sketch import TargetSketch
    from cosched.protocols import Drafter
    from cosched.settings.schema import Config


@dataclass(frozen=True, slots=True)
class Device:
    """A product as its data sheet has it."""

    bytes_per_s: float
    bfloat16: float
    float32: float


DEVICES = {
    "a100": Device(2.039e12, 312e12, 19.5e12),
    "h100": Device(3.35e12, 989e12, 67e12),
    "h200": Device(4.8e12, 989e12, 67e12),
    "b200": Device(8.0e12, 2250e12, 80e12),
}
OF_MEMORY, OF_BFLOAT16, OF_FLOAT32 = 0.83, 0.5, 0.75  # got of what is printed
LAUNCH, GRAPHED, WAIT = 6e-6, 2e-6, 20e-6  # seconds: of an operation, inside a graph, for the host
LAYER = 12  # operations of a decoder layer that serves
SCHEDULING = 3e-4  # seconds of a round outside of all graphs
# Of a trained parameter.
STEP_BYTES = 54  # casts 6, gradients 16, AdamW 28, zeros 4
PUBLISH_BYTES = 14  # candidate 4, serving copy 2, kept copy 4, checksums 4
SCORE_BYTES = 12  # of a set of weights: as it would serve, and in float32 again


@dataclass(frozen=True, slots=True)
class Step:
    """A micro-step, counted."""

    flops: float
    launches: int


def for_requests(config: Config, requests: int) -> Config:
    """The same for so many requests at once."""
    return msgspec.structs.replace(
        config, engine=msgspec.structs.replace(config.engine, max_batch=requests)
    )


def count_step(config: Config, target: TargetSketch, drafter: Drafter, requests: int) -> Step:
    """Operations of a micro-step on rows of so many requests, each with a context of its own."""
    own = for_requests(config, requests)
    batch = batch_of_update(own, target, drafter)
    with FlopCounterMode(display=False) as operations, Counting() as launches:
        step_peak(
            drafter,
            scope_of(drafter, own.adapt.scope).parameters,
            losses_of(own)[0],
            target.head,
            own.adapt.replay.teacher,
            batch,
            own.adapt.memory.chunk_rows,
            lora_of(drafter, own.adapt.scope),
        )
    return Step(float(operations.get_total_flops()), launches.num_launches)


@dataclass(frozen=True, slots=True)
class Roofline:
    """An experiment's rounds and updates on a device."""

    device: Device
    config: Config
    target: TargetSketch
    drafter: Drafter
    sizes: Footprint

    @property
    def num_target_parameters(self) -> int:
        """As its files have them, or its ``config.json``."""
        known = self.sizes.num_target_parameters
        return _counted(self.target) if known is None else known

    def round_seconds(self, requests: int, context: float, drafts: bool = True) -> float:
        """A round of so many requests with so much text each: weights and caches are read once."""
        known = self.num_target_parameters
        table = 0 if self.target.tied else self.target.vocab_size * self.target.hidden_size
        read, width = known - table, self.target.embedding.weight.dtype.itemsize
        tokens = self.drafter.num_draft_tokens if drafts else 0
        verify = max(
            width * read / self._bytes, 2.0 * read * requests * (tokens + 1) / self._serving
        )
        cache = requests * context * self.target.cache_width * width / self._bytes
        passes = (tokens if self.drafter.draft_type == "chain" else 1) if drafts else 0
        propose = passes * self.sizes.draft / self._bytes
        launches = LAYER * (self.target.num_layers + passes) * GRAPHED
        return verify + cache + propose + launches + SCHEDULING

    def update_seconds(self, step: Step, num_steps: int) -> float:
        """An update of so many micro-steps, and the look of a guard that scores."""
        trained = self.sizes.num_trained
        bfloat16 = self.config.adapt.trainer.precision != "float32"
        speed = self.device.bfloat16 * OF_BFLOAT16 if bfloat16 else self.device.float32 * OF_FLOAT32
        one = max(step.flops / speed + STEP_BYTES * trained / self._bytes, LAUNCH * step.launches)
        seconds = num_steps * one + WAIT
        if isinstance(self.config.adapt.guard, ShadowSettings):
            # Two passes forwards, each a third of a step, and two sets of weights put in.
            passes = 2 / 3 * step.flops / speed + 2 * SCORE_BYTES * trained / self._bytes
            seconds += max(passes, 2 / 3 * LAUNCH * step.launches) + WAIT
        return seconds

    @property
    def publish_seconds(self) -> float:
        """What a server takes to serve a version that is there."""
        return PUBLISH_BYTES * self.sizes.num_trained / self._bytes + WAIT

    @property
    def _bytes(self) -> float:
        return self.device.bytes_per_s * OF_MEMORY

    @property
    def _serving(self) -> float:
        half = self.config.engine.dtype != "float32"
        return self.device.bfloat16 * OF_BFLOAT16 if half else self.device.float32 * OF_FLOAT32


def _counted(target: TargetSketch) -> int:
    """Parameters of a target whose folder has no weights: it is built on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(target.directory, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each kind of mistake has one of its own
        raise CheckpointError(
            f"target.path: {target.directory} has no weights, and transformers cannot tell from its "
            f"config.json how many there would be: {error}; give plan.round_seconds"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())
