"""Token Recycling (arXiv 2408.08696): what the target nearly said is what it will say next time.

A matrix has for every token the target's best one to follow it, as it was when that token was last
verified. No network, no gradient: to observe is to learn, each request for itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import Choose, Drafter, DrafterSettings, TargetInfo
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS


class TokenRecyclingSettings(DrafterSettings, frozen=True, forbid_unknown_fields=True):
    """``path`` is the folder of a saved matrix; left out, requests start with an empty one."""

    path: str = ""


class State(NamedTuple):
    best_BV: Tensor  # -1 where a token is unknown
    anchor_B: Tensor  # each slot's newest token


@DRAFTERS.register("token_recycling")
class TokenRecycling(Drafter):
    """Token Recycling: drafts what the target would have said the last time."""

    Settings: ClassVar = TokenRecyclingSettings
    draft_type = "none"  # it learns by itself: no network, nothing is trained or published

    def __init__(self, target: TargetInfo, num_draft_tokens: int, best_V: Tensor) -> None:
        self._target, self._best_V = target, best_V
        self.num_draft_tokens = num_draft_tokens
        self.slot_bytes = best_V.element_size() * target.vocab_size
        # After the final norm: the target's head makes its logits of these features.
        self.signal = SignalSpec(feature_layers=(target.num_layers,), conditioning="none")

    @classmethod
    def sketch(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> "TokenRecycling":
        best_V = torch.full((target.vocab_size,), -1, device=target.embedding.weight.device)
        return cls(target, settings.num_draft_tokens, best_V)

    @classmethod
    def load(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> "TokenRecycling":
        """Read what ``save`` wrote, if a path is given."""
        drafter, path = cls.sketch(settings, target), Path(settings.path, "model.safetensors")
        if settings.path:
            try:
                drafter._best_V = load_file(path)["best"].to(drafter._best_V.device)
            except (OSError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"drafter.path: no matrix in {path}: {error}") from error
            if (found := len(drafter._best_V)) != target.vocab_size:
                raise CheckpointError(f"{path} knows {found} tokens, not {target.vocab_size}")
        return drafter

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"best": self._best_V}, directory / "model.safetensors")

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, "TokenRecycling"]:
        warm_V = torch.randint(target.vocab_size, (target.vocab_size,))
        starts = {"empty": torch.full_like(warm_V, -1), "warm": warm_V}
        return {name: cls(target, num_draft_tokens, start) for name, start in starts.items()}

    def not_for_sglang(self) -> list[str]:
        return ["it has no network that a worker of SGLang could run"]

    @property
    def cache_bytes_per_token(self) -> int:
        return 0  # a matrix a slot, however long its text is

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        del max_length, window
        start = self._best_V
        return State(start.repeat(max_batch, 1), start.new_zeros(max_batch))

    @torch.no_grad()
    def observe(self, state: State, slot: int, segment: Segment) -> None:
        if (refused := segment.refused) is not None:  # first: what is text has the last word
            self._recycle(state.best_BV[slot], refused.tokens_Q, refused.features_QF)
        self._recycle(state.best_BV[slot], segment.tokens_R1[:-1], segment.features_RF)
        state.anchor_B[slot] = segment.tokens_R1[-1]

    def _recycle(self, best_V: Tensor, tokens_R: Tensor, features_RF: Tensor | None) -> None:
        assert features_RF is not None
        last = {token: row for row, token in enumerate(tokens_R.tolist())}
        best_V[list(last)] = self._target.head(features_RF[list(last.values())]).argmax(-1)

    def propose(
        self, state: State, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        del choose  # it has no distribution to choose from: its tokens alone
        tokens = [state.anchor_B[:num_slots]]
        for _ in range(num_draft_tokens):
            best_B = state.best_BV[range(num_slots), tokens[-1]]
            tokens.append(torch.where(best_B < 0, tokens[-1], best_B))  # unknown: it comes again
        return Proposal(torch.stack(tokens[1:], 1))

    def move_slot(self, state: State, source: int, destination: int) -> None:
        for kept, empty in zip(state, (self._best_V, 0), strict=True):
            kept[destination], kept[source] = kept[source].clone(), empty
