"""What a worker inside SGLang saw: prompts and verifications of tokens that count up."""

from __future__ import annotations

import torch

from cosched.engines.sglang.worker.collector import Prompt, Verified
from cosched.records import Segment

K, WIDTH = 3, 2


def prompt(name: str, start: int, length: int, whole: int) -> Prompt:
    tokens = torch.arange(start, start + length + 1)
    rows = Segment(name, start, tokens, None, torch.zeros(length, WIDTH))
    return Prompt(name, start, length, whole, rows)


def verified(*names: str, anchor: int = 0, watched: bool = True, iteration: int = 0) -> Verified:
    """Anchors and drafts are consecutive numbers, and so is what the target decided."""
    tokens = anchor + torch.arange(K + 1).repeat(len(names), 1)
    teacher = torch.arange(len(names) * (K + 1.0) * WIDTH).view(len(names), K + 1, WIDTH)
    return Verified(
        iteration=iteration,
        request_ids=names,
        version=7,
        tokens_BS=tokens,
        decided_BS=tokens + 1,
        features_BSF=None,
        teacher_BSX=teacher if watched else None,
        seconds=lambda: (0.25, 0.5),
    )
