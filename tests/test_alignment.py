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

NEW = 100  # tokens a text


@pytest.fixture(scope="module")
def drafter(target: Target) -> Eagle3Drafter:
    """A head that has seen these texts, so that many drafts are accepted and many are not."""
    drafter = make_drafter(target)
    requests = make_requests(target, count=3, prompt=9, new=NEW)
    observer = make_coscheduler(target, drafter, every=2, lr=3e-3)
    decode(make_engine(target, drafter, requests, 3, observer=observer), requests)
    return drafter


def test_committed_paths_carry_the_rows_of_their_text(
    target: Target, drafter: Eagle3Drafter
) -> None:
    """On committed text teacher row k is the target's at anchor + k, computed afresh."""
    requests = make_requests(target, count=3, prompt=9, new=NEW)
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


def test_a_segment_brings_what_was_refused(target: Target, drafter: Eagle3Drafter) -> None:
    """Row q behind the text is the target's behind refused token q, and of the last round nothing."""
    rounds = serve(target, drafter, make_requests(target, count=1, prompt=9, new=NEW))
    segments = [segment for round_ in rounds for segment in round_.segments]
    text = torch.cat([segments[0].tokens_R1, *(one.tokens_R1[1:] for one in segments[1:])])
    assert segments[0].refused is None  # of the prompt
    seen = 0
    for segment, round_ in zip(segments[1:-1], rounds[1:-1], strict=True):
        (block,) = round_.blocks
        refused, accepted = segment.refused, block.num_accepted
        if accepted == len(block.path_K):
            assert refused is None
            continue
        assert refused is not None
        assert torch.equal(refused.tokens_Q, block.path_K[accepted:])
        seen += 1
        if seen % 9 == 0:
            prefix = torch.cat((text[: block.anchor + 1], block.path_K))
            model = target.model(input_ids=prefix[None], output_hidden_states=True)
            rows = slice(block.anchor + 1 + accepted, None)
            expected = model.logits[0, rows]
            assert torch.allclose(target.head(refused.teacher_QX), expected, atol=1e-3)
            after = torch.cat([model.hidden_states[layer + 1][0, rows] for layer in (0, 1)], -1)
            assert torch.allclose(refused.features_QF[:, : after.shape[-1]], after, atol=1e-3)
    assert seen > 20


def test_accepted_rows_end_at_the_refusal(target: Target, drafter: Eagle3Drafter) -> None:
    """``rows: accepted`` keeps rows 0 to a, a being the refused draft; ``all`` keeps K rows."""
    rounds = serve(target, drafter, make_requests(target, count=3, prompt=9, new=NEW))
    cut = collected(target, drafter, "accepted", None, rounds)
    whole = collected(target, drafter, "all", None, rounds)
    assert cut is not None
    assert whole is not None
    blocks = [b for r in rounds for b in r.blocks][: cut.weights_RNK.shape[1]]
    expected = [min(block.num_accepted + 1, 3) for block in blocks]
    assert cut.weights_RNK[0].sum(-1).tolist() == expected
    assert whole.weights_RNK.min() == 1
