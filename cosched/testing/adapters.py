"""What a drafter owes that serves requests with adapters of their own in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from cosched.protocols import ServesAdapters
from cosched.testing.specimen import Feeder, Specimen, close, make_texts, needs_network
from cosched.training.lora import find_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class AdapterContract:
    """Part of ``DrafterContract``, skipped where one draft serves all."""

    def test_new_adapters_leave_the_draft_as_it_is(self, specimen: Specimen) -> None:
        """B is zero: the same logits to the bit, and the checkpoint has nothing more in it."""
        drafter, served = _adapted(specimen)
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        feeder = Feeder(drafter, texts)
        drafter.use_adapter(feeder.state, 1, 1)
        for down, up in served[1].values():
            down.normal_()
            assert not up.any()
        plain = specimen.make()
        assert torch.equal(feeder.run(6), Feeder(plain, texts).run(6))
        assert drafter.network().state_dict().keys() == plain.network().state_dict().keys()

    def test_adapters_in_a_batch_draft_as_each_alone(self, specimen: Specimen) -> None:
        """Each request as if its adapter were merged into a draft of its own.

        In prompts and rounds of unequal length, and after it has moved to another slot.
        """
        drafter, served = _adapted(specimen)
        generator = torch.Generator().manual_seed(7)
        for tensors in served:
            for tensor in (tensor for pair in tensors.values() for tensor in pair):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        texts, users = make_texts(specimen.target, drafter, count=3, length=64), [2, 0, 2]
        together = Feeder(drafter, texts)
        for slot, adapter in enumerate(users):
            drafter.use_adapter(together.state, slot, adapter)
        found = together.run(6)
        for slot, adapter in enumerate(users):
            alone = Feeder(drafter.alone(adapter), texts[slot : slot + 1], first=slot)
            assert close(found[:, slot : slot + 1], alone.run(6))
        other = Feeder(drafter.alone(1), texts[:1])
        assert not close(found[:, :1], other.run(6))  # they do differ
        together.move(2, 1)
        together.observe([length + 2 for length in together.lengths])
        again = Feeder(drafter.alone(2), texts[2:])
        again.observe(together.lengths[1:])
        assert close(together.propose()[1:], again.propose())


def _adapted(specimen: Specimen) -> tuple[Any, Sequence[Mapping[str, tuple[Tensor, Tensor]]]]:
    """A drafter with three adapters on all of its linear layers."""
    needs_network(specimen)
    drafter = specimen.make()
    layers = find_layers(drafter.network(), None)
    if not isinstance(drafter, ServesAdapters):
        pytest.skip(f"{specimen.plugin.name} serves one draft to all")
    return drafter, drafter.adapt(layers, count=3, rank=4, scale=2.0)
