"""Requests that sample in SGLang on a CPU: their texts have the target's distribution, exactly.

Of the tiny world's vocabulary top-k leaves four tokens at each place, so the probabilities of all texts
of four tokens can be computed, by the target itself, and compared with how often each came.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosched.engines.embedded.target import Target
from cosched.engines.sglang.cpu.sampling import top_k_renorm_prob, top_p_renorm_prob
from cosched.settings.load import load_config, to_yaml
from cosched.testing.sampling import p_value
from tests.sglang.serving import ROOT, WORLD, Answers, Decode, accept_length, prompts, tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # several engines a test

FALSE_ALARM = 1e-4  # of each comparison: what the server draws depends on the order of its requests
TOP_K, LENGTH, NUM_DRAWS = 4, 4, 1000
SAMPLING = {"temperature": 1.3, "top_k": TOP_K}
NUCLEUS = {"temperature": 1.3, "top_p": 0.5}
MANY = {"max_running_requests": 32, "max_total_tokens": 16384, "disable_radix_cache": True}
SHAPES = {
    "eagle3-chain": ("EAGLE3", {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}),
    "eagle3-tree": ("EAGLE3", {"num_steps": 3, "eagle_topk": 2, "num_draft_tokens": 7}),
    "dflash": ("DFLASH", {"num_draft_tokens": 4}),
}
FIXED = "drafter.length.kind=fixed"
CHANGING = "drafter.length={kind: goodput, explore_share: 1.0, explore_rounds: 2}"
TREE = "drafter.top_k=2"
OFTEN = ("adapt.policy.rounds=4", "adapt.replay.anchors=32", "adapt.guard.kind=finite")


@functools.cache
def target() -> Target:
    return Target.load(str(WORLD / "target"), torch.device("cpu"), torch.float32)


@functools.cache
def likely_texts() -> dict[tuple[int, ...], float]:
    """All texts that can come of the first prompt with top-k, and the probability of each."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        ids = torch.tensor([[*prompts()[0], *text] for text in texts])
        p_MV = top_k_renorm_prob((logits(ids) / SAMPLING["temperature"]).softmax(-1), TOP_K)
        texts = {
            (*text, int(token)): chance * float(p_V[token])
            for (text, chance), p_V in zip(texts.items(), p_MV, strict=True)
            for token in p_V.nonzero()[:, 0]
        }
    return texts


@torch.no_grad()
def logits(ids: Tensor) -> Tensor:
    return target().model(input_ids=ids).logits[:, -1].float()


def p_values(answers: Answers) -> list[float]:
    """Of the token at each place, and of the whole text; small where it is not the target's."""
    likely, number = likely_texts(), len(answers)
    texts = [tuple(text) for text in tokens(answers)]
    assert set(texts) <= likely.keys(), "a token that top-k cuts off"
    found = []
    for picked in (*((place,) for place in range(LENGTH)), tuple(range(LENGTH))):
        parts = sorted({tuple(text[i] for i in picked) for text in likely})
        at = {part: i for i, part in enumerate(parts)}
        observed, expected = torch.zeros(len(parts)), torch.zeros(len(parts))
        for text in texts:
            observed[at[tuple(text[i] for i in picked)]] += 1
        for text, chance in likely.items():
            expected[at[tuple(text[i] for i in picked)]] += chance * number
        found.append(p_value(observed, expected))
    return found


def sampled(decode: Decode, *args: Any, **more: Any) -> Answers:
    return decode(
        "float32",
        *args,
        **{
            "texts": prompts()[:1],
            "repeat": NUM_DRAWS,
            "num_tokens": LENGTH,
            "engine": MANY,
            "sampling": [SAMPLING],
            **more,
        },
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_has_the_targets_distribution(
    shape: str, decode: Decode, report: Callable[[str], None]
) -> None:
    """Stock workers, chains and trees; SGLang's own CPU path takes the best token at every place."""
    algorithm, settings = SHAPES[shape]
    answers = sampled(decode, algorithm, **settings)
    found = p_values(answers)
    report(f"{shape}: p {min(found):.3f} at least, accept length {accept_length(answers):.2f}")
    assert min(found) > FALSE_ALARM
    assert accept_length(answers) > 1.1  # drafts stand now and then


@pytest.mark.parametrize("drafted", [FIXED, CHANGING, TREE], ids=["as many", "changing", "trees"])
def test_publications_leave_the_distribution_alone(
    drafted: str, decode: Decode, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """The draft changes between rounds, many times, and how much of it is drafted as well; the target's
    distribution stays."""
    words = ["drafter.kind=eagle3", drafted, *OFTEN]
    config = load_config(ROOT / "configs" / "serve_tiny_cpu.yaml", words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    events = tmp_path / "events.jsonl"
    answers = sampled(
        decode,
        "COSCHED_EAGLE3",
        "eagle3",
        variables={
            "COSCHED_CONFIG": str(tmp_path / "config.yaml"),
            "COSCHED_EVENTS": str(events),
        },
        **SHAPES["eagle3-tree" if drafted == TREE else "eagle3-chain"][1],
        repeat=NUM_DRAWS * 3 // 2,
    )
    told = [json.loads(line) for line in events.read_text().splitlines()]
    kinds = [event["kind"] for event in told]
    numbers = {event["row"]["num_drafted"] for event in told if event["kind"] == "round"}
    found = p_values(answers)
    report(f"p {min(found):.3f} at least, {kinds.count('publication')} publications")
    assert (len(numbers) > 2) == (drafted != FIXED), numbers  # of a tree, along the accepted path
    assert kinds.count("publication") > 10
    assert min(found) > FALSE_ALARM


def test_one_batch_has_greedy_requests_and_others(decode: Decode) -> None:
    """Greedy requests say what they say alone, in the same rounds as others that sample."""
    algorithm, settings = SHAPES["eagle3-chain"]
    plain = decode("float32", texts=prompts()[:2], num_tokens=24)
    mixed = decode(
        "float32",
        algorithm,
        texts=prompts()[:2] * 2,
        num_tokens=24,
        sampling=[{}, {}, SAMPLING, NUCLEUS],
        **settings,
    )
    assert tokens(mixed)[:2] == tokens(plain)
    assert tokens(mixed)[2:] != tokens(plain)  # 24 tokens of several likely ones each
    assert inside_nucleus(tokens(mixed)[3])


def inside_nucleus(text: list[int]) -> bool:
    """Whether top-p leaves each of these tokens of the second prompt its place."""
    for place, token in enumerate(text):
        row = logits(torch.tensor([[*prompts()[1], *text[:place]]]))
        kept = top_p_renorm_prob(
            (row / NUCLEUS["temperature"]).softmax(-1), NUCLEUS["top_p"] + 1e-3
        )
        if not kept[0, token]:
            return False
    return True
