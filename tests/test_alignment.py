"""Which teacher rows stand behind a path; what every drafter owes is in the contract tests."""

from __future__ import annotations

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.testing.harness import (
    collected,
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    serve,
)
from drafters.eagle3 import Eagle3Drafter
from tests.helpers.drafts import make_drafter


@pytest.fixture(scope="module")
def drafter(target: Target) -> Eagle3Drafter:
    """A head that has seen these texts, so that many drafts are accepted and many are not."""
    drafter = make_drafter(target)
    requests = make_requests(target, count=3, prompt=9, new=150)
    observer = make_coscheduler(target, drafter, every=2, lr=3e-3)
    decode(make_engine(target, drafter, requests, 3, observer=observer), requests)
    return drafter


def test_committed_paths_carry_the_rows_of_their_text(
    target: Target, drafter: Eagle3Drafter
) -> None:
    """On committed text teacher row k is the target's at anchor + k, computed afresh."""
    requests = make_requests(target, count=3, prompt=9, new=150)
    rounds = serve(target, drafter, requests, max_batch=3)
    batch = collected(target, drafter, "delayed", None, rounds)
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


def test_accepted_rows_end_at_the_refusal(target: Target, drafter: Eagle3Drafter) -> None:
    """``rows: accepted`` keeps rows 0 to a, a being the refused draft; ``all`` keeps K rows."""
    rounds = serve(target, drafter, make_requests(target, count=3, prompt=9, new=150))
    cut = collected(target, drafter, "accepted", None, rounds)
    whole = collected(target, drafter, "all", None, rounds)
    assert cut is not None
    assert whole is not None
    blocks = [b for r in rounds for b in r.blocks][: cut.weights_RNK.shape[1]]
    expected = [min(block.num_accepted + 1, 3) for block in blocks]
    assert cut.weights_RNK[0].sum(-1).tolist() == expected
    assert whole.weights_RNK.min() == 1
