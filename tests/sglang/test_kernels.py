"""The CPU's kernels and SGLang's Triton kernels, run as Python, write the same."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cosched.engines.sglang.cpu import kernels

pytestmark = pytest.mark.sglang

SEEDS = range(25)


def drafted(rng: random.Random, mask_mode: int | None = None) -> SimpleNamespace:
    """A random batch of draft trees, chosen from proposals as a worker chooses them.

    Of a step's ``topk * topk`` proposals the best ``topk`` live on, and a node is chosen only if
    its parent is: its score is its parent's times a number below 1.
    """
    topk, depth, num_requests = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 4)
    num_proposals = topk + (depth - 1) * topk * topk
    num_nodes = rng.randint(2, min(num_proposals, 12) + 1) if topk > 1 else depth + 1
    branches_R, chosen_R = [], []
    for _ in range(num_requests):
        scores = [rng.random() for _ in range(topk)]
        branches, live = [-1, *range(topk)], list(range(topk))
        for _ in range(1, depth):
            first = len(scores)
            for parent in live:
                scores += [scores[parent] * rng.random() for _ in range(topk)]
            live = sorted(range(first, len(scores)), key=lambda i: -scores[i])[:topk]
            branches += live
        branches_R.append(branches)
        chosen_R.append(
            sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[: num_nodes - 1])
        )
    return SimpleNamespace(
        topk=topk,
        depth=depth,
        num_nodes=num_nodes,
        num_requests=num_requests,
        branches=torch.tensor(branches_R),
        chosen=torch.tensor(chosen_R),
        lengths=torch.tensor([rng.randint(1, 20) for _ in range(num_requests)]),
        mode=rng.randint(0, 1) if mask_mode is None else mask_mode,
    )


def built(build: Any, draft: SimpleNamespace) -> dict[str, Tensor]:
    """All that ``build`` writes, from what SGLang's caller allocates."""
    shape = (draft.num_requests, draft.num_nodes)
    width = draft.num_requests * draft.num_nodes
    width += int(draft.lengths.sum()) if draft.mode == kernels.FULL_MASK else 0
    out = {
        "tree_mask": torch.ones(draft.num_nodes * width, dtype=torch.bool),
        "positions": torch.zeros(draft.num_requests * draft.num_nodes, dtype=torch.long),
        "index": torch.full(shape, -1),
        "child": torch.full(shape, -1),
        "sibling": torch.full(shape, -1),
    }
    sizes = draft.topk, draft.depth, draft.num_nodes, draft.mode
    build(draft.branches, draft.chosen, draft.lengths, *out.values(), *sizes)
    return out


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("seed", SEEDS)
def test_trees_are_arranged_alike(seed: int) -> None:
    """Mask, positions and links decide what a node sees and which path is accepted."""
    from sglang.kernels.ops.speculative.spec_tree import sgl_build_tree_kernel_triton

    draft = drafted(random.Random(seed))
    equal(
        built(kernels.build_tree_kernel_efficient_cpu, draft),
        built(sgl_build_tree_kernel_triton, draft),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_path_is_accepted(seed: int) -> None:
    """Two words only, so that paths of every length occur."""
    from sglang.kernels.ops.speculative.spec_tree import verify_tree_greedy_triton

    draft = drafted(random.Random(seed), kernels.QLEN_ONLY)
    tree = built(kernels.build_tree_kernel_efficient_cpu, draft)
    draws = torch.Generator().manual_seed(seed)
    shape = draft.num_requests, draft.num_nodes
    candidates = torch.randint(2, shape, generator=draws)
    wanted = torch.randint(2, shape, generator=draws)

    def verified(verify: Any) -> dict[str, Tensor]:
        out = {
            "predicts": torch.zeros(draft.num_requests * draft.num_nodes, dtype=torch.int32),
            "accept_index": torch.full(
                (draft.num_requests, draft.depth + 1), -1, dtype=torch.int32
            ),
            "accept_token_num": torch.zeros(draft.num_requests, dtype=torch.int32),
        }
        links = tree["index"], tree["child"], tree["sibling"]
        verify(*out.values(), candidates, *links, wanted)
        return out

    equal(verified(kernels.verify_tree_greedy_cpu), verified(verify_tree_greedy_triton))


@pytest.mark.parametrize("seed", SEEDS)
def test_links_are_read_back_from_a_mask(seed: int) -> None:
    """NGRAM gets masks alone, where other drafts get them from `build_tree`: one tree, two ways."""
    draft = drafted(random.Random(seed), kernels.QLEN_ONLY)
    tree = built(kernels.build_tree_kernel_efficient_cpu, draft)
    read = {name: torch.zeros_like(tensor) for name, tensor in tree.items()}
    read["tree_mask"] = tree["tree_mask"]
    kernels.reconstruct_indices_from_tree_mask(
        tree["tree_mask"],
        draft.lengths,
        *[read[name] for name in ("positions", "index", "child", "sibling")],
        draft.num_requests,
        draft.num_nodes,
    )
    equal(read, tree)


@pytest.fixture
def pool() -> SimpleNamespace:
    """Three requests of a pool of six lines, with spans of 3, 0 and 40 positions."""
    table = torch.randperm(6 * 64, generator=torch.Generator().manual_seed(0)).view(6, 64).int()
    start = torch.tensor([2, 5, 7])
    return SimpleNamespace(
        table=table,
        lines=torch.tensor([4, 0, 2]),
        start=start,
        end=start + torch.tensor([3, 0, 40]),
    )


def test_rows_are_written_into_the_pool(pool: SimpleNamespace) -> None:
    from sglang.srt.mem_cache.allocation import assign_req_to_token_pool

    rows = torch.arange(1000, 1043)
    ours, theirs = pool.table.clone(), pool.table.clone()
    spans = pool.start, pool.end, rows
    kernels.assign_req_to_token_pool_cpu(pool.lines, ours, *spans, 64)
    assign_req_to_token_pool[(3,)](pool.lines, theirs, *spans, 64, 4)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, pool.table)


