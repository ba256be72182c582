"""Whether micro-steps are captured in CUDA graphs, and the frames that their batches fill then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.training.frames import Frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.protocols import Drafter, Loss, TargetInfo
    from cosched.settings.schema import Config

LONGEST = 1 << 17  # tokens of a text, where the target does not say how long one may be


def frames_of(
    config: Config,
    target: TargetInfo,
    drafter: Drafter,
    losses: Sequence[Loss],
    device: str,
    num_ranks: int = 1,
) -> Frames | None:
    """None where micro-steps are handed to the ``device`` operation by operation.

    Raises:
        ConfigError: they cannot be captured, and ``adapt.trainer.cuda_graph`` is ``always``.
    """
    wanted = config.adapt.trainer.cuda_graph
    if wanted == "never":
        return None
    if obstacle := _obstacle(config, drafter, losses, device, num_ranks):
        if wanted == "always":
            raise ConfigError(
                f"{config.adapt_key}.trainer.cuda_graph: always, but {obstacle}; use auto"
            )
        return None
    replay = config.adapt.replay
    return Frames(
        window=replay.window,
        anchors=replay.anchors,
        most_requests=config.engine.max_batch,
        along_text=config.loss_settings.rows == "delayed",
        longest=target.max_length or LONGEST,
    )


def _obstacle(
    config: Config, drafter: Drafter, losses: Sequence[Loss], device: str, num_ranks: int
) -> str | None:
    where = config.adapt_key
    if device != "cuda":
        return f"engine.device = {config.engine.device} is no GPU here"
    if num_ranks > 1:
        return f"{num_ranks} ranks train together"
    if stage := config.adapt.trainer.stage_of(num_ranks):
        return f"{where}.trainer.zero_stage = {stage} goes back by itself"
    if config.adapt.trainer.gradient_accumulation_steps > 1:
        return f"{where}.trainer.gradient_accumulation_steps goes over the requests of a batch in groups"
    if config.num_adapters:
        return f"{where}.scope.state = {config.adapt.scope.state} trains several adapters"
    if not drafter.capturable:
        return f"{config.drafter_key}.kind = {config.drafter_settings.kind} cannot be captured"
    if any(loss.settings.vocab_top_k is not None for loss in losses):
        return f"{where}.loss.vocab_top_k takes a number of tokens that the device alone knows"
    return None
