"""What SGLang imports from ``sgl_kernel`` on a CPU, in plain PyTorch.

All write into tensors that the caller allocated, as the compiled ones do; names and order of the
parameters are SGLang's. The *pool* is SGLang's table ``req_to_token``: one line a request slot,
one column a position, each entry the row of the key-value cache that holds this position.

``torch.ops.sgl_kernel`` stays empty on purpose: an operator in it would tell SGLang that compiled
kernels are there (``cpu_has_amx_support``), and its layers would leave their PyTorch code.

Letters: R requests, P lines of the pool, L positions of a line, K branches of a tree (topk),
D steps of a draft, N nodes of a tree (its root, the last committed token, included),
S nodes on the longest path, E entries.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

ROOT = 0
NONE = -1
FULL_MASK, QLEN_ONLY = 0, 1  # TreeMaskMode; bit-packed masks are for GPU kernels only


# ------------------------------------------------------------------------- rows of the cache


def _spans(
    req_pool_indices_R: Tensor, req_to_token_PL: Tensor, start_R: Tensor, end_R: Tensor
) -> Iterator[Tensor]:
    """Views of the pool: of every request its entries ``start`` to ``end``."""
    ranges = zip(req_pool_indices_R.tolist(), start_R.tolist(), end_R.tolist(), strict=True)
    for line, start, end in ranges:
        yield req_to_token_PL[line, start:end]


def assign_req_to_token_pool_cpu(
    req_pool_indices_R: Tensor,
    req_to_token_PL: Tensor,
    start_offset_R: Tensor,
    end_offset_R: Tensor,
    out_cache_loc_E: Tensor,
    pool_len: int,  # noqa: ARG001
) -> None:
    """Write new cache rows into the pool: those of the first request first, and so on.

    Changes ``req_to_token`` at the positions ``start_offset`` to ``end_offset`` of every request.
    Stands for the Triton kernel ``assign_req_to_token_pool`` (``srt/mem_cache/allocation.py``).
    """
    at = 0
    for span in _spans(req_pool_indices_R, req_to_token_PL, start_offset_R, end_offset_R):
        span.copy_(out_cache_loc_E[at : at + len(span)])
        at += len(span)


def assign_extend_cache_locs_cpu(
    req_pool_indices_R: Tensor,
    req_to_token_PL: Tensor,
    start_offset_R: Tensor,
    end_offset_R: Tensor,
    out_cache_loc_E: Tensor,
    pool_len: int,  # noqa: ARG001
) -> None:
    """Read cache rows of the positions ``start_offset`` to ``end_offset``, requests end to end.

    Changes the head of ``out_cache_loc``; what is longer than the sum of the spans stays.
    Stands for ``assign_extend_cache_locs`` (``kernels/ops/speculative/cache_locs.py``).
    """
    at = 0
    for span in _spans(req_pool_indices_R, req_to_token_PL, start_offset_R, end_offset_R):
        out_cache_loc_E[at : at + len(span)].copy_(span)
        at += len(span)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices_R: Tensor,
    req_to_token_PL: Tensor,
    seq_lens_R: Tensor,
    out_cache_loc_E: Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Read the ``topk * num_steps`` cache rows after every request's committed text.

    Stands for ``assign_draft_cache_locs_contiguous`` (``kernels/ops/speculative/cache_locs.py``).
    """
    assign_extend_cache_locs_cpu(
        req_pool_indices_R,
        req_to_token_PL,
        seq_lens_R,
        seq_lens_R + topk * num_steps,
        out_cache_loc_E,
        pool_len,
    )


def copy_all_layer_kv_cache_cpu(
    data_ptrs_E: Tensor, strides_E: Tensor, tgt_loc: Tensor, src_loc: Tensor
) -> None:
    """Copy rows of every cache tensor, as if all were read before any is written.

    Args:
        data_ptrs_E: the address of every layer's keys and of every layer's values.
        strides_E: the bytes of one row of each.
        tgt_loc: rows to write, none twice.
        src_loc: as many rows to read.

    Stands for ``copy_all_layer_kv_cache_tiled`` (``kernels/ops/kvcache/cache_move.py``).
    """
    if len(tgt_loc) == 0:
        return
    num_rows = int(torch.maximum(tgt_loc.max(), src_loc.max())) + 1
    for address, num_bytes in zip(data_ptrs_E.tolist(), strides_E.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (num_rows * num_bytes)).from_address(address)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(num_rows, num_bytes)
        rows[tgt_loc.long()] = rows[src_loc.long()]  # the right side is a copy


