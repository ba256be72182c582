"""Attention over a slot cache while serving, and of many anchors at once while learning.

Letters: B slots, L cache length, S rows of a slot or an anchor, R requests, C context rows,
N anchors, T own rows of an anchor, H key-value heads, J query heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_cache(
    queries_BSJD: Tensor, keys_BHLD: Tensor, values_BHLD: Tensor, visible_BSL: Tensor | None
) -> Tensor:
    """``[B, S, J, D]``: rows of each slot over its cache; None sees all of it."""
    attended = F.scaled_dot_product_attention(
        queries_BSJD.transpose(1, 2),
        keys_BHLD,
        values_BHLD,
        attn_mask=None if visible_BSL is None else visible_BSL[:, None],
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def attend_packed(
    queries_RNSJD: Tensor,
    keys_RCHD: Tensor,
    values_RCHD: Tensor,
    visible_RNSC: Tensor,
    own_keys_RNTHD: Tensor | None,
    own_values_RNTHD: Tensor | None,
    own_visible_ST: Tensor | None,
) -> Tensor:
    """``[R, N, S, J, D]``: rows of each anchor over the shared context and the anchor's own rows.

    ``own_visible_ST`` None lets every row see every own row.
    """
    num_anchors, num_rows = queries_RNSJD.shape[1:3]
    kv_heads, head_dim = keys_RCHD.shape[-2:]
    context = keys_RCHD.shape[1]
    # [R, H, G, N, S, D]: heads outside, so that both products are plain batched matrix products.
    queries = queries_RNSJD.unflatten(3, (kv_heads, -1)).permute(0, 3, 4, 1, 2, 5) * head_dim**-0.5
    groups = queries.shape[2]
    scores = queries.flatten(2, 4) @ keys_RCHD.permute(0, 2, 3, 1)
    scores = scores.unflatten(2, (groups, num_anchors, num_rows))
    scores = scores.masked_fill(~visible_RNSC[:, None, None], float("-inf"))
    if own_keys_RNTHD is not None:
        own = torch.einsum("rhgnsd,rnthd->rhgnst", queries, own_keys_RNTHD)
        if own_visible_ST is not None:
            own = own.masked_fill(~own_visible_ST, float("-inf"))
        scores = torch.cat((scores, own), -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(queries.dtype)
    attended = weights[..., :context].flatten(2, 4) @ values_RCHD.transpose(1, 2)
    attended = attended.unflatten(2, (groups, num_anchors, num_rows))
    if own_values_RNTHD is not None:
        attended = attended + torch.einsum(
            "rhgnst,rnthd->rhgnsd", weights[..., context:], own_values_RNTHD
        )
    return attended.permute(0, 3, 4, 1, 2, 5).flatten(3, 4)


def causal(rows: Tensor, places: Tensor, window: int | None) -> Tensor:
    """Which places each row sees: none behind itself, and as many as the window has."""
    visible = places <= rows[..., None]
    return visible & (places > rows[..., None] - window) if window else visible


def attend_context(
    queries_RCJD: Tensor, keys_RCHD: Tensor, values_RCHD: Tensor, visible_CC: Tensor | None
) -> Tensor:
    """Attention of the context over itself, ``[R, C, J, D]``; None is plain causality."""
    attended = F.scaled_dot_product_attention(
        queries_RCJD.transpose(1, 2),
        keys_RCHD.transpose(1, 2),
        values_RCHD.transpose(1, 2),
        attn_mask=visible_CC,
        is_causal=visible_CC is None,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def gather_rows(rows_RCX: Tensor, index_RN: Tensor) -> Tensor:
    """``[R, N, X]``: rows of each request by index."""
    index = index_RN[..., None].expand(-1, -1, rows_RCX.shape[-1])
    return rows_RCX.gather(1, index)
