"""A batch in shares: one for each rank, and for each rank several, where gradients are accumulated."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosched.records import Layout, SignalBatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Share(NamedTuple):
    """A part of a batch, and what its mean loss counts in the mean over all parts."""

    batch: SignalBatch
    weight: float = 1.0


def shares_of(batch: SignalBatch, steps: int, rank: int = 0, num_ranks: int = 1) -> list[Share]:
    """What a rank goes over in so many ``steps``, of which one at a time has activations in memory.

    Its anchors of each request, and in each step some of the requests; of fewer requests one in each.
    """
    mine = share_of(batch, rank, num_ranks) if num_ranks > 1 else Share(batch)
    number = min(steps, len(batch.lengths_R))
    if number == 1:
        return [mine]
    sums = _sums_of(mine.batch)
    bounds = [step * len(sums) // number for step in range(number + 1)]
    total = sum(sums)
    return [
        Share(
            _requests_of(mine.batch, slice(first, end)),
            mine.weight * number * sum(sums[first:end]) / total if total else 0.0,
        )
        for first, end in pairwise(bounds)
    ]


def _sums_of(batch: SignalBatch) -> list[float]:
    """The weight of each request."""
    if batch.known is not None:
        return batch.known.weights_RNK.sum((1, 2)).tolist()
    return batch.weights_RNK.sum((1, 2)).tolist()  # host waits for the device


def _requests_of(batch: SignalBatch, some: slice) -> SignalBatch:
    """Those alone, as they are."""
    tensors = ("starts_R", "lengths_R", "tokens_RC1", "features_RCF", "anchors_RN", "paths_RNK",
               "teacher_RNKX", "weights_RNK")  # fmt: skip
    whole = {name: getattr(batch, name) for name in tensors}
    cut: dict[str, Any] = {n: None if one is None else one[some] for n, one in whole.items()}
    if batch.temperatures is not None:
        cut["temperatures"] = batch.temperatures[some]
    part = replace(batch, **cut)
    if (known := batch.known) is None:
        return part
    of = part.starts_R, part.weights_RNK, part.teacher_RNKX
    starts, weights, says = known.starts[some], known.weights_RNK[some], known.says_RNK[some]
    return replace(part, layout=Layout(starts, weights, says, of))


def accumulate(
    loss_of: nn.Module, shares: Sequence[Share], trained: Mapping[str, nn.Parameter]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of the shares, and its gradient by each of the ``trained`` that has one."""
    values: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for share in shares:
        loss = loss_of(share.batch) * (share.weight / len(shares))
        values.append(loss.detach())
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, cast("Sequence[Tensor | None]", found), strict=True):
            if gradient is not None:
                before = gradients.get(name)
                gradients[name] = gradient if before is None else before + gradient
    return torch.stack(values).sum(), gradients


class KnownGradient(nn.Module):
    """A loss whose value and gradient are known already, for who wants to go back from it.

    It is v + sum(p * g) - sum(p * g), the last without a gradient: that of p is g, to the bit.
    """

    def __init__(self, network: nn.Module, trained: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self._trained = dict(trained)

    def forward(self, value: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        linear = torch.stack([(self._trained[n] * g).sum() for n, g in gradients.items()]).sum()
        return value + (linear - linear.detach())


def share_of(batch: SignalBatch, index: int, number: int) -> Share:
    """Every ``number``-th anchor of each request, so that all shares are of one size.

    A missing one repeats the first, with weight zero. Exact where all rows of a path weigh the same; a
    loss that weighs rows by what is in them (``adapt.loss``) does so within each share.
    """
    missing = -batch.anchors_RN.shape[1] % number
    weights = F.pad(batch.weights_RNK, (0, 0, 0, missing))
    mine, known = slice(index, None, number), batch.known

    def cut(tensor: Tensor) -> Tensor:
        first = tensor[:, :1].expand(-1, missing, *tensor.shape[2:])
        return torch.cat((tensor, first), 1)[:, mine]

    share = replace(
        batch,
        anchors_RN=cut(batch.anchors_RN),
        paths_RNK=cut(batch.paths_RNK),
        teacher_RNKX=cut(batch.teacher_RNKX),
        weights_RNK=weights[:, mine],
    )
    if known is None:
        sums = torch.stack((weights.sum(), share.weights_RNK.sum()))
        total, own = sums.tolist()  # host waits for the device
    else:
        layout = _share_of_layout(known, share, missing, mine)
        total, own = float(known.weights_RNK.sum()), float(layout.weights_RNK.sum())
        share = replace(share, layout=layout)
    return Share(share, number * own / total if total else 1.0)


def _share_of_layout(whole: Layout, share: SignalBatch, missing: int, mine: slice) -> Layout:
    more = (0, 0), (0, missing), (0, 0)
    weights = np.pad(whole.weights_RNK, more)
    says = np.concatenate((whole.says_RNK, whole.says_RNK[:, :1].repeat(missing, 1)), 1)
    return Layout(
        whole.starts,
        weights[:, mine],
        says[:, mine],
        of=(share.starts_R, share.weights_RNK, share.teacher_RNKX),
    )
