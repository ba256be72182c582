"""N-gram lookup, known as prompt lookup decoding: a text that repeats itself goes on as it did before.

Source: apoorvumang/prompt-lookup-decoding, in transformers as ``prompt_lookup_num_tokens`` and in vLLM
as the method ``ngram``. Those look for a few fixed lengths; here the longest end of the text that stood
there before counts, as in suffix decoding (arXiv 2411.04975), and of several places the latest.

Letters: B slots, K drafted tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from msgspec import Meta

from cosched.errors import CheckpointError
from cosched.protocols import Choose, Drafter, DrafterSettings, TargetInfo
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS
from drafters.lookup import TOKEN_BYTES, Texts, find, follow

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = "ngram.json"


class NgramSettings(DrafterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``max_ngram`` is how many of the text's last tokens are compared with an earlier place at most.

    It has no checkpoint and needs no ``path``. ``window`` is how far back it looks.
    """

    path: str = ""
    max_ngram: Annotated[int, Meta(ge=1)] = 16


@DRAFTERS.register("ngram")
class NgramDrafter(Drafter):
    """N-gram lookup: drafts what followed the last time the text had the longest same end."""

    Settings: ClassVar = NgramSettings
    draft_type: ClassVar = "none"  # no network: what it knows is the text

    def __init__(self, target: TargetInfo, num_draft_tokens: int, max_ngram: int) -> None:
        self._device = target.embedding.weight.device
        self._max_ngram = max_ngram
        self.num_draft_tokens = num_draft_tokens
        self.signal = SignalSpec(feature_layers=(), conditioning="none")

    @classmethod
    def sketch(cls, settings: NgramSettings, target: TargetInfo) -> NgramDrafter:
        """Ready to serve, too: there are no weights.

        Raises:
            CheckpointError: a path is given at which none of these was saved.
        """
        if settings.path and not Path(settings.path, FILE).is_file():
            raise CheckpointError(
                f"drafter.path: no {FILE} in {settings.path}; ngram has no checkpoint, leave path out"
            )
        return cls(target, settings.num_draft_tokens, settings.max_ngram)

    @classmethod
    def load(cls, settings: NgramSettings, target: TargetInfo) -> NgramDrafter:
        return cls.sketch(settings, target)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_text(json.dumps({"max_ngram": self._max_ngram}), encoding="utf-8")

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, NgramDrafter]:
        return {
            "suffix": cls(target, num_draft_tokens, 16),
            "one token": cls(target, num_draft_tokens, 1),
        }

    def not_for_sglang(self) -> list[str]:
        return ["it has no network; SGLang has --speculative-algorithm NGRAM for it"]

    @property
    def cache_bytes_per_token(self) -> int:
        return TOKEN_BYTES

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> Texts:
        return Texts.empty(max_batch, max_length, window)

    def observe(self, state: Texts, slot: int, segment: Segment) -> None:
        state.extend(slot, segment)

    def propose(
        self, state: Texts, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        del choose  # it has no distribution to choose from
        drafts_BK = np.empty((num_slots, num_draft_tokens), np.int64)
        for slot in range(num_slots):
            text_T = state.of(slot)
            follows_M, lengths_M = find(text_T, text_T, self._max_ngram)
            if len(follows_M):
                longest = int(np.flatnonzero(lengths_M == lengths_M.max())[-1])
                drafts_BK[slot] = follow(text_T, int(follows_M[longest]), num_draft_tokens)
            else:
                drafts_BK[slot] = text_T[-1]  # a token that is new: a guess as good as any
        return Proposal(torch.from_numpy(drafts_BK).to(self._device))

    def move_slot(self, state: Texts, source: int, destination: int) -> None:
        state.move(source, destination)
