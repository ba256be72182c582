"""Drafters that copy: the search against an obvious one, and what each makes of what it finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosched.engines.embedded.target import Target
from cosched.errors import CheckpointError
from cosched.records import Segment
from drafters.logitspec import LogitSpecDrafter, LogitSpecSettings
from drafters.lookup import END, find, follow
from drafters.ngram import NgramDrafter, NgramSettings


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def obvious(tokens: list[int], end: list[int], most: int) -> list[tuple[int, int]]:
    """Places and lengths, token by token."""
    found = []
    for at in range(len(tokens) - 1):
        length = 0
        while length < min(most, len(end), at + 1) and tokens[at - length] == end[-1 - length]:
            length += 1
        if length and tokens[at + 1] != END:
            found.append((at + 1, length))
    return found


@given(
    st.lists(st.integers(END, 3), max_size=40),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(1, 6),
)
def test_the_search_finds_what_an_obvious_one_finds(
    tokens: list[int], end: list[int], most: int
) -> None:
    """Every place where the end stood and a token followed, with the number of tokens that agree."""
    follows_M, lengths_M = find(array(tokens), array(end), most)
    assert list(zip(follows_M.tolist(), lengths_M.tolist(), strict=True)) == obvious(
        tokens, end, most
    )


@given(st.lists(st.integers(END, 3), min_size=1, max_size=12), st.data(), st.integers(1, 9))
def test_what_is_copied_is_what_followed(tokens: list[int], data: st.DataObject, n: int) -> None:
    """Up to an END, and around again where the tokens are at their own end."""
    start = data.draw(st.sampled_from([i for i, t in enumerate(tokens) if t != END] or [-1]))
    if start < 0:
        return
    expected: list[int] = []
    while (
        len(expected) < n and (copied := tokens[start:][len(expected) % len(tokens[start:])]) != END
    ):
        expected.append(copied)
    assert follow(array(tokens), start, n).tolist() == expected


def drafted(drafter, state, number: int, slots: int = 1) -> list[list[int]]:
    def nothing(_k: int, _logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it has no logits to choose from")

    proposal = drafter.propose(state, slots, nothing, number)
    assert proposal.logits_BKV is None
    return proposal.tokens_BK.tolist()


def branches(drafter, state, number: int) -> list[list[int]]:
    """The paths of the only slot's tree, one behind each of the anchor's tokens."""
    tree = drafter.propose(state, 1, None, number)
    paths: list[list[int]] = []
    by_row: dict[int, list[int]] = {}
    for k, (token, parent) in enumerate(
        zip(tree.tokens_BK[0].tolist(), tree.parents_BK[0].tolist(), strict=True)
    ):
        if parent == 0:
            paths.append([])
            by_row[k + 1] = paths[-1]
        else:
            by_row[k + 1] = by_row[parent]
        by_row[k + 1].append(token)
    return paths


def tell(
    drafter, state, slot: int, tokens: list[int], logits: dict[int, float] | None = None
) -> None:
    """A text from its beginning; of the last row's logits those that are not 0."""
    logits_V = torch.zeros(64)
    for token, logit in (logits or {}).items():
        logits_V[token] = logit
    segment = Segment("r", 0, torch.tensor(tokens), None, None, logits_V=logits_V)
    drafter.observe(state, slot, segment)


def ngram(target: Target, **settings) -> NgramDrafter:
    return NgramDrafter.load(NgramSettings(kind="ngram", **settings), target)


def logitspec(target: Target, **settings) -> LogitSpecDrafter:
    return LogitSpecDrafter.load(LogitSpecSettings(kind="logitspec", **settings), target)


def test_ngram_takes_the_longest_match_and_of_several_the_latest(target: Target) -> None:
    """1 2 3 is longer than the later 2 3; of 2 3 alone, with ``max_ngram: 2``, the later one counts."""
    text = [1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 8, 1, 2, 3]
    for most, expected in ((16, [40, 41, 9]), (2, [50, 51, 8])):
        drafter = ngram(target, max_ngram=most)
        state = drafter.new_state(1, 64, None)
        tell(drafter, state, 0, text)
        assert drafted(drafter, state, 3) == [expected]


def test_ngram_goes_round_a_loop_and_repeats_a_new_token(target: Target) -> None:
    """A text that has begun to loop is expected to go on; a token that never stood comes again."""
    drafter = ngram(target)
    state = drafter.new_state(2, 64, None)
    tell(drafter, state, 0, [9, 1, 2, 1, 2, 1])
    tell(drafter, state, 1, [1, 2, 3])
    assert drafted(drafter, state, 5, slots=2) == [[2, 1, 2, 1, 2], [3] * 5]


@pytest.mark.parametrize("make", [ngram, logitspec])
def test_a_window_hides_what_is_further_back(target: Target, make) -> None:
    """Of six tokens the first is found with a window of six, and with a smaller one it is not."""
    drafter = make(target)
    for window in (None, 6, 5, 4):
        state = drafter.new_state(1, 64, window)
        tell(drafter, state, 0, [7, 40, 1, 2, 3, 7])
        assert (drafted(drafter, state, 1) == [[40]]) == (window in {None, 6})