def test_rows_are_read_from_the_pool(pool: SimpleNamespace) -> None:
    from sglang.kernels.ops.speculative.cache_locs import assign_extend_cache_locs

    ours, theirs = torch.full((2, 50), -7).unbind()
    spans = pool.lines, pool.table, pool.start, pool.end
    kernels.assign_extend_cache_locs_cpu(*spans, ours, 64)
    assign_extend_cache_locs[(3,)](*spans, theirs, 64, 4)
    assert torch.equal(ours, theirs)
    assert (ours == -7).sum() == 50 - 43


@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (4, 5)])
def test_a_drafts_rows_are_read_from_the_pool(pool: SimpleNamespace, topk: int, steps: int) -> None:
    from sglang.kernels.ops.speculative.cache_locs import assign_draft_cache_locs_contiguous

    ours, theirs = torch.zeros(2, 3 * topk * steps, dtype=torch.long).unbind()
    spans = pool.lines, pool.table, pool.start
    kernels.assign_draft_cache_locs_contiguous_cpu(*spans, ours, 64, topk, steps)
    assign_draft_cache_locs_contiguous[(3,)](*spans, theirs, 64, topk, steps)
    assert torch.equal(ours, theirs)
    assert ours.count_nonzero() > 0


def test_the_last_accepted_token_is_picked() -> None:
    from sglang.kernels.ops.speculative.eagle import fill_bonus_tokens

    accepted, lengths = torch.arange(100, 112), torch.tensor([1, 4, 2], dtype=torch.int32)
    ours, theirs = torch.zeros(2, 3, dtype=torch.int32).unbind()
    kernels.fill_bonus_tokens_cpu(accepted, lengths, ours, 4)
    fill_bonus_tokens[(3,)](accepted, lengths, theirs, 4)
    assert torch.equal(ours, theirs)
    assert ours.tolist() == [100, 107, 109]


def test_rows_of_accepted_nodes_close_up() -> None:
    from sglang.kernels.ops.speculative.eagle import fill_accept_out_cache_loc

    accepted = torch.tensor([[0, 2, -1], [3, -1, -1], [6, 7, 8]], dtype=torch.int32)
    rows = torch.arange(50, 59)
    ours, theirs = torch.zeros(2, 9, dtype=torch.long).unbind()
    kernels.fill_accept_out_cache_loc_cpu(accepted, rows, ours)
    fill_accept_out_cache_loc[(9,)](accepted, rows, theirs, 16)
    assert torch.equal(ours, theirs)
    assert ours.tolist() == [50, 52, 53, 56, 57, 58, 0, 0, 0]


def test_cache_rows_move_as_if_read_before_written() -> None:
    """A row may be both source and target; layers differ in width."""
    from sglang.kernels.ops.kvcache.cache_move import copy_all_layer_kv_cache_tiled

    layers = [torch.randn(10, 3), torch.randn(10, 2, 4).bfloat16()]
    to, source = torch.tensor([2, 3, 7]), torch.tensor([3, 4, 2])

    def moved(copy: Any) -> list[Tensor]:
        copies = [layer.clone() for layer in layers]
        addresses = torch.tensor([copy.data_ptr() for copy in copies], dtype=torch.uint64)
        copy(addresses, torch.tensor([copy[0].nbytes for copy in copies]))
        return copies

    ours = moved(lambda *at: kernels.copy_all_layer_kv_cache_cpu(*at, to, source))
    theirs = moved(lambda *at: copy_all_layer_kv_cache_tiled[(2, 1)](*at, to, source, 3, 4, 128))
    for mine, other, before in zip(ours, theirs, layers, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine[to], before[source])


@pytest.mark.parametrize("seed", SEEDS)
def test_probabilities_are_cut_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties at the border included: SGLang's Triton code, which a CPU is let into here."""
    from sglang.kernels.ops.sampling import renorm_triton

    from cosched.engines.sglang.cpu import sampling

    monkeypatch.setattr(renorm_triton, "_prepare_probs", lambda probs: probs.float().contiguous())
    draws = torch.Generator().manual_seed(seed)
    probs = torch.randint(1, 9, (6, 40), generator=draws).float()  # few values: many ties
    probs /= probs.sum(-1, keepdim=True)
    top_ks = torch.randint(1, 60, (6,), generator=draws)
    top_ps = torch.rand(6, generator=draws).clamp_min(0.02)
    torch.testing.assert_close(
        sampling.top_k_renorm_prob(probs, top_ks),
        renorm_triton.top_k_renorm_probs_triton(probs, top_ks),
    )
    torch.testing.assert_close(
        sampling.top_p_renorm_prob(probs, top_ps),
        renorm_triton.top_p_renorm_probs_triton(probs, top_ps),
    )
