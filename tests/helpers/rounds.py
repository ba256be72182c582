"""Rounds and snapshots made up by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from hypothesis import strategies as st

from cosched.records import Segment, ServedBlock, Snapshot, VerifyRound


def snapshot(**changes: Any) -> Snapshot:
    """All zeros but for these."""
    fields = msgspec.structs.fields(Snapshot)
    zero = {field.name: 0 for field in fields if field.type in {int, float}}
    return msgspec.convert({**zero, **changes}, Snapshot)


def round_of(
    lengths: list[int], seconds: float = 0.01, drafted: int = 4, **changes: Any
) -> VerifyRound:
    """A round of four drafts a request, or so many, of which ``length - 1`` were accepted."""
    path = torch.zeros(drafted, dtype=torch.int64)
    blocks = [ServedBlock(str(i), 0, path, None, n - 1, n) for i, n in enumerate(lengths)]
    fields = {"finished": (), "num_running": len(lengths), **changes}
    return VerifyRound(
        (), tuple(blocks), draft_seconds=seconds / 4, verify_seconds=3 * seconds / 4, **fields
    )


ROW = st.tuples(
    st.integers(0, 5),  # request
    st.integers(1, 40),  # rows
    st.booleans(),  # with teacher rows
    st.booleans(),  # finished afterwards
    st.booleans(),  # a gap before it
)
"""What may arrive in a round, for ``numbered_round``."""


def numbered_round(
    request: int, start: int, count: int, teacher: bool, finished: bool
) -> VerifyRound:
    """Tokens, features and teacher rows that name their own position, so that a slip shows."""
    at = torch.arange(start, start + count)
    rows = at.float()[:, None].expand(-1, 3)
    segment = Segment(
        str(request), start, torch.arange(start, start + count + 1), rows, rows if teacher else None
    )
    path = torch.tensor([start + 1, start + 2])
    block = ServedBlock(str(request), start, path, rows[:1].expand(2, 3), 1, 2)
    done = (str(request),) if finished else ()
    return VerifyRound((segment,), (block,), done, 0.0, 0.0, 1)
