"""The target's own answers, as drafts are trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.realworld.answers import AnswerPlan, generate
from cosched.realworld.recorded import FEATURE_LAYERS, read

QUESTIONS = [(f"q{n}", f"What is {n}?") for n in range(3)]
LAYERS = (1, 5, 9)  # that the tiny target has
PLAN = AnswerPlan(shards=2, questions=2, max_batch=2, max_new_tokens=6, layers=LAYERS)


@pytest.fixture(scope="module")
def target() -> Target:
    """The tiny one."""
    return Target.load("tinyworld/target", torch.device("cpu"), torch.float32)


def answer(target: Target, directory: Path, plan: AnswerPlan = PLAN) -> list[int]:
    counted: list[int] = []
    generate(target, QUESTIONS, directory, 0, plan, lambda number, _text: counted.append(number))
    return counted


def test_rows_are_the_targets_own(target: Target, tmp_path: Path) -> None:
    """What is kept of an answer is what a forward pass over its whole text gives: training that
    reads it needs none. Rows of another request, or one place off, would teach nonsense."""
    answer(target, tmp_path)
    answers = list(read(tmp_path, (9, 1)))
    assert len(answers) == PLAN.shards * PLAN.questions
    for one in answers:
        rows = len(one.tokens_T) - 1
        assert one.num_prompt < len(one.tokens_T) <= one.num_prompt + PLAN.max_new_tokens
        ids = one.tokens_T[None, :-1]
        cache = target.new_cache(1, rows)
        whole = target.forward(ids, torch.arange(rows)[None], cache, (9, 1))
        assert whole.features_BTF is not None
        # bfloat16 keeps eight bits
        torch.testing.assert_close(
            one.features_TF.float(), whole.features_BTF[0], rtol=8e-3, atol=8e-3
        )
        torch.testing.assert_close(one.hidden_TH.float(), whole.hidden_BTH[0], rtol=8e-3, atol=8e-3)


def test_a_shard_that_is_there_stays(target: Target, tmp_path: Path) -> None:
    """An interrupted run goes on where it was: answers take hours."""
    answer(target, tmp_path, replace(PLAN, shards=1))
    first = (tmp_path / "0000" / "rows.safetensors").read_bytes()
    counted = answer(target, tmp_path)
    assert 0 < sum(counted) <= PLAN.questions * PLAN.max_new_tokens  # of the second shard alone
    assert (tmp_path / "0000" / "rows.safetensors").read_bytes() == first
    assert len(list(read(tmp_path, LAYERS))) == PLAN.shards * PLAN.questions


def test_the_same_question_is_answered_otherwise_in_another_shard(
    target: Target, tmp_path: Path
) -> None:
    """Behind the last question the first comes again: a copy of its answer would teach nothing."""
    answer(target, tmp_path, replace(PLAN, questions=3, max_new_tokens=12))
    texts = [tuple(one.tokens_T.tolist()) for one in read(tmp_path, LAYERS)]
    assert len(set(texts)) == len(texts) == 6


def test_the_layers_that_are_kept_are_ones_that_eagle3_wants() -> None:
    """SGLang takes features after layers 1, n / 2 - 1 and n - 4 where a head does not say: of 30."""
    assert {1, 30 // 2 - 1, 30 - 4} <= set(FEATURE_LAYERS)
