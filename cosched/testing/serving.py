"""What every drafter owes to the text that it must not change, and to who shares a batch with it.

Letters: B slots, K drafted tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import SamplingVerifier
from cosched.loop.lengths import DraftLengths
from cosched.testing.harness import Watcher, decode, make_coscheduler, make_engine
from cosched.testing.lengths import ByOwnCertainty
from cosched.testing.sampling import FALSE_ALARM, p_values, sampling_target
from cosched.testing.specimen import (
    NUM_DRAFT_TOKENS,
    SERVINGS,
    WINDOW,
    Feeder,
    Specimen,
    close,
    make_texts,
    takes_long,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.engines.embedded.target import Target
    from cosched.protocols import DraftLength
    from cosched.records import ServedBlock, VerifyRound


class ServingContract:
    """Part of ``DrafterContract``: text, batches, slots and windows."""

    def test_row_k_judges_draft_k(self, specimen: Specimen) -> None:
        """Teacher row k is what the target says behind the anchor and drafts 0..k - 1.

        The verdict follows: drafts agree with their rows up to the first refusal and not there.
        Rows that are off by one place agree almost nowhere, so the statement can fail.
        """
        rounds = specimen.trained[1].rounds
        blocks = [block for round_ in rounds for block in round_.blocks]
        assert sum(block.num_accepted for block in blocks) >= 20, "too little was accepted to tell"
        text = _text_of(rounds, "r0")
        for block in [block for block in blocks if block.request_id == "r0"][::7]:
            prefix = torch.cat((text[: block.anchor + 1], block.path_K))
            logits = specimen.target.model(input_ids=prefix[None]).logits[0, block.anchor : -1]
            assert torch.allclose(specimen.target.head(block.teacher_KX), logits, atol=1e-3)
        accepted = [block for block in blocks if block.num_accepted]
        assert all(_agrees(specimen.target, block, 0) for block in accepted)
        longer = [
            block for block in accepted if len(block.path_K) > 1
        ]  # one row has no other place
        shifted = sum(_agrees(specimen.target, block, 1) for block in longer)
        assert shifted < 0.5 * len(longer)

    @SERVINGS
    def test_greedy_text_is_the_targets(
        self, specimen: Specimen, max_batch: int, window: int | None
    ) -> None:
        """Served frozen, greedy text is plain decoding's, token for token."""
        assert specimen.served(max_batch, window).texts == specimen.plain

    def test_greedy_text_is_the_targets_while_it_learns(self, specimen: Specimen) -> None:
        """The same in a batch of three, across many publications."""
        drafter, served, teacher = specimen.trained
        assert served.texts == specimen.plain
        if drafter.network() is not None:
            assert teacher.version >= 20

    @pytest.mark.slow
    def test_windowed_greedy_text_is_the_targets_while_it_learns(self, specimen: Specimen) -> None:
        """The same with a window, one request at a time."""
        drafter = specimen.make()
        teacher = make_coscheduler(specimen.target, drafter, every=4, lr=3e-3, window=WINDOW)
        served = specimen.decode(drafter, 1, WINDOW, teacher)
        assert served.texts.items() <= specimen.plain.items()

    @takes_long
    @pytest.mark.parametrize(
        ("trained", "num_draws"), [(True, 600), pytest.param(False, 2000, marks=pytest.mark.slow)]
    )
    def test_sampled_text_follows_the_target(
        self, specimen: Specimen, trained: bool, num_draws: int
    ) -> None:
        """Sampled text has the target's exact distribution, frozen and while the draft changes."""
        target = sampling_target()
        drafter = specimen.make(target, num_draft_tokens=2)
        observer = make_coscheduler(target, drafter, every=2, lr=3e-3) if trained else None
        sampling = SamplingParams(1.0)
        found = p_values(target, drafter, SamplingVerifier(sampling), sampling, observer, num_draws)
        assert min(found) > FALSE_ALARM

    @takes_long
    @pytest.mark.parametrize("max_batch", [pytest.param(1, marks=pytest.mark.slow), 3])
    def test_greedy_text_is_the_targets_at_any_length(
        self, specimen: Specimen, max_batch: int, length: DraftLength
    ) -> None:
        """However many tokens are drafted, in every round and by each request, while the draft learns.

        Alone and in a batch of three, with rounds that draft nothing.
        """
        drafter = specimen.make()
        teacher = make_coscheduler(specimen.target, drafter, every=4, lr=3e-3)
        lengths = DraftLengths(length, drafter.num_draft_tokens)
        served = specimen.decode(drafter, max_batch, None, teacher, lengths)
        assert served.texts.items() <= specimen.plain.items()
        drafted = {len(block.path_K) for round_ in served.rounds for block in round_.blocks}
        assert len(drafted) > 1

    @takes_long
    def test_sampled_text_follows_the_target_at_any_length(
        self, specimen: Specimen, length: DraftLength
    ) -> None:
        """Sampled text has the target's exact distribution, whatever is drafted, while it learns."""
        target = sampling_target()
        drafter = specimen.make(target, num_draft_tokens=2)
        teacher = make_coscheduler(target, drafter, every=2, lr=3e-3)
        sampling = SamplingParams(1.0)
        verifier, lengths = SamplingVerifier(sampling), DraftLengths(length, 2)
        found = p_values(target, drafter, verifier, sampling, teacher, 600, lengths)
        assert min(found) > FALSE_ALARM

    @takes_long
    def test_a_batch_says_what_each_would_alone_at_any_length(self, specimen: Specimen) -> None:
        """Requests that draft unequally many tokens in one round disturb each other in nothing.

        They sample: greedy text is the target's in a batch and alone, which others show.
        """
        verifier = SamplingVerifier(SamplingParams(1.0))
        watcher = Watcher()
        alone, together = (
            decode(
                make_engine(
                    specimen.target,
                    specimen.make(),
                    specimen.requests,
                    max_batch,
                    verifier=verifier,
                    observer=watcher,
                    lengths=ByOwnCertainty(NUM_DRAFT_TOKENS),
                ),
                specimen.requests,
            )
            for max_batch in (1, 3)
        )
        assert alone == together
        ragged = [len({len(b.path_K) for b in round_.blocks}) > 1 for round_ in watcher.rounds]
        drafter = specimen.make()
        assert any(ragged) or drafter.network() is None or drafter.num_tree_tokens

    def test_it_drafts_on_behind_rounds_without_drafts(self, specimen: Specimen) -> None:
        """What was committed meanwhile is taken in at once, however many rounds it came in.

        Also beside a request that has just begun, near the end of the room that there is.
        """
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=2, length=64)
        waiting = Feeder(drafter, texts)
        later = waiting.texts.pop()
        waiting.lengths.pop()
        for length in range(5, 50):
            waiting.observe([length])
        waiting.admit(later)
        waiting.observe([50, 60])
        fresh = Feeder(drafter, texts)
        fresh.observe([50, 60])
        assert close(waiting.propose(), fresh.propose())

    def test_a_batch_drafts_what_each_would_alone(self, specimen: Specimen) -> None:
        """A request's proposals do not depend on what else is in the batch."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        together = Feeder(drafter, texts).run(12)
        for place, text in enumerate(texts):
            alone = Feeder(drafter, [text], first=place).run(12)
            assert close(together[:, place : place + 1], alone)

    def test_fewer_drafts_are_the_first_of_more(self, specimen: Specimen) -> None:
        """Asked for fewer tokens it drafts the first of those it would, and the next round is as ever."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=2, length=64)
        whole, fewer = Feeder(drafter, texts), Feeder(drafter, texts)
        for round_ in range(3 * NUM_DRAFT_TOKENS):
            number = 1 + round_ % NUM_DRAFT_TOKENS
            assert close(fewer.step(number), whole.step()[:, :number])

    def test_a_slot_that_moves_goes_on(self, specimen: Specimen) -> None:
        """After ``move_slot`` the request drafts on in its new slot, and its old one is empty."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        feeder = Feeder(drafter, texts)
        feeder.run(5)
        feeder.move(2, 0)  # text 0 is done, text 2 takes its place
        feeder.admit(texts[0])
        lengths = [feeder.lengths[0] + 2, feeder.lengths[1] + 1, 9]
        feeder.observe(lengths)
        fresh = Feeder(drafter, [texts[2], texts[1], texts[0]])
        fresh.observe(lengths)
        assert close(feeder.propose(), fresh.propose())

    def test_a_window_wider_than_the_text_changes_nothing(self, specimen: Specimen) -> None:
        """A draft that may look 1000 tokens back at a text of 64 drafts what it drafts without."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=2, length=64)
        assert close(Feeder(drafter, texts, 1000).run(12), Feeder(drafter, texts).run(12))


def _text_of(rounds: list[VerifyRound], request_id: str) -> Tensor:
    """Tokens of a request from its segments."""
    parts = [s for round_ in rounds for s in round_.segments if s.request_id == request_id]
    return torch.cat([parts[0].tokens_R1, *(part.tokens_R1[1:] for part in parts[1:])])


def _agrees(target: Target, block: ServedBlock, shift: int) -> bool:
    says_K = target.head(block.teacher_KX).argmax(-1).roll(shift)
    stands_K = says_K == block.path_K
    # Drafts past the end of a request's text were not asked for.
    accepted = min(block.num_accepted, len(stands_K))
    ended = block.num_committed <= accepted
    refused = accepted == len(stands_K) or ended or not stands_K[accepted]
    return bool(stands_K[:accepted].all()) and bool(refused)
