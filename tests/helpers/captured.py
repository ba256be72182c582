"""Batches of requests of unequal length, and frames for them."""

from __future__ import annotations

from typing import Any

from cosched.engines.embedded.target import Target
from cosched.records import Rows, SignalBatch
from cosched.testing.harness import make_buffer, make_requests, serve
from cosched.training.frames import Frames

WINDOW, ANCHORS, MOST = 64, 32, 4


def make_frames(rows: Rows = "delayed") -> Frames:
    return Frames(WINDOW, ANCHORS, MOST, along_text=rows == "delayed", longest=500)


def ragged(
    target: Target, drafter: Any, count: int, rows: Rows = "delayed", new: int = 40, seed: int = 3
) -> SignalBatch:
    """What so many running requests of unequal length give."""
    buffer = make_buffer(target, drafter, rows, None, WINDOW, ANCHORS)
    requests = make_requests(target, count=count, prompt=9, new=new, seed=seed)
    for round_ in serve(target, drafter, requests, max_batch=count):
        if round_.finished:
            break
        buffer.collect(round_)
    batch = buffer.sample()
    assert batch is not None
    return batch
