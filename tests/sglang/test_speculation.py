"""The tiny world's drafts in SGLang itself, with the CPU support: lossless, and of use."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sglang.serving import Decode, accept_length, embedded, prompts, rounds, tokens

CHAIN = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
TREE = {"num_steps": 3, "eagle_topk": 2, "num_draft_tokens": 6}

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [("EAGLE3", CHAIN), ("EAGLE3", TREE), ("DFLASH", {"num_draft_tokens": 4})],
    ids=["eagle3-chain", "eagle3-tree", "dflash"],
)
def test_speculation_changes_the_speed_and_not_the_text(
    decode: Decode, algorithm: str, shape: dict[str, int], report: Callable[[str], None]
) -> None:
    """float32, where greedy choices have no ties; a wrong mask or cache row shows in the text."""
    plain = decode("float32")
    speculative = decode("float32", algorithm, **shape)
    assert tokens(speculative) == tokens(plain)
    report(f"{algorithm} {shape}: accept length {accept_length(speculative):.2f}")
    assert accept_length(speculative) > 1.3  # an untrained draft has 1.0


@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [("EAGLE3", CHAIN), ("DFLASH", {"num_draft_tokens": 4})],
    ids=["eagle3", "dflash"],
)
def test_the_embedded_engine_drafts_what_sglang_drafts(
    decode: Decode, algorithm: str, shape: dict[str, int], report: Callable[[str], None]
) -> None:
    """As many rounds for every request: figures of one engine speak for the other."""
    served = decode("float32", algorithm, **shape)
    own = embedded(algorithm.lower(), prompts())
    assert tokens(own) == tokens(served)
    report(f"{algorithm}: rounds in SGLang {rounds(served)}, embedded {rounds(own)}")
    assert rounds(own) == rounds(served)
