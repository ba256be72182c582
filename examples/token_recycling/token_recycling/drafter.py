"""Token Recycling (arXiv 2408.08696): what the target nearly said is what it will say next time.

A matrix has for every token the target's best candidates to follow it, as they were when it last
stood in the text. No network, no gradient: to observe is to learn, each request for itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import Choose, Drafter, DrafterSettings, TargetInfo
from cosched.records import Proposal, SignalSpec
from cosched.registry import DRAFTERS


class TokenRecyclingSettings(DrafterSettings, frozen=True, forbid_unknown_fields=True):
    """``path`` is the folder of a saved matrix; left out, requests start with an empty one."""

    path: str = ""
    num_candidates: Annotated[int, msgspec.Meta(ge=1)] = 8


class State(NamedTuple):
    matrix_BVC: Tensor  # -1 where a token is unknown
    anchor_B: Tensor  # each slot's newest token


@DRAFTERS.register("token_recycling")
class TokenRecycling(Drafter):
    """Token Recycling: drafts what the target would have said the last time."""

    Settings: ClassVar = TokenRecyclingSettings
    draft_type = "none"  # it learns by itself: no network, nothing is trained or published

    def __init__(self, target: TargetInfo, num_draft_tokens: int, matrix_VC: Tensor) -> None:
        self._target, self._matrix_VC = target, matrix_VC
        self.num_draft_tokens = num_draft_tokens
        # After the final norm: the target's head makes its logits of these features.
        self.signal = SignalSpec(feature_layers=(target.num_layers,), conditioning="none")

    @classmethod
    def sketch(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> "TokenRecycling":
        shape = (target.vocab_size, min(settings.num_candidates, target.vocab_size))
        matrix_VC = torch.full(shape, -1, device=target.embedding.weight.device)
        return cls(target, settings.num_draft_tokens, matrix_VC)

    @classmethod
    def load(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> "TokenRecycling":
        """Read what ``save`` wrote, if a path is given."""
        drafter, path = cls.sketch(settings, target), Path(settings.path, "model.safetensors")
        if settings.path:
            try:
                drafter._matrix_VC = load_file(path)["matrix"].to(drafter._matrix_VC.device)
            except (OSError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"drafter.path: no matrix in {path}: {error}") from error
            if (found := len(drafter._matrix_VC)) != target.vocab_size:
                raise CheckpointError(f"{path} knows {found} tokens, not {target.vocab_size}")
        return drafter

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"matrix": self._matrix_VC}, directory / "model.safetensors")

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, "TokenRecycling"]:
        warm_VC = torch.rand(target.vocab_size, target.vocab_size).topk(4).indices
        starts = {"empty": warm_VC * 0 - 1, "warm": warm_VC}
        return {name: cls(target, num_draft_tokens, start) for name, start in starts.items()}

    def not_for_sglang(self) -> list[str]:
        return ["it has no network that a worker of SGLang could run"]

    @property
    def cache_bytes_per_token(self) -> int:
        return 0  # a matrix a slot, however long its text is

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        del max_length, window
        start = self._matrix_VC
        return State(start.repeat(max_batch, 1, 1), start.new_zeros(max_batch))

    @torch.no_grad()
    def observe(
        self, state: State, slot: int, tokens_R1: Tensor, features_RF: Tensor | None
    ) -> None:
        assert features_RF is not None
        last = {token: row for row, token in enumerate(tokens_R1[:-1].tolist())}
        logits = self._target.head(features_RF[list(last.values())])
        state.matrix_BVC[slot, list(last)] = logits.topk(self._matrix_VC.shape[1]).indices
        state.anchor_B[slot] = tokens_R1[-1]

    def propose(self, state: State, num_slots: int, choose: Choose) -> Proposal:
        token_B = state.anchor_B[:num_slots]
        # Each candidate is half as likely as the one before; behind an unknown token comes any.
        spread_C = 0.5 ** torch.arange(self._matrix_VC.shape[1], device=token_B.device)
        tokens, logits = [], []
        for k in range(self.num_draft_tokens):
            row_BC = state.matrix_BVC[range(num_slots), token_B]
            known_BC = (row_BC >= 0) * spread_C
            nothing_BV = known_BC.new_zeros(num_slots, self._target.vocab_size)
            mass_BV = nothing_BV.scatter_add(1, row_BC.clamp_min(0), known_BC)
            logits.append((mass_BV + (known_BC.sum(-1, keepdim=True) == 0)).log())
            tokens.append(token_B := choose(k, logits[-1]))
        return Proposal(torch.stack(tokens, 1), torch.stack(logits, 1))

    def move_slot(self, state: State, source: int, destination: int) -> None:
        for kept, empty in zip(state, (self._matrix_VC, 0), strict=True):
            kept[destination], kept[source] = kept[source].clone(), empty
