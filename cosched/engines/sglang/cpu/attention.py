"""The ``torch_native`` attention backend with the forward passes of speculative decoding.

Stock ``torch_native`` knows a prefill and a decoding step of one token. Verification (N nodes a
request, their keys after the committed ones), the draft's catching up (DRAFT_EXTEND_V2) and its
steps (K branches a request) differ in nothing but which rows of the cache a query sees. So a
forward pass is described as one ``View`` a sequence, and attention is one product each.

Letters: R requests, L rows of the cache that a sequence sees, Q queries, J query heads,
H key-value heads, W head width, N nodes of a tree.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from cosched.engines.sglang.cpu import compat

if TYPE_CHECKING:
    from torch import Tensor


class View(NamedTuple):
    """What the queries of one sequence see."""

    rows_L: Tensor  # of the cache, in the order of positions; the queries' own come last
    num_queries: int
    tree_QQ: Tensor | None  # which of the last Q rows each query sees; None: itself and earlier


class NativeBackend(compat.TorchNativeAttnBackend):
    """Attention of one model, target or draft."""

    views: list[View]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        mode, spec = forward_batch.forward_mode, forward_batch.spec_info
        num_requests = len(forward_batch.req_pool_indices)
        lengths = forward_batch.seq_lens.tolist()
        trees: Any = [None] * num_requests
        if mode.is_target_verify():
            num_nodes = spec.draft_token_num
            lengths = [length + num_nodes for length in lengths]  # the nodes are not counted yet
            num_queries = [num_nodes] * num_requests
            # DFLASH verifies a chain too, and its record has no `tree_topk`.
            if getattr(spec, "tree_topk", 1) != 1:
                size = num_requests * num_nodes * num_nodes
                trees = spec.custom_mask[:size].view(num_requests, num_nodes, num_nodes).bool()
        elif mode.is_decode_or_idle():
            num_queries = [1] * num_requests
        else:
            num_queries = forward_batch.extend_seq_lens.tolist()
        table = self.req_to_token_pool.req_to_token
        lines = forward_batch.req_pool_indices.tolist()
        self.views = [
            View(table[line, :length].long(), queries, tree)
            for line, length, queries, tree in zip(lines, lengths, num_queries, trees, strict=True)
        ]

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        if layer.is_cross_attention:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        """Store keys and values of the new rows, then attend: ``[Q, J * W]``."""
        if save_kv_cache and k is not None:
            to = compat.KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, to, k, v)
        keys_LHW = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values_LHW = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        queries_QJW = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        attended_QJW = q.new_empty(len(queries_QJW), layer.tp_q_head_num, layer.v_head_dim)
        at = 0
        for view in self.views:
            mine = slice(at, at + view.num_queries)
            at += view.num_queries
            if view.num_queries:
                attended_JQW = scaled_dot_product_attention(
                    queries_QJW[mine].transpose(0, 1)[None],
                    keys_LHW[view.rows_L].to(q.dtype).transpose(0, 1)[None],
                    values_LHW[view.rows_L].to(q.dtype).transpose(0, 1)[None],
                    attn_mask=_visible(view, layer),
                    scale=layer.scaling,
                    enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
                )[0]
                attended_QJW[mine] = attended_JQW.transpose(0, 1)
        return attended_QJW.flatten(1)


def _visible(view: View, layer: Any) -> Tensor:
    """``[Q, L]``: which rows each query sees, by causality, tree and the layer's window."""
    num_queries, num_rows = view.num_queries, len(view.rows_L)
    before = num_rows - num_queries
    visible_QL = torch.ones(num_queries, num_rows, dtype=torch.bool)
    if layer.attn_type.name == "DECODER":
        visible_QL = visible_QL.tril(before)
    if view.tree_QQ is not None:
        visible_QL[:, before:] = view.tree_QQ
    window = layer.sliding_window_size
    if window is not None and window > -1:  # how many rows before its own a query sees
        visible_QL &= torch.ones_like(visible_QL).triu(before - window)
    return visible_QL


class DraftStepsBackend:
    """Attention of the draft's steps: one backend a step, as SGLang's workers expect.

    At step ``d`` a branch sees the committed rows and its own ``d + 1`` drafted ones. SGLang lays
    a request's drafted rows out branch by branch, right after the committed ones.
    """

    def __init__(self, runner: Any, topk: int, num_steps: int) -> None:
        self.topk = topk
        self.num_steps = num_steps
        self.attn_backends = [NativeBackend(runner) for _ in range(num_steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        table = self.attn_backends[0].req_to_token_pool.req_to_token
        lines = forward_batch.req_pool_indices.tolist()
        lengths = forward_batch.seq_lens.tolist()
        for step, backend in enumerate(self.attn_backends):
            backend.swa_out_cache_loc = None
            backend.views = []
            for line, length in zip(lines, lengths, strict=True):
                for branch in range(self.topk):
                    first = length + branch * self.num_steps
                    drafted = table[line, first : first + step + 1]
                    rows = torch.cat([table[line, :length], drafted]).long()
                    backend.views.append(View(rows, 1, None))
