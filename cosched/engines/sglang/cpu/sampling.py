"""Verification of sampled text on a CPU, in plain PyTorch: what SGLang has CUDA kernels for.

Names and order of the parameters are SGLang's, of which the call sites pass most by name. The draft's
tokens are its best ones, and the target draws them or not (``target_only``): a node's children stand
in the order of their links, each with its own share of one random number, and where none of them does
the next token is drawn from what is left of the target's distribution. So every token has exactly that
distribution, whatever was drafted (arXiv 2305.09781 for trees; Leviathan et al., arXiv 2211.17192, of
a draft that is certain).

Letters: R requests, N nodes of a tree (its root, the last committed token, included), S nodes on the
longest path, M rows of any kind, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

NONE = -1
LEAST_THRESHOLD = 1e-9  # as SGLang's binding has it: 0 divides


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,  # noqa: ARG001  it always is
) -> None:
    """Walk every tree from its root along the children that the target draws.

    Args:
        predicts: out, ``[R * N]``, at every node of the path the token that follows it.
        accept_index: out, ``[R, S]``, rows of the nodes on the path, root first; the rest stays.
        accept_token_num: out, ``[R]``, nodes on the path, the root not counted.
        candidates: ``[R, N]``, the nodes' tokens.
        retrive_index: ``[R, N]``, the nodes' rows.
        retrive_next_token: ``[R, N]``, first child or -1.
        retrive_next_sibling: ``[R, N]``, next sibling or -1.
        uniform_samples: ``[R, N]`` numbers in [0, 1), of which a node's tells its children apart.
        uniform_samples_for_final_sampling: ``[R]``, for the token after the path.
        target_probs: ``[R, N, V]``, the target's distribution after every node.
        draft_probs: out, ``[R, N, V]``, zeros at first: the shares of the children that were refused.
        threshold_single: a child stands too if its own share is so large.
        threshold_acc: shares count as so many times smaller; below 1 more than is due is accepted.
        deterministic: whatever it is.

    Stands for the CUDA kernel ``TreeSpeculativeSamplingTargetOnly`` as SGLang 0.5.23 has it
    (``kernels/jit/include/sgl_kernel/speculative/sampling.cuh``): before, a token without a share
    was accepted where the random number was 0.
    """
    rows_R = torch.arange(len(candidates))
    node_R, num_accepted_R = torch.zeros_like(rows_R), torch.zeros_like(rows_R)
    accept_index[:, 0] = retrive_index[:, 0]
    walks_R = torch.ones_like(rows_R, dtype=torch.bool)
    for _ in range(1, accept_index.shape[1]):
        child_R = retrive_next_token[rows_R, node_R].long().masked_fill(~walks_R, NONE)
        coin_R = uniform_samples[rows_R, node_R]
        share_R = torch.zeros_like(coin_R)
        next_R = torch.full_like(node_R, NONE)
        while bool((child_R != NONE).any()):
            asked_R, at_R = child_R != NONE, child_R.clamp_min(0)
            token_R = candidates[rows_R, at_R].long()
            own_R = target_probs[rows_R, node_R, token_R]
            share_R = share_R + own_R * asked_R
            bound_R = share_R / max(threshold_acc, LEAST_THRESHOLD)
            drawn_R = (coin_R < bound_R) | (own_R >= threshold_single)
            stands_R = asked_R & (own_R > 0) & drawn_R
            refused_R = asked_R & ~stands_R
            there = rows_R[refused_R], node_R[refused_R], token_R[refused_R]
            draft_probs[there] = own_R[refused_R]
            next_R = torch.where(stands_R, at_R, next_R)
            sibling_R = retrive_next_sibling[rows_R, at_R].long()
            child_R = sibling_R.masked_fill(~refused_R, NONE)
        walks_R = next_R != NONE
        moved, to = rows_R[walks_R], next_R[walks_R]
        before = retrive_index[moved, node_R[walks_R]].long()
        predicts[before] = candidates[moved, to].to(predicts.dtype)
        num_accepted_R[walks_R] += 1
        accept_index[moved, num_accepted_R[walks_R]] = retrive_index[moved, to].to(
            accept_index.dtype
        )
        node_R = torch.where(walks_R, next_R, node_R)
    accept_token_num.copy_(num_accepted_R)
    # Behind the longest path nothing was drafted, so nothing was refused.
    whole_R1 = (num_accepted_R == accept_index.shape[1] - 1)[:, None]
    refused_RV = draft_probs[rows_R, node_R].masked_fill(whole_R1, 0)
    left_RV = (target_probs[rows_R, node_R] - refused_RV).clamp_min(0)
    drawn_R = _draw(left_RV, uniform_samples_for_final_sampling)
    predicts[retrive_index[rows_R, node_R].long()] = drawn_R.to(predicts.dtype)


def _draw(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first token at which the sum of weights passes its share: one that has a weight.

    The last of the vocabulary where none has.
    """
    sums_RV = weights_RV.double().cumsum(-1)
    whole_R1 = sums_RV[:, -1:].contiguous()
    drawn_R1 = torch.searchsorted(sums_RV, uniform_R.double()[:, None] * whole_R1, right=True)
    last_R1 = torch.searchsorted(sums_RV, whole_R1)  # with a weight
    nothing = weights_RV.shape[-1] - 1
    return torch.where(whole_R1 > 0, drawn_R1.minimum(last_R1), nothing)[:, 0]


def top_k_renorm_prob(probs: Tensor, top_k: Tensor | int) -> Tensor:
    """Each row's ``top_k`` largest, and what ties with the least of them, with a sum of 1 ``[M, V]``.

    Stands for ``top_k_renorm_probs_triton`` (``kernels/ops/sampling/renorm_triton.py``).
    """
    k_M1 = _per_row(top_k, probs).long().clamp(1, probs.shape[-1])
    largest_MK = probs.float().topk(int(k_M1.max()), -1).values
    return _from(probs, largest_MK.gather(-1, k_M1 - 1))


def top_p_renorm_prob(probs: Tensor, top_p: Tensor | float) -> Tensor:
    """Each row without its least probable tokens, of ``1 - top_p`` together, with a sum of 1 ``[M, V]``.

    What ties with the least that stays, stays. Stands for ``top_p_renorm_probs_triton``
    (``kernels/ops/sampling/renorm_triton.py``).
    """
    ascending_MV = probs.float().sort(-1).values
    goes_M1 = 1.0 - _per_row(top_p, probs).float()
    first_M1 = torch.searchsorted(ascending_MV.cumsum(-1), goes_M1)
    return _from(probs, ascending_MV.gather(-1, first_M1.clamp_max(probs.shape[-1] - 1)))


def _per_row(value: Tensor | float, probs_MV: Tensor) -> Tensor:
    """``[M, 1]`` of one number for all rows, or of one each."""
    return torch.as_tensor(value).reshape(-1, 1).expand(len(probs_MV), 1).contiguous()


def _from(probs_MV: Tensor, least_M1: Tensor) -> Tensor:
    """What is at least as probable, with a sum of 1."""
    kept_MV = torch.where(probs_MV >= least_M1, probs_MV.float(), 0.0)
    return kept_MV / kept_MV.sum(-1, keepdim=True)
