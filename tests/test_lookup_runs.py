"""Drafters that copy, in whole runs: a store that requests share, what check counts, what they cost."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import convert

from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import SamplingVerifier
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import Segment
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config
from cosched.testing.harness import decode, make_engine, make_requests
from cosched.testing.sampling import FALSE_ALARM, p_values, sampling_target
from drafters.logitspec import LogitSpecDrafter, LogitSpecSettings
from tests.helpers.cli import run_cli
from tests.helpers.experiments import run_without_updates, write


def shared(target: Target, num_draft_tokens: int = 3) -> LogitSpecDrafter:
    settings = LogitSpecSettings(
        kind="logitspec", num_draft_tokens=num_draft_tokens, store_tokens=4096
    )
    return LogitSpecDrafter.load(settings, target)


def test_with_a_shared_store_greedy_text_is_the_targets(target: Target) -> None:
    """One request's text changes another's drafts, and nothing else; asked again, it is all known."""
    requests = make_requests(target, count=5, prompt=9, new=48)
    plain = decode(make_engine(target, None, requests), requests)
    drafter = shared(target)
    for turn in range(2):
        engine = make_engine(target, drafter, requests, max_batch=3)
        finished = list(engine.generate(requests))
        assert {one.request.id: list(one.tokens) for one in finished} == plain
        rounds = sum(len(one.rounds) for one in finished)
        if turn:  # every round but those with which an answer begins or ends
            assert rounds <= 5 * (48 / 4 + 2)


def test_with_a_shared_store_sampled_text_follows_the_target() -> None:
    """The store is that of thousands of finished requests with the same prompt."""
    target, sampling = sampling_target(), SamplingParams(1.0)
    found = p_values(target, shared(target, 2), SamplingVerifier(sampling), sampling)
    assert min(found) > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", pytest.param("logitspec", marks=pytest.mark.long)])
def test_a_run_takes_no_updates_and_adapted_is_frozen(
    settings: dict, tmp_path: Path, kind: str
) -> None:
    """From a file without a path: nothing is trained, arms agree round by round, texts are plain's."""
    settings["drafter"] = {"kind": kind, "num_draft_tokens": 4, "window": 48}
    settings["workload"]["max_new_tokens"] = 32
    del settings["adapt"]
    folder, arms = run_without_updates(tmp_path, settings)
    assert arms["adapted"]["tau"] == arms["frozen"]["tau"] > 1.2
    assert "learns by itself" in (folder / "report.html").read_text()
    saved = folder / "checkpoints" / "adapted"
    code, _, err = run_cli("check", "-c", write(tmp_path, settings), f"drafter.path={saved}")
    assert code == 0, err


def test_check_counts_what_they_hold(settings: dict, tmp_path: Path) -> None:
    """Four bytes a token of a text and of the store, and a row of logits for every request."""
    settings["engine"]["max_batch"] = 3
    for kind, more, store in (
        ("ngram", {}, 0),
        ("logitspec", {"store_tokens": 5000}, 4 * 5000),
    ):
        settings["drafter"] = {"kind": kind, "window": 48, **more}
        config = load_config(write(tmp_path, settings))
        target, drafter = sketch(config)
        found = footprint(config, target, drafter)
        longest = config.workload.prompt_tokens + config.workload.max_new_tokens
        row = 4 * target.vocab_size if kind == "logitspec" else 0
        assert found.draft_cache == 4 * 3 * longest
        assert found.draft_store == 3 * row + store
        assert found.added == found.draft_cache + found.draft_store
        code, out, err = run_cli("check", "-c", write(tmp_path, settings))
        assert code == 0, err
        assert "draft's store" in out


@pytest.mark.parametrize("key", ["max_ngram=0", "store_tokens=-1", "store_tokens=2000000"])
def test_what_is_not_allowed_is_refused(settings: dict, tmp_path: Path, key: str) -> None:
    """By name, before anything is loaded."""
    settings["drafter"] = {"kind": "logitspec"}
    code, _, err = run_cli("check", "-c", write(tmp_path, settings), f"drafter.{key}")
    assert code == 2
    assert f"drafter.{key.partition('=')[0]}" in err


@pytest.mark.parametrize("kind", ["ngram", "logitspec"])
@pytest.mark.parametrize("text", ["varied", "loop"])
def test_a_round_takes_less_than_a_millisecond(target: Target, kind: str, text: str) -> None:
    """``observe`` and ``propose`` over 2,048 tokens; a loop, where everything matches, is the worst.

    The median of many: about a tenth of the bound here, so that a busy machine does not matter.
    """
    drafter = DRAFTERS.get(kind).load(
        convert({"kind": kind, "num_draft_tokens": 8}, DRAFTERS.get(kind).Settings), target
    )
    length, generator = 2048, np.random.default_rng(0)
    tokens = generator.zipf(1.3, length) % 64 if text == "varied" else np.arange(length) % 5
    tokens_T, logits_V = torch.from_numpy(tokens), torch.zeros(target.vocab_size)
    state = drafter.new_state(1, length, None)
    drafter.observe(state, 0, Segment("r", 0, tokens_T, None, None, logits_V=logits_V))
    seconds = []
    for _ in range(100):
        began = time.perf_counter()
        drafter.observe(
            state, 0, Segment("r", length - 4, tokens_T[-4:], None, None, logits_V=logits_V)
        )
        drafter.propose(state, 1, lambda _k, logits_BV: logits_BV.argmax(-1), 8)
        seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[50] < 1e-3
