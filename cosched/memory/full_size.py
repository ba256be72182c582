"""A batch as large as training ever has it, with nothing in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cosched.records import Layout, SignalBatch

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.loop.replay import ReplayLimits
    from cosched.protocols import Drafter, TargetInfo


def full_batch(
    limits: ReplayLimits,
    drafter: Drafter,
    target: TargetInfo,
    teacher_0X: Tensor,
    num_requests: int,
    num_anchors: int,
    draft_window: int | None,
) -> SignalBatch:
    """So many anchors of so many requests, or what the limits leave of them, on the target's device.

    ``teacher_0X`` says width and type of a teacher row; no two of those in it are taken to be alike.
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
        layout=Layout(
            (0,) * requests,
            np.ones(shape, np.float32),
            rows,
            of=(starts_R, weights_RNK, teacher_RNKX),
        ),
    )
