"""Rules of verification over trees: exact over all that can be drafted and accepted, and chains to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.choosing import Best, Drawn
from cosched.engines.embedded.tree_rules import (
    AtRow,
    KSequential,
    Recursive,
    walk,
    walk_greedy,
)
from cosched.engines.embedded.trees import Forest
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import ForcedVerifier, GreedyVerifier, SamplingVerifier
from cosched.errors import ConfigError, PluginError
from cosched.records import Proposal
from tests.helpers.trees import BUSHY, as_tensor, depths_of, rows_of

VOCABULARY = 3
Prefix = tuple[int, ...]
TREES = ((0, 1, 2), (0, 0), (0, 0, 0), (0, 0, 1, 1), (0, 0, 1, 2, 2), (0, 0, 1, 3))


class Table:
    """A model of three tokens: distributions by what was said, at random, some without a token."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, prefix: Prefix) -> Tensor:
        number = sum((VOCABULARY + 1) ** place * (token + 1) for place, token in enumerate(prefix))
        generator = torch.Generator().manual_seed(1000 * self._seed + number)
        weights_V = torch.rand(VOCABULARY, generator=generator, dtype=torch.float64) ** 2
        if number % 4 == 3:
            weights_V[number % VOCABULARY] = 0
        return weights_V / weights_V.sum()


def drafts(
    parents: tuple[int, ...], q: Table, replacement: bool
) -> Iterator[tuple[float, list[int]]]:
    """Every tree of tokens that can be drawn, with its probability."""
    for tokens in itertools.product(range(VOCABULARY), repeat=len(parents)):
        chance = 1.0
        for k, parent in enumerate(parents):
            weights_V = q(said(tokens, parents, parent)).clone()
            if not replacement:
                weights_V[[tokens[j] for j in range(k) if parents[j] == parent]] = 0
            total = float(weights_V.sum())
            chance *= float(weights_V[tokens[k]]) / total if total else float(tokens[k] == 0)
        if chance:
            yield chance, list(tokens)


def said(tokens, parents: tuple[int, ...], row: int) -> Prefix:
    return tuple(tokens[at - 1] for at in rows_of(parents, row)[1:])


def verdicts(
    tokens: list[int], parents: tuple[int, ...], at_row: Callable[[int, int], AtRow]
) -> Iterator[tuple[float, int, Tensor]]:
    """Every way in which the tokens are accepted and refused, with its probability."""
    scripts: list[tuple[bool, ...]] = [()]
    while scripts:
        script, odds = scripts.pop(), []

        def accepts(k: int, q, p, script=script, odds=odds) -> bool:
            stands = script[len(odds)] if len(odds) < len(script) else True
            chance = min(1.0, float(p) / float(q))
            odds.append((stands, chance if stands else 1 - chance))
            return stands

        row, left_V = walk(tokens, parents, at_row, accepts)
        taken = [stands for stands, _ in odds]
        scripts += [(*taken[:k], False) for k in range(len(script), len(odds))]
        chance = 1.0
        for _, share in odds:
            chance *= share
        if chance:
            yield chance, row, left_V


def texts(p: Table, length: int) -> dict[Prefix, float]:
    """What the target says by itself."""
    found: dict[Prefix, float] = {(): 1.0}
    for _ in range(length):
        found = {
            (*text, token): chance * float(p(text)[token])
            for text, chance in found.items()
            for token in range(VOCABULARY)
        }
    return found


