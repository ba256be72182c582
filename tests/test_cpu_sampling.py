"""Verification of sampled text on a CPU against the CUDA kernel written out, and against the target.

The reference is SGLang's kernel, one request and one node at a time, in Python's numbers.
Letters: R requests, N nodes, S nodes on the longest path, V vocabulary.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cosched.engines.sglang.cpu.sampling import (
    top_k_renorm_prob,
    top_p_renorm_prob,
    tree_speculative_sampling_target_only,
)
from cosched.testing.sampling import p_value

VOCABULARY = 7
FALSE_ALARM = 1e-3  # of a test by chi-square, over seeds; the seeds are fixed


def linked(parents_R: list[list[int]], width: int) -> SimpleNamespace:
    """Trees by the parent of each node but the root, and tensors to write to."""
    num_requests, num_nodes = len(parents_R), len(parents_R[0]) + 1
    child = torch.full((num_requests, num_nodes), -1)
    sibling = child.clone()
    for r, parents in enumerate(parents_R):
        for node in range(num_nodes - 1, 0, -1):
            parent = parents[node - 1]
            sibling[r, node], child[r, parent] = child[r, parent].clone(), node
    return SimpleNamespace(
        index=torch.arange(num_requests * num_nodes).view(num_requests, num_nodes),
        child=child,
        sibling=sibling,
        predicts=torch.full((num_requests * num_nodes,), -1, dtype=torch.int32),
        accept_index=torch.full((num_requests, width), -1, dtype=torch.int32),
        accept_token_num=torch.full((num_requests,), -1, dtype=torch.int32),
    )


def run(
    tree: SimpleNamespace,
    candidates: Tensor,
    coins: Tensor,
    final_coins: Tensor,
    probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
) -> dict[str, list]:
    """What is written, refused shares included."""
    refused = torch.zeros_like(probs)
    tree_speculative_sampling_target_only(
        predicts=tree.predicts,
        accept_index=tree.accept_index,
        accept_token_num=tree.accept_token_num,
        candidates=candidates,
        retrive_index=tree.index,
        retrive_next_token=tree.child,
        retrive_next_sibling=tree.sibling,
        uniform_samples=coins,
        uniform_samples_for_final_sampling=final_coins,
        target_probs=probs,
        draft_probs=refused,
        threshold_single=threshold_single,
        threshold_acc=threshold_acc,
    )
    written = tree.predicts, tree.accept_index, tree.accept_token_num, refused
    names = "predicts", "accept_index", "accept_token_num", "refused"
    return {name: tensor.tolist() for name, tensor in zip(names, written, strict=True)}


def literally(
    tree: SimpleNamespace,
    candidates: Tensor,
    coins: Tensor,
    final_coins: Tensor,
    probs: Tensor,
    threshold_single: float,
    threshold_acc: float,
) -> dict[str, list]:
    """The kernel's own loops, each request for itself."""
    num_requests, width = tree.accept_index.shape
    vocabulary = probs.shape[-1]
    predicts, accept_index = tree.predicts.tolist(), tree.accept_index.tolist()
    refused = torch.zeros_like(probs).tolist()
    numbers = []
    for r in range(num_requests):
        rows, share, node, walked = tree.index[r].tolist(), 0.0, 0, 0
        at, coin, last = 0, float(coins[r, 0]), rows[0]
        accept_index[r][0] = last
        for _ in range(1, width):
            node = int(tree.child[r, node])
            while node != -1:
                token = int(candidates[r, node])
                own = float(probs[r, at, token])
                share += own
                if own > 0 and (coin < share / max(threshold_acc, 1e-9) or own >= threshold_single):
                    share, at, coin = 0.0, node, float(coins[r, node])
                    predicts[last] = token
                    walked += 1
                    accept_index[r][walked] = last = rows[node]
                    break
                refused[r][at][token] = own
                node = int(tree.sibling[r, node])
            if node == -1:
                break
        numbers.append(walked)
        gone = refused[r][at] if walked != width - 1 else [0.0] * vocabulary
        left = [max(float(p) - g, 0.0) for p, g in zip(probs[r, at], gone, strict=True)]
        sought, total, drawn = float(final_coins[r]) * sum(left), 0.0, vocabulary - 1
        for token, weight in enumerate(left):
            total += weight
            if weight > 0 and total > sought:
                drawn = token
                break
        predicts[last] = drawn
    return {
        "predicts": predicts,
        "accept_index": accept_index,
        "accept_token_num": numbers,
        "refused": refused,
    }


