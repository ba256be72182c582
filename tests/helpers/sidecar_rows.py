"""Rounds of a small form, and a queue that holds a few of them."""

from __future__ import annotations

import torch

from cosched.records import Segment, ServedBlock, VerifyRound
from cosched.sidecar.messages import RowForm
from cosched.sidecar.queue import RoundQueue
from cosched.sidecar.rows import Packer, size_of

FORM = RowForm(6, 4, "bfloat16", "float32")
VOCAB = 100


def make_round(
    rows: int = 5, drafted: int = 3, name: str = "one", finished: bool = False
) -> VerifyRound:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(VOCAB, (rows + 1,), generator=generator)
    teacher = torch.randn(rows, 4, generator=generator)
    features = torch.randn(rows, 6, generator=generator).bfloat16()
    block = ServedBlock(name, 7, tokens[1 : drafted + 1], torch.randn(drafted, 4), 2, 3)
    return VerifyRound(
        segments=(Segment(name, 7, tokens, features, teacher, temperature=0.5),),
        blocks=(block,),
        finished=(name,) if finished else (),
        draft_seconds=0.5,
        verify_seconds=0.25,
        num_running=2,
        tokens_left=9,
        num_queued=1,
    )


def make_queue(slots: int = 4, window: int = 8) -> RoundQueue:
    return RoundQueue(Packer(FORM, window, with_blocks=True), slots, size_of(16, FORM))
