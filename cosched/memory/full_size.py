"""What replay holds at most, and batches as large as training ever has them, with nothing in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cosched.errors import ConfigError
from cosched.guard.guard import LOOKED_AT
from cosched.guard.settings import ShadowSettings
from cosched.loop.replay import ReplayLimits
from cosched.loop.teacher_rows import record_width
from cosched.records import Layout, SignalBatch

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.protocols import Drafter, TargetInfo
    from cosched.settings.schema import Config
    from cosched.training.frames import Frames


def full_batch(
    limits: ReplayLimits,
    drafter: Drafter,
    target: TargetInfo,
    teacher_0X: Tensor,
    num_requests: int,
    num_anchors: int,
    draft_window: int | None,
    along_text: bool = False,
) -> SignalBatch:
    """So many anchors of so many requests, or what the limits leave of them, on the target's device.

    ``teacher_0X`` says width and type of a teacher row; no two of those in it are taken to be alike,
    but where paths run ``along_text`` those of neighbours behind the same token.
    """
    requests = max(1, min(num_requests, num_anchors))
    anchors = max(1, min(num_anchors // requests, limits.window - limits.path))
    shape = (requests, anchors, limits.path)
    table = target.embedding.weight
    width = len(drafter.signal.feature_layers) * target.hidden_size

    def blank(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(requests, *sizes, dtype=dtype, device=table.device)

    starts_R = blank()
    teacher_RNKX = blank(*shape[1:], teacher_0X.shape[-1], dtype=teacher_0X.dtype)
    weights_RNK = blank(*shape[1:], dtype=torch.float32) + 1
    rows = np.arange(weights_RNK.numel()).reshape(shape)
    if along_text:
        rows = rows[:, :1, :1] + np.arange(anchors)[:, None] + np.arange(limits.path)
    return SignalBatch(
        starts_R=starts_R,
        lengths_R=blank() + limits.window,
        tokens_RC1=blank(limits.window + 1),
        features_RCF=blank(limits.window, width, dtype=table.dtype) if width else None,
        anchors_RN=torch.arange(1, anchors + 1, device=table.device).expand(requests, -1),
        paths_RNK=blank(*shape[1:]),
        teacher_RNKX=teacher_RNKX,
        weights_RNK=weights_RNK,
        window=draft_window,
        temperatures=(1.0,) * requests,
        layout=Layout(
            (0,) * requests,
            np.ones(shape, np.float32),
            rows,
            of=(starts_R, weights_RNK, teacher_RNKX),
        ),
    )


def batch_of_update(config: Config, target: TargetInfo, drafter: Drafter) -> SignalBatch:
    """As many rows as an update has at most, of all requests that run, with nothing in them."""
    return _full_batch(
        config, target, drafter, config.adapt.replay.anchors, config.engine.max_batch
    )


def batches_of_update(
    config: Config, target: TargetInfo, drafter: Drafter, frames: Frames | None
) -> list[SignalBatch]:
    """One for each frame, which it fills, from the largest; without frames that of full size."""
    if frames is None:
        return [batch_of_update(config, target, drafter)]
    anchors, along = config.adapt.replay.anchors, frames.along_text
    batches = [
        _full_batch(config, target, drafter, anchors, requests, along) for requests in frames.sizes
    ]
    return [frames.fill(batch) for batch in batches]


def batch_of_look(config: Config, target: TargetInfo, drafter: Drafter) -> SignalBatch:
    """As many as the guard looks at, or an objective that chooses by trials."""
    guard = config.adapt.guard
    shadow = isinstance(guard, ShadowSettings)
    most = LOOKED_AT * guard.anchors if shadow else config.adapt.replay.anchors
    return _full_batch(config, target, drafter, most, config.engine.max_batch)


def _full_batch(
    config: Config,
    target: TargetInfo,
    drafter: Drafter,
    num_anchors: int,
    num_requests: int,
    along_text: bool = False,
) -> SignalBatch:
    limits = replay_limits(config, target, drafter)
    return full_batch(
        limits,
        drafter,
        target,
        no_teacher_rows(config, target, limits),
        num_requests,
        num_anchors,
        config.drafter_settings.window,
        along_text,
    )


def no_teacher_rows(config: Config, target: TargetInfo, limits: ReplayLimits) -> Tensor:
    """Of the width and the type in which they are kept ``[0, X]``."""
    hidden = config.adapt.replay.teacher == "hidden"
    dtype = target.embedding.weight.dtype if hidden else torch.float32
    width = limits.teacher_row_bytes // dtype.itemsize
    return torch.empty(0, width, dtype=dtype, device="meta")


def replay_limits(config: Config, target: TargetInfo, drafter: Drafter) -> ReplayLimits:
    """The replay buffer's bounds, with what a row of it takes.

    Where several adapters learn each has a buffer, and an equal part of what all of them may hold.

    Raises:
        ConfigError: they hold no request, or keep more of a teacher row than it has.
    """
    replay, memory = config.adapt.replay, config.adapt.memory
    num_buffers, where = config.num_adapters or 1, config.adapt_key
    if replay.teacher == "top_k" and replay.teacher_top_k > target.vocab_size:
        raise ConfigError(
            f"{where}.replay.teacher_top_k: {replay.teacher_top_k} is more than the "
            f"{target.vocab_size} tokens of the target's vocabulary"
        )
    hidden_bytes = target.hidden_size * target.embedding.weight.dtype.itemsize
    limits = ReplayLimits(
        window=replay.window,
        anchors=replay.anchors,
        path=drafter.num_draft_tokens,
        max_tokens=memory.max_tokens // num_buffers,
        max_bytes=memory.max_bytes // num_buffers,
        feature_row_bytes=hidden_bytes * len(drafter.signal.feature_layers),
        teacher_row_bytes={
            "hidden": hidden_bytes,
            "logits": target.vocab_size * torch.float32.itemsize,
            "top_k": record_width(replay.teacher_top_k) * torch.float32.itemsize,
        }[replay.teacher],
    )
    needed = limits.request_bytes(keep_blocks=config.loss_settings.rows != "delayed")
    each = f" for each of {num_buffers} adapters" if num_buffers > 1 else ""
    if needed > limits.max_bytes:
        raise ConfigError(
            f"{where}.memory.max_bytes: {memory.max_bytes} holds no request{each}; one of "
            f"{where}.replay.window = {replay.window} rows takes {needed}"
        )
    if replay.window > limits.max_tokens:
        raise ConfigError(
            f"{where}.memory.max_tokens: {memory.max_tokens} holds no request of "
            f"{where}.replay.window = {replay.window} rows{each}"
        )
    return limits
