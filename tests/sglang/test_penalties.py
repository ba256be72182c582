"""Penalties under speculation are SGLang's own affair: what it does there is the same with our worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cosched.settings.load import load_config, to_yaml
from tests.sglang.serving import ROOT, Decode, tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

SHAPE = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
PENALTIES = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2}


def test_a_penalty_means_what_it_means_to_stock_eagle3(
    decode: Decode, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """SGLang counts tokens for a penalty up to the round, not within it, so the text with one depends
    on where rounds end. With a draft that does not learn they end where stock EAGLE3's do."""
    file = tmp_path / "config.yaml"
    config = load_config(ROOT / "configs/serve_tiny_cpu.yaml", ["adapt.policy.kind=never"])
    file.write_text(to_yaml(config))
    stock = tokens(decode("float32", "EAGLE3", sampling=[PENALTIES], **SHAPE))
    ours = tokens(
        decode(
            "float32",
            "COSCHED_EAGLE3",
            "eagle3",
            sampling=[PENALTIES],
            variables={"COSCHED_CONFIG": str(file)},
            **SHAPE,
        )
    )
    assert ours == stock
    plain = tokens(decode("float32", sampling=[PENALTIES]))
    free = tokens(decode("float32"))
    assert plain != free  # they do something
    differ = sum(one != other for one, other in zip(stock, plain, strict=True))
    report(
        f"texts of {len(plain)} that differ from no speculation with the same penalties: {differ}; "
        f"without speculation penalties change {sum(a != b for a, b in zip(plain, free, strict=True))}"
    )
