"""The tiny world's drafts in SGLang itself, with the CPU support: lossless, and of use."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "tinyworld"
NUM_TOKENS = 96

CHAIN = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
TREE = {"num_steps": 3, "eagle_topk": 2, "num_draft_tokens": 6}

pytestmark = pytest.mark.sglang


@functools.cache
def prompts() -> list[list[int]]:
    """Two texts of each domain, tokenised."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "target")
    files = sorted((WORLD / "prompts").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()[:2]]
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]


@pytest.fixture(scope="module")
def decode(server_environment: dict[str, str]) -> Any:
    """Decode all prompts greedily with an engine that takes these arguments; remembered."""
    known: dict[str, list[dict[str, Any]]] = {}

    def run(dtype: str, algorithm: str | None = None, **settings: Any) -> list[dict[str, Any]]:
        engine = {"model_path": str(WORLD / "target"), "dtype": dtype}
        if algorithm:
            engine["speculative_algorithm"] = algorithm
            engine["speculative_draft_model_path"] = str(WORLD / algorithm.lower())
            engine |= {f"speculative_{name}": value for name, value in settings.items()}
        order = json.dumps({"prompts": prompts(), "tokens": NUM_TOKENS, "engine": engine})
        if order not in known:
            process = subprocess.run(
                [sys.executable, "-m", "tests.sglang.decode", order],
                env=server_environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert process.returncode == 0, process.stderr[-8000:]
            known[order] = json.loads(process.stdout.splitlines()[-1])
        return known[order]

    return run


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Show a measured figure among the results of a passing test."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n  {line}\n")

    return show


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def accept_length(answers: list[dict[str, Any]]) -> float:
    """Tokens a verification, the target's own included; the first token is the prefill's."""
    rounds = sum(answer["rounds"] for answer in answers)
    return sum(len(answer["tokens"]) - 1 for answer in answers) / rounds


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_eagle3_changes_the_speed_and_not_the_text(
    decode: Any, shape: dict[str, int], report: Callable[[str], None]
) -> None:
    """float32, where greedy choices have no ties; a wrong mask or cache row shows in the text."""
    plain = decode("float32")
    speculative = decode("float32", "EAGLE3", **shape)
    assert tokens(speculative) == tokens(plain)
    report(f"EAGLE3 {shape}: accept length {accept_length(speculative):.2f}")
    assert accept_length(speculative) > 1.3  # an untrained draft has 1.0


def test_dflash_changes_the_speed_and_not_the_text(
    decode: Any, report: Callable[[str], None]
) -> None:
    """float32 as well, which stock SGLang's DFLASH refuses: it casts embeddings to bfloat16."""
    plain = decode("float32")
    speculative = decode("float32", "DFLASH", num_draft_tokens=4)
    assert tokens(speculative) == tokens(plain)
    report(f"DFLASH: accept length {accept_length(speculative):.2f}")
    assert accept_length(speculative) > 1.3  # an untrained draft has 1.0