def texts_by_rounds(
    parents: tuple[int, ...],
    trees: Iterator[tuple[float, list[int]]],
    p: Table,
    rule: Callable[[Tensor, Prefix, int], AtRow],
) -> dict[Prefix, float]:
    """The same by one round of drafting and accepting, and the target behind it: over all outcomes."""
    length = max(depths_of(parents)) + 1
    found = dict.fromkeys(texts(p, length), 0.0)
    for drafted, tokens in trees:

        def at_row(row: int, number: int, tokens=tokens) -> AtRow:
            prefix = said(tokens, parents, row)
            return rule(p(prefix), prefix, number)

        for chance, row, left_V in verdicts(tokens, parents, at_row):
            for token, share in enumerate((left_V / left_V.sum()).tolist()):
                begun = (*said(tokens, parents, row), token)
                for rest in itertools.product(range(VOCABULARY), repeat=length - len(begun)):
                    text, all_of_it = begun, drafted * chance * share
                    for following in rest:
                        all_of_it *= float(p(text)[following])
                        text = (*text, following)
                    found[text] += all_of_it
    return found


def apart(one: dict[Prefix, float], other: dict[Prefix, float]) -> float:
    return max(abs(one[text] - other[text]) for text in other)


@pytest.mark.parametrize("parents", TREES)
@pytest.mark.parametrize("seed", range(3))
def test_recursive_rejection_is_the_targets_over_all_outcomes(
    parents: tuple[int, ...], seed: int
) -> None:
    """Siblings drawn without replacement: every text is as likely as by plain sampling, to 1e-9."""
    p, q = Table(seed), Table(seed + 100)
    found = texts_by_rounds(
        parents,
        drafts(parents, q, replacement=False),
        p,
        lambda p_V, prefix, number: Recursive(p_V, q(prefix)),
    )
    assert apart(found, texts(p, max(depths_of(parents)) + 1)) < 1e-9


@pytest.mark.parametrize("parents", TREES)
@pytest.mark.parametrize("seed", range(3))
def test_k_sequential_selection_is_the_targets_over_all_outcomes(
    parents: tuple[int, ...], seed: int
) -> None:
    """The same of siblings that were drawn independently."""
    p, q = Table(seed), Table(seed + 100)
    found = texts_by_rounds(
        parents,
        drafts(parents, q, replacement=True),
        p,
        lambda p_V, prefix, number: KSequential(p_V, q(prefix), number),
    )
    assert apart(found, texts(p, max(depths_of(parents)) + 1)) < 1e-9


@pytest.mark.parametrize("parents", TREES)
def test_tokens_proposed_with_certainty_are_judged_exactly(parents: tuple[int, ...]) -> None:
    """Whatever tokens a tree has, twice the same behind one row included, text is the target's."""
    p, length = Table(0), max(depths_of(parents)) + 1
    for tokens in itertools.product(range(VOCABULARY), repeat=len(parents)):
        found = texts_by_rounds(
            parents, iter([(1.0, list(tokens))]), p, lambda p_V, *_: Recursive(p_V, None)
        )
        assert apart(found, texts(p, length)) < 1e-9


def test_a_rule_for_other_draws_is_caught() -> None:
    """The enumeration can tell: siblings drawn without replacement are not k-sequential selection's."""
    p, q, parents = Table(0), Table(100), (0, 0)
    found = texts_by_rounds(
        parents,
        drafts(parents, q, replacement=False),
        p,
        lambda p_V, prefix, number: KSequential(p_V, q(prefix), number),
    )
    assert apart(found, texts(p, 2)) > 1e-3


@pytest.mark.parametrize("replacement", [False, True])
def test_siblings_are_drawn_as_the_rules_suppose(replacement: bool) -> None:
    """Over a grid of all random numbers: one after the other, without those before them or with."""
    n, logits_V = 300, torch.tensor([0.0, 1.0, -0.5, 0.7])
    grid = (torch.arange(n) + 0.5) / n
    uniforms_BU = torch.cartesian_prod(grid, grid)
    rows_BW = torch.zeros(n * n, 2, dtype=torch.int64)
    choose = Drawn(SamplingParams(0.8), uniforms_BU.double(), replacement)
    drawn_BW = choose.siblings(0, logits_V.expand(n * n, 1, -1), rows_BW)
    share_VV = torch.zeros(4, 4)
    share_VV.index_put_(tuple(drawn_BW.T), torch.tensor(1.0), accumulate=True)
    q_V = (logits_V / 0.8).softmax(-1)
    expected_VV = q_V[:, None] * q_V
    if not replacement:
        expected_VV = (expected_VV / (1 - q_V)[:, None]).fill_diagonal_(0)
    # A grid of n points meets an interval within 1 / n of its length, in both directions.
    assert torch.allclose(share_VV / n**2, expected_VV, atol=4 / n)


