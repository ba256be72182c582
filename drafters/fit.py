"""Whether a draft fits its target, where it lives, and which of its parameters may be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.errors import CheckpointError
from cosched.records import Scope

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from cosched.protocols import TargetInfo


def check_fit(directory: Path, **sizes: tuple[int, int]) -> None:
    """Compare what the draft has with what the target has, by name.

    Raises:
        CheckpointError: they differ.
    """
    for key, (ours, theirs) in sizes.items():
        if ours != theirs:
            raise CheckpointError(
                f"the draft {directory} has {key} {ours}, the target has {theirs}: "
                f"this draft was trained for another target"
            )


def place(network: nn.Module, target: TargetInfo) -> None:
    """Onto the target's device and type, not to be trained where it serves."""
    weight = target.embedding.weight
    network.to(device=weight.device, dtype=weight.dtype).requires_grad_(False)


def scopes_of(network: nn.Module, cache_writers: tuple[str, ...]) -> Mapping[str, Scope]:
    """``full``, ``body`` (all but the head) and ``tail`` (nothing that committed keys are made of).

    ``cache_writers`` are beginnings of the names that committed keys and values depend on.
    """
    names = [name for name, _ in network.named_parameters()]
    tail = [name for name in names if not name.startswith(cache_writers)]
    return {
        "full": Scope(tuple(names), keeps_cache=False),
        "body": Scope(tuple(n for n in names if "lm_head." not in n), keeps_cache=False),
        "tail": Scope(tuple(tail), keeps_cache=True),
    }
