"""Several adapters beside one another on one network: each row goes through that of its request.

Letters: N adapters, B runs of rows, M rows of a run, X inputs and Y outputs of a layer, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(slots=True)
class Runs:
    """Which rows the network is given next: adapter and number of rows, one run after another.

    Rows are counted in the first dimension of a layer's input.
    """

    runs: list[tuple[int, int]]
    index_B: Tensor | None = None  # adapters of runs that are all of one length

    def set(self, adapters: Sequence[int], counts: Sequence[int] | None, like: Tensor) -> None:
        """The next inputs have ``counts[i]`` rows of ``adapters[i]``; None is one of each."""
        pairs = zip(adapters, counts or [1] * len(adapters), strict=True)
        whole = groupby((pair for pair in pairs if pair[1]), itemgetter(0))
        self.runs = [(adapter, sum(count for _, count in run)) for adapter, run in whole]
        self.index_B = None
        if len(self.runs) > 1 and len({count for _, count in self.runs}) == 1:
            self.index_B = torch.tensor([adapter for adapter, _ in self.runs], device=like.device)


class AdaptedLinear(nn.Linear):
    """``W x + scale B_i A_i x``, i the adapter of the row's request.

    Weight and bias are those of the layer whose place it takes; A and B are no parameters of the
    network, and are not saved with it.
    """

    def __init__(self, layer: nn.Linear, count: int, rank: int, scale: float, runs: Runs) -> None:
        super().__init__(layer.in_features, layer.out_features, _has_bias(layer), device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.down_NrX: Tensor
        self.up_NYr: Tensor
        down = layer.weight.new_zeros(count, rank, layer.in_features)
        up = layer.weight.new_zeros(count, layer.out_features, rank)
        self.register_buffer("down_NrX", down, persistent=False)
        self.register_buffer("up_NYr", up, persistent=False)
        self.scale = scale
        self._runs = runs

    def forward(self, input: Tensor) -> Tensor:
        plain, runs = super().forward(input), self._runs
        assert sum(count for _, count in runs.runs) == len(input), "rows without an adapter"
        if runs.index_B is not None:  # all in one batched product
            num_runs = len(runs.runs)
            inner = input.reshape(num_runs, -1, input.shape[-1]) @ self.down_NrX[runs.index_B].mT
            whole = plain.reshape(num_runs, -1, plain.shape[-1])
            return whole.baddbmm(inner, self.up_NYr[runs.index_B].mT, alpha=self.scale).view_as(
                plain
            )
        counts = [count for _, count in runs.runs]
        adapted = [
            self._add(rows, x, adapter)
            for rows, x, (adapter, _) in zip(
                plain.split(counts), input.split(counts), runs.runs, strict=True
            )
        ]
        return adapted[0] if len(adapted) == 1 else torch.cat(adapted)

    def _add(self, plain: Tensor, x: Tensor, adapter: int) -> Tensor:
        """What one adapter adds to rows of its own."""
        inner = x.flatten(0, -2) @ self.down_NrX[adapter].mT
        rows = plain.flatten(0, -2).addmm(inner, self.up_NYr[adapter].mT, alpha=self.scale)
        return rows.view_as(plain)

    def alone(self, adapter: int) -> nn.Linear:
        """A plain layer with that adapter merged into its weight."""
        layer = nn.Linear(self.in_features, self.out_features, _has_bias(self), device="meta")
        delta = self.scale * (self.up_NYr[adapter] @ self.down_NrX[adapter])
        layer.weight = nn.Parameter(self.weight.detach() + delta, requires_grad=False)
        layer.bias = self.bias
        return layer


def _has_bias(layer: nn.Linear) -> bool:
    return "bias" in dict(layer.named_parameters())


def adapt(
    network: nn.Module, layers: Sequence[str], count: int, rank: int, scale: float
) -> tuple[Runs, list[Mapping[str, tuple[Tensor, Tensor]]]]:
    """Put ``count`` adapters, all zero, on linear layers of a network.

    Returns:
        Where to say which rows come, and of each adapter A and B of every layer, as they serve.
    """
    runs = Runs([])
    for name in layers:
        layer = cast("nn.Linear", network.get_submodule(name))
        network.set_submodule(name, AdaptedLinear(layer, count, rank, scale, runs))
    adapted = dict(_adapted(network))
    return runs, [
        {name: (layer.down_NrX[i], layer.up_NYr[i]) for name, layer in adapted.items()}
        for i in range(count)
    ]


def merge(network: nn.Module, adapter: int) -> None:
    """Leave of all adapters one, merged into the weights."""
    for name, layer in list(_adapted(network)):
        network.set_submodule(name, layer.alone(adapter))


def _adapted(network: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    for name, module in network.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module
