"""The draft as it was before an update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from cosched.protocols import Drafter


class DraftBefore:
    """A second drafter that stays behind while the first one learns.

    It has a copy of what is trained, the head included where it is; what is frozen it shares. It is
    to be made before the optimizer takes hold of the first one's parameters.
    """

    def __init__(self, drafter: Drafter) -> None:
        network = drafter.network()
        assert network is not None
        self._learning: nn.Module = network
        self.drafter = drafter.clone(next(network.parameters()).dtype)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Be what the other one is now."""
        network = self.drafter.network()
        assert network is not None
        copies = dict(network.named_parameters())
        for name, parameter in self._learning.named_parameters():
            if parameter.requires_grad:
                copies[name].copy_(parameter)
            else:
                copies[name].data = parameter.data