@pytest.mark.parametrize("thresholds", [(1.0, 1.0), (0.4, 1.0), (1.0, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("seed", range(12))
def test_every_tree_is_walked_as_the_kernel_walks_it(
    seed: int, thresholds: tuple[float, float]
) -> None:
    """Chains, bushes and what lies between, cut before their end too; shares of nothing among them."""
    rng, draws = random.Random(seed), torch.Generator().manual_seed(seed)
    num_requests, num_nodes = rng.randint(1, 6), rng.randint(2, 9)
    chain = seed % 3 == 0
    parents = [
        [n if chain else rng.randint(0, n) for n in range(num_nodes - 1)]
        for _ in range(num_requests)
    ]
    width = rng.randint(2, num_nodes)
    candidates = torch.randint(VOCABULARY, (num_requests, num_nodes), generator=draws)
    shape = num_requests, num_nodes, VOCABULARY
    probs = (2 * torch.randn(shape, generator=draws)).softmax(-1)
    probs = top_k_renorm_prob(probs.flatten(0, 1), 3).view(shape)
    coins = torch.rand(num_requests, num_nodes, generator=draws)
    final_coins = torch.rand(num_requests, generator=draws)
    given = candidates, coins, final_coins, probs, *thresholds
    found, expected = run(linked(parents, width), *given), literally(linked(parents, width), *given)
    assert found == expected


@pytest.mark.parametrize(
    ("tokens", "shares", "coin", "threshold", "token", "number"),
    [
        ([2], [0.0, 1.0, 0.0], 0.0, 0.0, 1, 0),
        ([2], [0.0, 1.0, 0.0], 0.0, 1.0, 1, 0),
        ([1, 2, 3], [0.0, 0.25, 0.0, 0.75], 0.25, 1.0, 3, 1),
        ([1], [0.0, 0.25, 0.75], 0.0, 1.0, 1, 1),
        ([1], [0.0, 1.0], 1.0 - 2**-24, 1.0, 1, 1),
    ],
    ids=["nothing-no-threshold", "nothing", "boundary", "least", "most"],
)
def test_numbers_at_the_border_of_a_share(
    tokens: list[int],
    shares: list[float],
    coin: float,
    threshold: float,
    token: int,
    number: int,
) -> None:
    """The cases of SGLang's own test: shares are half open, and one of nothing is never accepted."""
    candidates = torch.tensor([[0, *tokens]])
    probs = torch.zeros(1, len(tokens) + 1, len(shares))
    probs[0, 0] = torch.tensor(shares)
    probs[0, 1:, 0] = 1
    coins = torch.zeros(1, len(tokens) + 1)
    coins[0, 0] = coin
    tree = linked([[0] * len(tokens)], 2)
    found = run(tree, candidates, coins, torch.zeros(1), probs, threshold_single=threshold)
    assert found["predicts"][0] == token
    assert found["accept_token_num"] == [number]


def test_the_text_has_the_targets_distribution_whatever_is_drafted() -> None:
    """A root with two children, of which the first has two more: 20,000 draws of two tokens.

    Refusing a child and drawing it again, or a number used twice, would each be seen here.
    """
    draws, number = torch.Generator().manual_seed(0), 20_000
    first, second = torch.randn(2, 1 + VOCABULARY, VOCABULARY, generator=draws).softmax(-1)[:, :4]
    probs = torch.stack((first[0], second[1], second[2], second[3], second[0]))
    candidates = torch.tensor([[0, 2, 5, 1, 4]]).expand(
        number, -1
    )  # the nodes 1, 2 and below 1 3, 4
    tree = linked([[0, 0, 1, 1]] * number, 3)
    coins = torch.rand(number, 5, generator=draws)
    found = run(
        tree,
        candidates,
        coins,
        torch.rand(number, generator=draws),
        probs.expand(number, -1, -1).clone(),
    )
    predicts = torch.tensor(found["predicts"]).view(number, 5)
    counts = predicts[:, 0].bincount(minlength=VOCABULARY)
    assert p_value(counts, probs[0] * number) > FALSE_ALARM
    for node, token in ((1, 2), (2, 5)):  # what follows a child that stands
        after = predicts[predicts[:, 0] == token][:, node]
        counts = after.bincount(minlength=VOCABULARY)
        assert p_value(counts, probs[node] * len(after)) > FALSE_ALARM
    greedily = predicts.clone()
    greedily[:, 0] = probs[0].argmax()  # the test can fail
    assert p_value(greedily[:, 0].bincount(minlength=VOCABULARY), probs[0] * number) < 1e-12


def test_top_k_keeps_the_largest_and_what_ties_with_the_least_of_them() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]])
    found = top_k_renorm_prob(probs, torch.tensor([2, 2, 1 << 30]))
    expected = torch.tensor([[4 / 7, 3 / 7, 0, 0], [0.4, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(found, expected)
    assert torch.equal(top_k_renorm_prob(probs[:1], 1), torch.tensor([[1.0, 0, 0, 0]]))


def test_top_p_keeps_the_fewest_that_have_the_mass() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    found = top_p_renorm_prob(probs, torch.tensor([0.75, 0.9, 0.3]))
    expected = torch.tensor([[0.625, 0.375, 0, 0], [10 / 19, 6 / 19, 3 / 19, 0], [0.25] * 4])
    torch.testing.assert_close(found, expected)
    assert torch.equal(top_p_renorm_prob(probs[:1], 0.01), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(top_p_renorm_prob(probs, 1.0), probs)


@pytest.mark.parametrize("seed", range(10))
def test_renormalisation_equals_loops(seed: int) -> None:
    """Row by row over the sorted list; probabilities without ties."""
    draws = torch.Generator().manual_seed(seed)
    probs = torch.randn(5, 20, generator=draws).mul(2).softmax(-1)
    top_ks = torch.randint(1, 25, (5,), generator=draws)
    top_ps = torch.rand(5, generator=draws).clamp_min(0.05)
    for m, row in enumerate(probs.tolist()):
        order = sorted(range(20), key=lambda v: -row[v])
        best, mass = set(order[: int(top_ks[m])]), 0.0
        nucleus = set()
        for v in order:
            if mass < float(top_ps[m]):
                nucleus.add(v)
            mass += row[v]
        for found, kept in (
            (top_k_renorm_prob(probs, top_ks)[m], best),
            (top_p_renorm_prob(probs, top_ps)[m], nucleus),
        ):
            total = sum(row[v] for v in kept)
            expected = [row[v] / total if v in kept else 0.0 for v in range(20)]
            assert found.tolist() == pytest.approx(expected, rel=1e-5)
