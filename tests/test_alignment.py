"""Drafted token k is judged by verify row k, and replay gives what was served."""

from __future__ import annotations

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.records import Rows, ServedBlock, VerifyRound
from cosched.replay import ReplayBuffer, ReplayLimits
from drafters.eagle3 import Eagle3Drafter
from tests.conftest import make_drafter
from tests.helpers import Watcher, decode, make_coscheduler, make_engine, make_requests


@pytest.fixture(scope="module")
def drafter(target: Target) -> Eagle3Drafter:
    """A head that has seen these texts, so that many drafts are accepted and many are not."""
    drafter = make_drafter(target)
    requests = make_requests(target, count=3, prompt=9, new=150)
    observer = make_coscheduler(target, drafter, every=2, lr=3e-3)
    decode(make_engine(target, drafter, requests, 3, observer=observer), requests)
    return drafter


def served(target: Target, drafter, window: int | None, max_batch: int = 3) -> list[VerifyRound]:
    requests = make_requests(target, count=3, prompt=9, new=150)
    watcher = Watcher()
    engine = make_engine(target, drafter, requests, max_batch, observer=watcher, window=window)
    decode(engine, requests)
    return watcher.rounds


def buffer_of(
    target: Target, rounds: list[VerifyRound], rows: Rows, draft_window: int | None, window=400
) -> ReplayBuffer:
    limits = ReplayLimits(
        window, 10_000, 3, 1 << 20, 1 << 30, 3 * target.hidden_size * 4, target.hidden_size * 4
    )
    buffer = ReplayBuffer(limits, rows, draft_window)
    for round_ in rounds:
        if round_.finished:
            break  # a finished request leaves the buffer
        buffer.collect(round_)
    return buffer


def test_row_k_judges_draft_k(target: Target, drafter: Eagle3Drafter) -> None:
    """Teacher row k agrees with the draft up to the first refusal and disagrees there.

    Rows that are off by one place agree with the drafts of their neighbours instead: the same
    statement on shifted rows fails almost everywhere.
    """
    blocks = [b for r in served(target, drafter, None) for b in r.blocks]
    assert sum(block.num_accepted for block in blocks) > 20

    def verdicts(shift: int) -> list[bool]:
        return [_agrees(target, block, shift) for block in blocks if block.num_accepted > 0]

    assert all(verdicts(0))
    assert sum(verdicts(1)) < 0.2 * len(verdicts(1))


def _agrees(target: Target, block: ServedBlock, shift: int) -> bool:
    says_K = target.head(block.teacher_KX).argmax(-1).roll(shift)
    stands_K = says_K == block.path_K
    accepted = block.num_accepted
    refused = accepted == len(stands_K) or not stands_K[accepted]
    return bool(stands_K[:accepted].all()) and bool(refused)


def test_committed_paths_carry_the_rows_of_their_text(
    target: Target, drafter: Eagle3Drafter
) -> None:
    """On committed text teacher row k is the target's at anchor + k, computed afresh."""
    rounds = served(target, drafter, None)
    batch = buffer_of(target, rounds, "delayed", None).sample()
    assert batch is not None
    for r, start in enumerate(batch.starts_R.tolist()):
        assert start == 0
        length = int(batch.lengths_R[r])
        fresh = target.model(input_ids=batch.tokens_RC1[r, None, :length]).logits[0]
        for n in range(0, batch.anchors_RN.shape[1], 17):
            anchor = int(batch.anchors_RN[r, n])
            if not batch.weights_RNK[r, n].any():
                continue
            rows = fresh[anchor : anchor + 3]
            assert torch.allclose(target.head(batch.teacher_RNKX[r, n]), rows, atol=1e-3)
            path = batch.tokens_RC1[r, anchor + 1 : anchor + 4]
            assert torch.equal(batch.paths_RNK[r, n], path)


@pytest.mark.parametrize("draft_window", [None, 24])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_replay_gives_the_served_tokens(
    target: Target, drafter: Eagle3Drafter, draft_window: int | None, max_batch: int
) -> None:
    """Argmax of replayed rows equals every token that was served, accepted or not."""
    rounds = served(target, drafter, draft_window, max_batch)
    batch = buffer_of(target, rounds, "all", draft_window).sample()
    assert batch is not None
    replayed = drafter.replay(batch).argmax(-1)
    rows = batch.weights_RNK > 0
    assert int(rows.sum()) > 100
    assert torch.equal(replayed[rows], batch.paths_RNK[rows])
    shifted = batch.paths_RNK.roll(1, dims=1)
    assert not torch.equal(replayed[rows], shifted[rows])  # the comparison can tell


def test_accepted_rows_end_at_the_refusal(target: Target, drafter: Eagle3Drafter) -> None:
    """``rows: accepted`` keeps rows 0 to a, a being the refused draft; ``all`` keeps K rows."""
    rounds = served(target, drafter, None, max_batch=1)
    cut = buffer_of(target, rounds, "accepted", None).sample()
    whole = buffer_of(target, rounds, "all", None).sample()
    assert cut is not None
    assert whole is not None
    blocks = [b for r in rounds for b in r.blocks][: cut.weights_RNK.shape[1]]
    expected = [min(block.num_accepted + 1, 3) for block in blocks]
    assert cut.weights_RNK[0].sum(-1).tolist() == expected
    assert whole.weights_RNK.min() == 1


def test_a_window_wider_than_the_text_changes_nothing(
    target: Target, drafter: Eagle3Drafter
) -> None:
    """A draft that may look 1000 tokens back at a text of 160 drafts what it drafts without."""
    paths = [
        torch.stack([b.path_K for r in served(target, drafter, w) for b in r.blocks])
        for w in (None, 1000)
    ]
    assert torch.equal(paths[0], paths[1])