def test_the_best_siblings_are_the_best_by_rank() -> None:
    """Behind each row its best token, its second best and so on, whatever stands between them."""
    logits_BRV = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    rows_BW = torch.tensor([[0, 1, 0, 2, 0], [2, 2, 1, 2, 1]])
    ranks_BW = [[0, 0, 1, 0, 2], [0, 1, 0, 2, 1]]
    order_BRV = logits_BRV.argsort(-1, descending=True)
    tokens_BW = Best().siblings(0, logits_BRV, rows_BW)
    for b, w in itertools.product(range(2), range(5)):
        assert tokens_BW[b, w] == order_BRV[b, rows_BW[b, w], ranks_BW[b][w]]


# --- a chain is a tree of width one ------------------------------------------------------------


@pytest.mark.parametrize("verifier", [
    GreedyVerifier(),
    SamplingVerifier(SamplingParams(1.0)),
    SamplingVerifier(SamplingParams(0.7, top_p=0.8)),
    SamplingVerifier(SamplingParams(0.9), "target_only"),
    SamplingVerifier(SamplingParams(1.0), tree_rule="k_sequential"),
    SamplingVerifier(SamplingParams(0.7, top_p=0.8), tree_rule="k_sequential"),
])  # fmt: skip
@pytest.mark.parametrize("with_logits", [True, False])
def test_a_chain_is_a_tree_of_width_one(verifier, with_logits: bool) -> None:
    """The same verdicts and tokens from the same numbers, to the bit, cut short or not."""
    generator = torch.Generator().manual_seed(0)
    B, K, V = 200, 4, 60
    logits_BSV = 2 * torch.randn(B, K + 1, V, generator=generator)
    # Drafts that are often right.
    logits_BKV = logits_BSV[:, :-1] + 0.7 * torch.randn(B, K, V, generator=generator)
    uniforms_BU = torch.rand(B, 2 * K + 1, generator=generator, dtype=torch.float64)
    choose = verifier.choose(uniforms_BU, torch.zeros(B, K, dtype=torch.int64))
    tokens_BK = torch.stack([choose(k, logits_BKV[:, k]) for k in range(K)], 1)
    rows_BK = as_tensor(tuple(range(K)), B)
    assert torch.equal(choose.siblings(0, logits_BKV, rows_BK), tokens_BK)
    for counts in (None, tuple(b % (K + 1) for b in range(B))):
        chain = Proposal(tokens_BK, logits_BKV if with_logits else None, counts)
        tree = Proposal(tokens_BK, chain.logits_BKV, counts, rows_BK)
        path_BS = torch.zeros(B, K + 1, dtype=torch.int64)
        ours = verifier.verify_trees(tree, Forest.of(tree), logits_BSV, uniforms_BU, path_BS)
        theirs = verifier.verify(chain, logits_BSV, uniforms_BU, path_BS)
        assert ours.rows == theirs.num_accepted_B.tolist()
        assert torch.equal(ours.next_B, theirs.next_B)
        assert {0, 1, 2} <= set(ours.rows)