# ------------------------------------------------------------------------------- draft trees


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len_R: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index_RN: Tensor,
    retrieve_next_token_RN: Tensor,
    retrieve_next_sibling_RN: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Arrange the drafted tokens of every request as a tree.

    A draft proposes ``topk`` tokens for each of its live branches, step after step; a proposal's
    number ``s`` counts through them in this order, so ``s // topk`` is the number of the branch
    that it extends. The best N - 1 proposals are the nodes 1 to N - 1; node 0 is the root.

    Args:
        parent_list: ``[R, .]``, by number of a branch the number of the proposal that it is (-1
            for the root's).
        selected_index: ``[R, N - 1]``, the numbers of the chosen proposals, ascending.
        verified_seq_len_R: committed tokens, which is also the root's position.
        tree_mask: out, flat booleans, requests end to end: of every node whether it sees a column.
            Columns are the nodes (``QLEN_ONLY``) or the committed tokens and then the nodes
            (``FULL_MASK``; the caller fills the committed ones).
        positions: out, ``[R * N]``, the root's position plus the node's depth.
        retrieve_index_RN: out, the node's row among all requests' nodes.
        retrieve_next_token_RN: out, the node's first child or -1.
        retrieve_next_sibling_RN: out, the next child of the node's parent or -1.
        topk: K.
        depth: D; no path is longer.
        draft_token_num: N.
        tree_mask_mode: ``FULL_MASK`` or ``QLEN_ONLY``.

    Stands for ``sgl_build_tree_kernel_efficient_triton`` (``kernels/ops/speculative/spec_tree.py``).
    """
    assert tree_mask_mode in (FULL_MASK, QLEN_ONLY), f"no mask of kind {tree_mask_mode} on a CPU"
    num_nodes, num_requests = draft_token_num, len(verified_seq_len_R)
    branches = parent_list.reshape(num_requests, -1).tolist()
    chosen = selected_index.reshape(num_requests, -1).tolist()
    mask_at = 0
    for request, num_committed in enumerate(verified_seq_len_R.tolist()):
        parents = _parents(branches[request], chosen[request], topk, num_nodes)
        visible_NN, depths = _ancestry(parents, depth)
        width = num_nodes + (num_committed if tree_mask_mode == FULL_MASK else 0)
        rows = tree_mask[mask_at : mask_at + num_nodes * width].view(num_nodes, width)
        rows[:, width - num_nodes :] = visible_NN
        mask_at += num_nodes * width

        first = request * num_nodes
        positions[first : first + num_nodes] = num_committed + torch.tensor(depths)
        retrieve_index_RN[request] = torch.arange(first, first + num_nodes)
        children, siblings = _links(parents)
        retrieve_next_token_RN[request] = torch.tensor(children)
        retrieve_next_sibling_RN[request] = torch.tensor(siblings)


def _parents(branches: list[int], chosen: list[int], topk: int, num_nodes: int) -> list[int]:
    """The parent of every node; -1 for the root, and for a node whose parent was not chosen."""
    node_of = {number: node for node, number in reversed(list(enumerate(chosen, start=1)))}
    parents = [NONE]
    for number in chosen[: num_nodes - 1]:
        branch = number // topk
        parents.append(ROOT if branch == 0 else node_of.get(branches[branch], NONE))
    return parents


def _ancestry(parents: list[int], depth: int) -> tuple[Tensor, list[int]]:
    """Of every node what it sees, ``[N, N]``: the root, its ancestors and itself; and its depth."""
    visible_NN = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    visible_NN[:, ROOT] = True
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        at = node
        while at > ROOT and depths[node] < depth:
            visible_NN[node, at] = True
            depths[node] += 1
            at = parents[at]
    return visible_NN, depths


def _links(parents: list[int]) -> tuple[list[int], list[int]]:
    """First child and next sibling of every node; children in the order of their numbers."""
    children, siblings = [NONE] * len(parents), [NONE] * len(parents)
    for node in range(len(parents) - 1, ROOT, -1):
        parent = parents[node]
        if parent != NONE:
            siblings[node], children[parent] = children[parent], node
    return children, siblings


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len_R: Tensor,
    positions: Tensor,
    retrieve_index_RN: Tensor,
    retrieve_next_token_RN: Tensor,
    retrieve_next_sibling_RN: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Read back from a ``QLEN_ONLY`` mask what ``build_tree_kernel_efficient_cpu`` writes beside it.

    A node's parent is the last earlier node that it sees. For NGRAM, whose trees come as masks
    (``srt/speculative/ngram_worker.py``; SGLang has no Triton kernel for it).
    """
    mask_RNN = tree_mask.view(batch_size, draft_token_num, draft_token_num).bool()
    for request, visible_NN in enumerate(mask_RNN):
        parents = [
            max((int(p) for p in visible_NN[node, :node].nonzero()), default=NONE)
            for node in range(draft_token_num)
        ]
        first = request * draft_token_num
        depths_N = visible_NN.sum(dim=1) - 1
        positions[first : first + draft_token_num] = verified_seq_len_R[request] + depths_N
        retrieve_index_RN[request] = torch.arange(first, first + draft_token_num)
        children, siblings = _links(parents)
        retrieve_next_token_RN[request] = torch.tensor(children)
        retrieve_next_sibling_RN[request] = torch.tensor(siblings)


# ------------------------------------------------------------------------------ verification


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Walk every tree from its root along the children that the target would have chosen.

    The call site passes all of them by name, hence SGLang's spelling and no letters.

    Args:
        predicts: out, ``[R * N]``, at every node of the path the target's next token.
        accept_index: out, ``[R, S]``, rows of the nodes on the path, root first; the rest stays.
        accept_token_num: out, ``[R]``, nodes on the path, the root not counted.
        candidates: ``[R, N]``, the nodes' tokens.
        retrive_index: ``[R, N]``, the nodes' rows.
        retrive_next_token: ``[R, N]``, first child or -1.
        retrive_next_sibling: ``[R, N]``, next sibling or -1.
        target_predict: ``[R, N]``, the target's next token after every node.

    Stands for ``verify_tree_greedy_kernel_triton`` (``kernels/ops/speculative/spec_tree.py``).
    """
    tokens, rows = candidates.tolist(), retrive_index.tolist()
    children, siblings = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    wanted = target_predict.reshape(-1).tolist()
    for request in range(len(tokens)):
        node, path = ROOT, [rows[request][ROOT]]
        while len(path) < accept_index.shape[1]:
            node = children[request][node]
            while node != NONE and tokens[request][node] != wanted[path[-1]]:
                node = siblings[request][node]
            if node == NONE:
                break
            path.append(rows[request][node])
        for row in path:
            predicts[row] = wanted[row]
        accept_index[request, : len(path)] = torch.tensor(path)
        accept_token_num[request] = len(path) - 1


def fill_bonus_tokens_cpu(
    accept_tokens: Tensor, accept_lens_R: Tensor, bonus_tokens_R: Tensor, accept_stride: int
) -> None:
    """Pick every request's last accepted token, the root of its next tree.

    Args:
        accept_tokens: ``[R * accept_stride]``, accepted tokens, each request's from its own start.
        accept_lens_R: how many each has, the target's own token included; at least 1.
        bonus_tokens_R: out.
        accept_stride: entries between the starts of two requests.

    Stands for ``fill_bonus_tokens`` (``kernels/ops/speculative/eagle.py``).
    """
    starts_R = torch.arange(len(accept_lens_R)) * accept_stride
    last_R = starts_R + accept_lens_R.long() - 1
    bonus_tokens_R[: len(last_R)].copy_(accept_tokens.reshape(-1)[last_R])


def fill_accept_out_cache_loc_cpu(
    accept_index: Tensor, out_cache_loc_E: Tensor, accept_out_cache_loc_E: Tensor
) -> None:
    """Gather the cache rows of the accepted nodes, in order and without gaps.

    Args:
        accept_index: nodes' rows, or -1 where there is none.
        out_cache_loc_E: the cache row of every node.
        accept_out_cache_loc_E: out; what is longer than the number of accepted nodes stays.

    Stands for ``fill_accept_out_cache_loc`` (``kernels/ops/speculative/eagle.py``).
    """
    flat = accept_index.reshape(-1)
    kept = out_cache_loc_E[flat[flat != NONE].long()]
    accept_out_cache_loc_E[: len(kept)].copy_(kept)
