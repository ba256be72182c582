"""What served requests gave to learn from."""

from __future__ import annotations

from cosched.engines.embedded.target import Target
from cosched.records import SignalBatch
from cosched.testing.harness import collected, make_requests, serve
from tests.helpers.drafts import make_drafter


def make_batch(target: Target, count: int, new: int) -> SignalBatch:
    """Of so many requests, of so many new tokens each."""
    drafter, requests = make_drafter(target), make_requests(target, count=count, prompt=9, new=new)
    rounds = serve(target, drafter, requests, max_batch=count)
    sample = collected(target, drafter, "delayed", None, rounds)
    assert sample is not None
    return sample
