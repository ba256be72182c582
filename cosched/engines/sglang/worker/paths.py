"""The path of each request through the tree that was verified for it.

Letters: B requests, N rows of a tree, its root the anchor, S rows of the longest path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NONE = -1  # in SGLang's tables: no such row


@dataclass(frozen=True, slots=True)
class Paths:
    """``rows_BS`` among the rows of all trees; ``lengths()`` gives how many drafted tokens are on each.

    The root comes first, then what was accepted and, as in a chain, the first choices behind it, as far
    as the tree has some. Behind its length a path stays at its last row.
    """

    rows_BS: Tensor
    lengths: Callable[[], list[int]]


def accepted_paths(accepted_BS: Tensor, children_BN: Tensor) -> Paths:
    """Follow what SGLang accepted (``accept_index``), and behind it the first children.

    ``accepted_BS`` has rows among those of all trees, ``children_BN`` (``retrieve_next_token``) each
    row's first child within its own tree. Nothing waits for the device.
    """
    num_trees, num_rows = children_BN.shape
    first_B = torch.arange(num_trees, device=children_BN.device) * num_rows
    row_B = torch.zeros_like(first_B)
    length_B = torch.zeros_like(first_B)
    goes_on_B = torch.ones_like(first_B, dtype=torch.bool)
    rows = [first_B]
    for place in range(1, accepted_BS.shape[1]):
        taken_B = accepted_BS[:, place].long()
        child_B = children_BN.long().gather(1, row_B[:, None])[:, 0]
        next_B = torch.where(taken_B == NONE, child_B, taken_B - first_B)
        goes_on_B = goes_on_B & (next_B != NONE)
        row_B = torch.where(goes_on_B, next_B, row_B)
        length_B = length_B + goes_on_B
        rows.append(first_B + row_B)
    return Paths(torch.stack(rows, 1), on_host(length_B))


def on_host(numbers_B: Tensor) -> Callable[[], list[int]]:
    """Small numbers of the device, copied on their way: to be asked for once the device has passed here."""
    if not numbers_B.is_cuda:
        return numbers_B.tolist
    copy_B = torch.empty(numbers_B.shape, dtype=numbers_B.dtype, pin_memory=True)
    copy_B.copy_(numbers_B, non_blocking=True)
    return copy_B.tolist