def test_the_last_logits_choose_between_equal_matches(target: Target) -> None:
    """Among the longest matches the likeliest next token wins, among equals of it the latest place."""
    drafter = logitspec(target)
    state = drafter.new_state(1, 64, None)
    text = [1, 40, 41, 2, 1, 50, 51, 3, 1, 40, 42, 4, 1, 60, 61, 5, 1]
    for logits, expected in (
        ({}, [60, 61]),
        ({50: 2.0, 40: 1.0}, [50, 51]),
        ({40: 3.0, 50: 2.0}, [40, 42]),
        ({9: 5.0}, [60, 61]),  # likelier than all of them, but it never followed
    ):
        tell(drafter, state, 0, text, logits)
        assert drafted(drafter, state, 2) == [expected]


def test_where_nothing_matches_the_last_logits_guess_and_lookup_goes_on(target: Target) -> None:
    """The best token but the one that was said, and what followed that one in the text."""
    drafter = logitspec(target)
    state = drafter.new_state(1, 64, None)
    tell(drafter, state, 0, [5, 6, 7, 8], {8: 9.0, 6: 4.0, 5: 3.0})
    assert drafted(drafter, state, 3) == [[6, 7, 8]]
    tell(drafter, state, 0, [5, 6, 7, 8], {30: 4.0})  # a guess that is new as well
    assert drafted(drafter, state, 3) == [[30, 30, 30]]


def test_a_tree_has_the_best_path_and_shorter_ones_that_begin_otherwise(target: Target) -> None:
    """First what followed the longest match, the likeliest first and each token once; then guesses."""
    chain, tree = (logitspec(target, num_draft_tokens=6, branches=n) for n in (1, 4))
    assert (chain.num_tree_tokens, tree.num_tree_tokens) == (0, 6 + 3 + 2 + 1)
    text = [1, 40, 41, 2, 1, 50, 51, 3, 1, 40, 42, 4, 1, 60, 61, 5, 1]
    states = [drafter.new_state(1, 64, None) for drafter in (chain, tree)]
    for drafter, state in zip((chain, tree), states, strict=True):
        tell(drafter, state, 0, text, {50: 2.0, 40: 1.0, 7: 5.0})
    assert branches(tree, states[1], 6) == [[50, 51, 3, 1, 40, 42], [40, 42, 4], [60, 61], [7]]
    assert branches(tree, states[1], 6)[:1] == drafted(chain, states[0], 6)
    assert branches(tree, states[1], 2) == [[50, 51], [40, 42], [60, 61], [7]]
    tell(tree, states[1], 0, [5, 6, 7, 8], {8: 9.0, 6: 4.0, 5: 3.0, 30: 2.0})  # a new token
    assert branches(tree, states[1], 3) == [[6, 7, 8], [5, 6, 7], [30, 30], [0]]


def test_the_store_has_what_others_said_and_counts_one_less(target: Target) -> None:
    """A request that is done is found by the next; a match in its own text as long is better."""
    drafter = logitspec(target, num_draft_tokens=4, store_tokens=64)
    state = drafter.new_state(2, 64, None)
    tell(drafter, state, 0, [1, 2, 3, 40, 41])
    drafter.move_slot(state, 0, 0)
    tell(drafter, state, 0, [9, 8, 1, 2, 3], {30: 1.0})
    assert drafted(drafter, state, 4) == [[40, 41, 41, 41]]  # nothing is copied across its end
    tell(drafter, state, 0, [3, 50, 3], {40: 9.0})
    assert drafted(drafter, state, 1) == [[50]]  # one token agrees in both
    tell(drafter, state, 0, [3, 50, 1, 2, 3])
    assert drafted(drafter, state, 1) == [[40]]  # three against one


def test_the_store_is_bounded_and_forgets_the_oldest(target: Target) -> None:
    """Never more tokens than it may have, ends included; without room it keeps nothing."""
    for room in (0, 8):
        drafter = logitspec(target, store_tokens=room)
        state = drafter.new_state(1, 64, None)
        for first in (10, 20, 30):
            tell(drafter, state, 0, [first, first + 1, first + 2, first + 3])
            drafter.move_slot(state, 0, 0)
        kept = drafter._store.tokens_T.tolist()
        assert kept == ([22, 23, END, 30, 31, 32, 33, END][-room:] if room else [])
        assert drafter.shared_bytes == 4 * room


def test_a_store_is_saved_and_read(target: Target, tmp_path: Path) -> None:
    """The newest part where it is larger than its room; without room, or of another target, not at all."""
    drafter = logitspec(target, store_tokens=64)
    state = drafter.new_state(1, 64, None)
    tell(drafter, state, 0, [1, 2, 3, 60, 61])
    drafter.move_slot(state, 0, 0)
    drafter.save(tmp_path / "store")
    path = str(tmp_path / "store")
    for room, kept in ((64, [1, 2, 3, 60, 61, END]), (3, [60, 61, END])):
        assert logitspec(target, path=path, store_tokens=room)._store.tokens_T.tolist() == kept
    with pytest.raises(
        CheckpointError, match=r"6 tokens, and drafter\.store_tokens = 0 keeps none"
    ):
        logitspec(target, path=path)
    small = type("Small", (), {"vocab_size": 32, "embedding": target.embedding})()
    with pytest.raises(CheckpointError, match="from -1 to 61, and the target knows 32"):
        logitspec(small, path=path, store_tokens=64)
    with pytest.raises(CheckpointError, match=r"drafter\.path: no store of texts in"):
        logitspec(target, path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"drafter\.path: no ngram\.json in"):
        ngram(target, path=str(tmp_path))
