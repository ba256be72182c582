"""The comparison can tell: mistakes that implementers make move the logits past any tolerance.

One mistake is out of reach: a constant offset of all positions, which rotary embeddings do not see.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import drafters.dflash.drafter as dflash_drafter
import drafters.eagle3.chain as eagle3_chain
from cosched.engines.embedded.target import Target
from drafters.attention import attend_packed
from drafters.eagle3.network import Eagle3Network
from drafters.layers import Rotary
from tests.parity import specforge_peer
from tests.parity.world import STEPS, make_batch, make_dflash, make_eagle3, relative_error

PLAIN = 1e-2  # two thousand times the tolerance

Patch = pytest.MonkeyPatch


def swapped_norms(network: Eagle3Network, patch: Patch) -> None:
    layer = network.midlayer
    layer.input_layernorm, layer.hidden_norm = layer.hidden_norm, layer.input_layernorm


def state_before_embedding(network: Eagle3Network, patch: Patch) -> None:
    def inputs(embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows, residual = Eagle3Network.inputs(network, embedded, hidden)
        return torch.cat(rows.chunk(2, -1)[::-1], -1), residual

    patch.setattr(network, "inputs", inputs)


def with_config(network: Any, **changes: Any) -> None:
    network.config = msgspec.structs.replace(network.config, **changes)


def normed_residual(network: Eagle3Network, patch: Patch) -> None:
    with_config(network, norm_before_residual=True)


def normed_state_fed_back(network: Eagle3Network, patch: Patch) -> None:
    with_config(network, norm_output=True)


def interleaved_rotation(network: Any, patch: Patch) -> None:
    def forward(self: Rotary, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.table_TD[positions].unsqueeze(-2).chunk(2, -1)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    patch.setattr(Rotary, "forward", forward)


def position_stands_still(network: Eagle3Network, patch: Patch) -> None:
    first: list[Tensor] = []

    def queries(inputs: Tensor, positions: Tensor, layer: int) -> Tensor:
        first.append(positions)
        return Eagle3Network.queries(network, inputs, positions, layer)

    def project(inputs: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return Eagle3Network.project(network, inputs, first[0] if first else positions, layer)

    patch.setattr(network, "queries", queries)
    patch.setattr(network, "project", project)


def drafted_rows_of_other_anchors(network: Eagle3Network, patch: Patch) -> None:
    """Keys of later steps are visible causally, to all rows behind, not only to their own."""

    def attend(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        own_keys: Tensor | None,
        own_values: Tensor | None,
        own_visible: None,
    ) -> Tensor:
        if own_keys is not None and own_values is not None:
            num_anchors, steps = own_keys.shape[1:3]
            earlier = torch.ones(num_anchors, num_anchors, dtype=torch.bool).tril()
            earlier = earlier.repeat_interleave(steps, 1)[:, None].expand(len(keys), -1, -1, -1)
            keys = torch.cat((keys, own_keys.flatten(1, 2)), 1)
            values = torch.cat((values, own_values.flatten(1, 2)), 1)
            visible = torch.cat((visible, earlier), -1)
        return attend_packed(queries, keys, values, visible, None, None, None)

    patch.setattr(eagle3_chain, "attend_packed", attend)


def causal_block(network: Any, patch: Patch) -> None:
    def attend(*arguments: Any) -> Tensor:
        *rows, own_visible = arguments
        assert own_visible is None
        size = STEPS + 1
        return attend_packed(*rows, torch.ones(size, size, dtype=torch.bool).tril())

    patch.setattr(dflash_drafter, "attend_packed", attend)


@pytest.mark.parametrize(
    "mistake",
    [
        swapped_norms,
        state_before_embedding,
        normed_residual,
        interleaved_rotation,
        position_stands_still,
        normed_state_fed_back,
        drafted_rows_of_other_anchors,
    ],
)
def test_eagle3(
    target: Target,
    target_folder: Path,
    tmp_path: Path,
    mistake: Callable[[Any, Patch], None],
    monkeypatch: Patch,
) -> None:
    """A head with the mistake draws logits that no tolerance hides."""
    drafter = make_eagle3(target, tmp_path, "specforge")
    model = specforge_peer.load_eagle3(tmp_path, target_folder)
    batch = make_batch(target, drafter)
    mistake(drafter.network(), monkeypatch)
    theirs = specforge_peer.eagle3_logits(model, batch, STEPS)
    assert relative_error(drafter.replay(batch), theirs) > PLAIN


@pytest.mark.parametrize("mistake", [causal_block, interleaved_rotation])
def test_dflash(
    target: Target, tmp_path: Path, mistake: Callable[[Any, Patch], None], monkeypatch: Patch
) -> None:
    """A block drafter with the mistake draws logits that no tolerance hides."""
    drafter = make_dflash(target, tmp_path, "specforge")
    model = specforge_peer.load_dflash(tmp_path)
    batch = make_batch(target, drafter)
    mistake(drafter.network(), monkeypatch)
    theirs = specforge_peer.dflash_logits(model, batch, target)
    assert relative_error(drafter.replay(batch), theirs) > PLAIN
