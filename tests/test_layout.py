"""What the host knows of a batch is what the device would say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cosched.engines.embedded.target import Target
from cosched.loop.layout import counted_rows, first_places
from cosched.records import Rows, SignalBatch
from cosched.testing.harness import collected, make_requests, serve
from cosched.training.shares import share_of
from tests.helpers.drafts import make_drafter


def batch_of(target: Target, rows: Rows) -> SignalBatch:
    drafter = make_drafter(target)
    requests = make_requests(target, count=3, prompt=9, new=60)
    found = collected(target, drafter, rows, 24, serve(target, drafter, requests, max_batch=3))
    assert found is not None
    return found


def assert_alike(known: SignalBatch) -> None:
    assert known.known is not None
    asked = replace(known, layout=None)
    assert known.last_start == asked.last_start
    host, device = counted_rows(known, "hidden"), counted_rows(asked, "hidden")
    assert torch.equal(host.places_M, device.places_M)
    assert torch.equal(host.teacher_TX[host.says_M], device.teacher_TX[device.says_M])
    assert len(host.teacher_TX) == len(device.teacher_TX)
    for one in (host, device):
        all_MX = known.teacher_RNKX.flatten(0, 2)
        assert torch.equal(all_MX[one.first_T], one.teacher_TX)


@pytest.mark.parametrize("rows", ["delayed", "accepted", "refused", "all"])
def test_rows_that_count_and_rows_that_are_alike(target: Target, rows: Rows) -> None:
    """As many and the same as the tensors have, by their values; of shares of the batch as well."""
    batch = batch_of(target, rows)
    assert_alike(batch)
    for rank in range(2):
        assert_alike(share_of(batch, rank, 2)[0])
    assert_alike(first_places(batch, 1))
    assert first_places(batch, batch.weights_RNK.shape[-1]) is batch


def test_shares_weigh_the_same_whoever_is_asked(target: Target) -> None:
    batch = batch_of(target, "refused")
    for rank in range(3):
        known, asked = (share_of(b, rank, 3)[1] for b in (batch, replace(batch, layout=None)))
        assert known == pytest.approx(asked, rel=1e-6)


def test_a_layout_is_void_for_other_tensors(target: Target) -> None:
    """Whoever replaces weights or a teacher need not know that there is a layout."""
    batch = batch_of(target, "delayed")
    assert replace(batch, temperatures=None).known is batch.layout
    for name in ("starts_R", "weights_RNK", "teacher_RNKX"):
        assert replace(batch, **{name: getattr(batch, name).clone()}).known is None
    weights = batch.weights_RNK.clone()
    weights[0] = 0
    places = counted_rows(replace(batch, weights_RNK=weights), "hidden").places_M
    assert len(places) < batch.weights_RNK.count_nonzero()


def test_rows_at_several_temperatures_stay_apart(target: Target) -> None:
    """Two requests may have said the same, and sample at different temperatures."""
    batch = batch_of(target, "delayed")
    twice = replace(
        batch,
        teacher_RNKX=batch.teacher_RNKX[:1].expand_as(batch.teacher_RNKX),
        weights_RNK=torch.ones_like(batch.weights_RNK),
    )
    one = counted_rows(replace(twice, temperatures=None), "hidden")
    several = counted_rows(replace(twice, temperatures=(0.0, 0.7, 1.0)), "hidden")
    assert len(one.teacher_TX) < len(several.teacher_TX)
    size = batch.weights_RNK[0].numel()
    assert torch.equal(several.first_T[several.says_M] // size, several.places_M // size)
