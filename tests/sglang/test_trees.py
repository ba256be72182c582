"""EAGLE-3 drafting trees inside SGLang: what is watched is the path that was accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sglang.adapting import LENGTH, OFTEN, TREE, plainly, shifted
from tests.sglang.serving import Decode, rounds, tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # several engines a test


def test_trees_learn_and_the_text_stays_the_targets(
    serve: Any, decode: Decode, report: Callable[[str], None]
) -> None:
    """Over many publications; a tree accepts more than a chain, and more again once it has learnt."""
    texts, plain = shifted(), plainly(decode)
    chain = serve("eagle3", "adapt.policy.kind=never")
    frozen = serve("eagle3", "adapt.policy.kind=never", trees=True)
    adapted = serve("eagle3", *OFTEN, trees=True)
    assert tokens(frozen.answers) == tokens(plain)
    assert tokens(adapted.answers) == tokens(plain)
    assert not adapted.of("failure")
    assert len(adapted.of("publication")) >= 20
    seen = [one.figures(texts).tau_novel for one in (chain, frozen, adapted)]
    report(f"trees: tau novel of a chain {seen[0]:.3f}, of trees {seen[1]:.3f} -> {seen[2]:.3f}")
    assert 1 < seen[0] < seen[1] < seen[2]


def test_watching_trees_changes_nothing(serve: Any, decode: Decode) -> None:
    """As many rounds a request as SGLang's own trees take."""
    stock = decode("float32", "EAGLE3", "eagle3", texts=shifted(), num_tokens=LENGTH, **TREE)
    watching = serve("eagle3", "adapt.policy.rounds=1000000", trees=True)
    assert rounds(watching.answers) == rounds(stock)


def test_the_rows_of_the_accepted_path_teach(serve: Any, report: Callable[[str], None]) -> None:
    """Of committed text: the teacher says, greedily, what an answer says next, and the draft, given the
    features of its rows, misses as much of it as where chains were verified. (What it does not say, in
    both, is of prompts.)"""
    shares: list[tuple[float, float]] = []
    for trees in (False, True):
        served = serve(
            "eagle3", "adapt.policy.rounds=4", "adapt.loss.rows=delayed",
            "adapt.replay.window=1024", fault="fidelity", trees=trees,
        )  # fmt: skip
        assert not served.of("failure")
        results = [event["result"] for event in served.of("update")]
        rows = sum(result["num_rows"] for result in results)
        _, missed, agreed, _ = (
            sum(counts) for counts in zip(*(one["losses"] for one in results), strict=True)
        )
        assert rows > 100
        shares.append((agreed / rows, missed / rows))
    (chain, missed_chain), (trees, missed_trees) = shares
    report(
        f"teacher agrees {chain:.3f} (chains), {trees:.3f} (trees); draft misses {missed_chain:.3f}, "
        f"{missed_trees:.3f}"
    )
    assert min(chain, trees) > 0.9
    assert abs(chain - trees) < 0.02
    assert abs(missed_chain - missed_trees) < 0.05
