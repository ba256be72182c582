"""What AdamW remembers of each parameter, by names that a saved state can have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosched.errors import RunFolderError
from cosched.loop.learner_state import taken

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def owners_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the moments are of, in an order that does not depend on which had a gradient first."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def moments_of(
    tensors: Mapping[str, Tensor], owners: list[Tensor]
) -> list[tuple[Tensor, str, Tensor]]:
    """Of which owner, which of AdamW's entries, and what it is.

    Raises:
        RunFolderError: there are others, or of other shapes, than AdamW has for these owners.
    """
    scalar = torch.zeros(())
    entries = {
        f"optimizer.{number}.{entry}": (owner, entry, scalar if entry == "step" else owner)
        for number, owner in enumerate(owners)
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    found = [name for name in tensors if name.startswith("optimizer.")]
    if foreign := [name for name in found if name not in entries]:
        raise RunFolderError(f"the saved state has {foreign[0]}, and this optimizer has none such")
    return [(*entries[name][:2], taken(tensors, name, entries[name][2])) for name in found]