@pytest.mark.parametrize(
    ("kind", "acceptance"), [("greedy", "sampled"), ("sampled", "target_only")]
)
def test_along_a_given_text_a_token_stands_if_it_is_the_texts(kind, acceptance) -> None:
    """The walk follows the text as far as the tree has it, and the text's own token comes behind it."""
    verifier = ForcedVerifier(kind, SamplingParams(1.0), acceptance)
    tree = Proposal(torch.tensor([[5, 6, 7, 1, 2, 3, 4, 8, 9]]), None, None, as_tensor(BUSHY))
    for text, row in (([5, 1, 9, 2], 9), ([5, 2, 1, 1], 5), ([6, 3, 1, 1], 6), ([1, 1, 1, 1], 0)):
        path_BS = torch.tensor([text + [0] * 6])
        logits_BSV = torch.zeros(1, 10, 12)
        outcome = verifier.verify_trees(
            tree, Forest.of(tree), logits_BSV, torch.zeros(1, 19), path_BS
        )
        assert outcome.rows == [row]
        assert outcome.next_B.tolist() == [text[depths_of(BUSHY)[row]]]


def test_trees_that_cannot_be_judged_along_a_text_are_refused() -> None:
    """By the key that has to change: documents, and tokens drawn from the draft's distributions."""
    with pytest.raises(ConfigError, match=r"workload\.documents: .* use workload\.prompts"):
        ForcedVerifier("document", SamplingParams(1.0)).require_trees_fit(drawn=False)
    with pytest.raises(ConfigError, match=r"engine\.acceptance: .* use target_only"):
        ForcedVerifier("sampled", SamplingParams(1.0)).require_trees_fit(drawn=True)
    ForcedVerifier("sampled", SamplingParams(1.0)).require_trees_fit(drawn=False)
    ForcedVerifier("greedy", SamplingParams(0.0)).require_trees_fit(drawn=True)


# --- who is behind whom ------------------------------------------------------------------------


def test_rows_see_their_ancestors_and_themselves() -> None:
    """Depths and sight by walking up from each row; of rows that are not verified, themselves alone."""
    proposal = Proposal(torch.zeros(2, 9, dtype=torch.int64), None, (9, 4), as_tensor(BUSHY, 2))
    forest = Forest.of(proposal)
    for b, count in enumerate(proposal.counts):
        for row in range(10):
            seen = rows_of(BUSHY, row) if row <= count else [row]
            assert forest.sees_BSS[b, row].nonzero().flatten().tolist() == sorted(seen)
            assert forest.depths_BS[b, row] == (len(seen) - 1 if row <= count else 0)
    assert [tree.depth for tree in forest.trees] == [3, 2]


def test_a_tree_is_told_as_the_chain_that_came_of_it() -> None:
    """The accepted path, the first choices behind it, and then all others in their order."""
    forest = Forest.of(Proposal(torch.zeros(1, 9, dtype=torch.int64), None, None, as_tensor(BUSHY)))
    for row, path in ((0, [1, 4, 8]), (2, [2, 6]), (4, [1, 4, 8]), (5, [1, 5]), (9, [1, 4, 9])):
        paths, order_BS = forest.told_as_chains([row])
        assert paths == [path]
        others = [other for other in range(1, 10) if other not in path]
        assert order_BS.tolist() == [[0, *path, *others]]


def test_greedy_walks_take_the_first_of_equal_siblings() -> None:
    """Two tokens alike behind one row: the first stands, and so do those behind it alone."""
    says = [5, 7, 6, 1, 1]
    assert walk_greedy([5, 5, 7, 6], [0, 0, 1, 2], says) == 3
    assert walk_greedy([4, 5, 7, 6], [0, 0, 1, 2], says) == 4


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((0, 2), "token 1 of a tree behind row 2; it can be behind the anchor, row 0"),
        ((0, -1), "token 1 of a tree behind row -1"),
        (
            (0, 1, 0),
            "token 2 of a tree at depth 1, behind one at depth 2; tokens come level by level",
        ),
        ((0,), "proposed (1, 2) tokens and (1, 1) parents; each token needs one"),
    ],
)
def test_what_is_no_tree_is_refused(parents: tuple[int, ...], message: str) -> None:
    """The message says which token, and what would be allowed."""
    num_tokens = max(2, len(parents))
    proposal = Proposal(torch.zeros(1, num_tokens), None, None, as_tensor(parents))
    with pytest.raises(PluginError) as caught:
        Forest.of(proposal)
    assert message in str(caught.value)
