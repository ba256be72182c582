"""Attention of grouped query heads without a copy of their keys and values.

transformers repeats the keys and values for every query head of a group where there is a mask, the
whole visible cache in every layer and step. Heads of one group see the same keys, so they can as
well be further rows of one head: the same products, nothing copied.

Letters: B requests, J query heads, H key-value heads, G = J / H, T rows, L visible positions,
D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cosched.engines.embedded.ragged import RAGGED

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "cosched_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """``query [B, J, T, D]`` over ``key`` and ``value [B, H, L, D]`` to ``[B, T, J, D]``.

    ``attention_mask [B, 1, T, L]`` says which positions each row sees. The engine always gives one;
    without it, in the model's own forward pass over a whole text, this is transformers' ``sdpa``. Rows
    that are packed (``RAGGED``) come and go as ``[1, J, N, D]`` and ``[1, N, J, D]``.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **others)
    if (ragged := RAGGED.get()) is not None:
        query = ragged.spread(query.transpose(1, 2)).transpose(1, 2)
    kv_heads, num_rows = key.shape[1], query.shape[2]
    groups = query.shape[1] // kv_heads
    rows_BHRD = query.unflatten(1, (kv_heads, groups)).flatten(2, 3)
    mask = attention_mask if groups == 1 else attention_mask.repeat(1, 1, groups, 1)
    attended = F.scaled_dot_product_attention(rows_BHRD, key, value, attn_mask=mask, scale=scaling)
    attended = attended.unflatten(2, (groups, num_rows)).flatten(1, 2)
    attended = attended.transpose(1, 2)
    return (attended.contiguous() if ragged is None else ragged.pack(attended)), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
