"""What a policy of lengths is told of SGLang's rounds, and what SGLang is told of its choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cosched.engines.sglang.worker.lengths import ServedLengths
from cosched.loop.lengths import DraftLengths
from cosched.protocols import DraftLength, LengthSnapshot
from cosched.records import ServedBlock, VerifyRound
from tests.helpers.lengths import Scripted

K = 3


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Noted(DraftLengths):
    """Keeps what it is told."""

    def __init__(self, policy: DraftLength) -> None:
        super().__init__(policy, K, keeps_up=True)
        self.told: list[tuple[list[int], list[int], float]] = []

    def observe(
        self, drafted: Sequence[int], accepted: Sequence[int], tops: Any, seconds: float
    ) -> None:
        self.told.append((list(drafted), list(accepted), seconds))
        super().observe(drafted, accepted, tops, seconds)


def verification(*blocks: tuple[int, int]) -> VerifyRound:
    """A round whose passes took 0.75; of each request how many tokens were drafted and accepted."""
    made = tuple(
        ServedBlock(str(number), 0, torch.zeros(drafted), None, accepted, accepted + 1)
        for number, (drafted, accepted) in enumerate(blocks)
    )
    return VerifyRound((), made, (), 0.25, 0.5, num_running=len(made))


PROMPT = VerifyRound((), (), (), 0.0, 0.0, num_running=1)


def test_a_round_lasts_from_counts_to_counts() -> None:
    """Whatever SGLang does besides is in it, as serving is; an update of ours, between two rounds, is not."""
    clock = Clock()
    noted = Noted(Scripted(2))
    lengths = ServedLengths(noted, range(K + 1), K, clock)
    lengths.observe([verification((2, 1))])
    clock.now = 5.0
    with lengths.own_time():
        clock.now = 8.0
    clock.now = 9.0
    lengths.observe([verification((2, 2), (2, 0))])
    assert noted.told == [([2], [1], 0.75), ([2, 2], [2, 0], 6.0)]


def test_a_prompt_between_two_rounds_is_not_what_the_second_takes() -> None:
    """In order: SGLang may have launched the prompt before the counts of the first were known. Under load
    there is one between any two, and lengths would never be measured if such rounds were left out."""
    clock = Clock()
    noted = Noted(Scripted(1))
    lengths = ServedLengths(noted, range(K + 1), K, clock)
    lengths.observe([verification((1, 0))])
    clock.now = 7.0
    lengths.observe([PROMPT, verification((1, 1))])
    for later in (9.0, 11.0):
        clock.now = later
        lengths.observe([verification((1, 1))])
    lengths.observe([])  # counts of a round that was not watched
    clock.now = 20.0
    lengths.observe([PROMPT, verification((1, 1))])
    assert [seconds for _, _, seconds in noted.told] == [0.75, 0.75, 2.0, 2.0, 2.0]


def test_sglang_drafts_what_was_settled() -> None:
    """The first rank chooses and all settle; counts that come meanwhile change nothing under way."""
    lengths = ServedLengths(DraftLengths(Scripted(1, 0), K, keeps_up=True), (0, 1), K)
    assert lengths.candidate_steps == [0, 1, K]  # it starts with the most
    assert lengths.get_steps_for_batch(4) == K
    assert [lengths.choose(4), lengths.choose(4)] == [1, 0]
    lengths.settle(1)
    assert lengths.get_steps_for_batch(4) == 1
    assert lengths.on_verify_complete([0], 4) is None


def test_every_length_has_a_graph_for_every_batch() -> None:
    """SGLang leaves out batches for which its own policy would not choose a number; ours may choose any,
    and a round without its graph would be a slow one, just under load."""
    lengths = ServedLengths(DraftLengths(Scripted(0), K), range(K + 1), K)
    assert lengths.cuda_graph_bs_for_step(0) is None  # no graphs at all
    lengths.set_cuda_graph_bs([8, 1, 4])
    assert [lengths.cuda_graph_bs_for_step(step) for step in (0, K)] == [[1, 4, 8]] * 2


def test_a_draft_that_keeps_up_may_rest() -> None:
    """In SGLang it runs over what a round committed whether it drafted or not."""
    lengths = DraftLengths(Scripted(0), K, keeps_up=True)
    for _ in range(1000):
        assert lengths.of_round(2) == 0
        lengths.observe([0, 0], [0, 0], None, 1.0)


class Breaks(DraftLength):
    def choose(self, snapshot: LengthSnapshot) -> int:
        raise KeyError("the policy broke")


def test_a_policy_that_raises_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """SGLang ends its whole engine if a worker raises, and a line a round would fill its log."""
    lengths = ServedLengths(DraftLengths(Breaks(), K), range(K + 1), K)
    assert [lengths.choose(1) for _ in range(3)] == [K] * 3
    lengths.observe([verification((K, 0))])
    assert len(caplog.records) == 1
    assert "drafter.length does not work" in caplog.text
