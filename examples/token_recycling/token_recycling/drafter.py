"""Token Recycling (arXiv 2408.08696): what the target nearly said is what it will say next time.

A matrix has for every token the target's best candidates to follow it, as they were when the token
last stood in the text. No network, no gradient: to observe is to learn. Every request starts from
the loaded matrix and learns for itself. B slots, R rows, K drafted tokens, C candidates, V words.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import Choose, DrafterSettings, TargetInfo
from cosched.records import Proposal, SignalSpec
from cosched.registry import DRAFTERS

if TYPE_CHECKING:
    from collections.abc import Mapping


class TokenRecyclingSettings(DrafterSettings, frozen=True, forbid_unknown_fields=True):
    """``path`` is the folder of a saved matrix; left out, requests start with an empty one."""

    path: str = ""
    num_candidates: Annotated[int, msgspec.Meta(ge=1)] = 8


class State(NamedTuple):
    """A matrix for each slot, -1 where a token is unknown, and each slot's newest token."""

    matrix_BVC: Tensor
    anchor_B: Tensor


@DRAFTERS.register("token_recycling")
class TokenRecycling:
    """Token Recycling: drafts what the target would have said the last time."""

    Settings: ClassVar = TokenRecyclingSettings
    cache_bytes_per_token = 0  # a matrix a slot, however long its text is

    def __init__(self, target: TargetInfo, num_draft_tokens: int, matrix_VC: Tensor) -> None:
        self._target, self._matrix_VC = target, matrix_VC
        self.num_draft_tokens = num_draft_tokens
        # After the final norm: the target's head makes its logits of these features.
        self.signal = SignalSpec(feature_layers=(target.num_layers,), conditioning="none")

    @classmethod
    def sketch(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> TokenRecycling:
        """One with an empty matrix."""
        shape = (target.vocab_size, min(settings.num_candidates, target.vocab_size))
        matrix_VC = torch.full(shape, -1, device=target.embedding.weight.device)
        return cls(target, settings.num_draft_tokens, matrix_VC)

    @classmethod
    def load(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> TokenRecycling:
        """Read what ``save`` wrote, if a path is given; raises CheckpointError if it cannot."""
        drafter = cls.sketch(settings, target)
        if settings.path:
            directory, device = Path(settings.path), drafter._matrix_VC.device
            try:
                drafter._matrix_VC = load_file(directory / "model.safetensors")["matrix"].to(device)
            except (OSError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"drafter.path: no matrix in {directory}: {error}") from error
            if (found := len(drafter._matrix_VC)) != target.vocab_size:
                raise CheckpointError(
                    f"drafter.path: {directory} knows {found} tokens, not {target.vocab_size}"
                )
        return drafter

    def save(self, directory: Path) -> None:
        """Write the matrix that requests start from."""
        shape = list(self._matrix_VC.shape)
        config = {
            "model_type": "token_recycling",
            "vocab_size": shape[0],
            "num_candidates": shape[1],
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_bytes(msgspec.json.encode(config))
        save_file({"matrix": self._matrix_VC}, directory / "model.safetensors")

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, TokenRecycling]:
        """One that starts empty, and one with a random matrix."""
        warm_VC = torch.rand(target.vocab_size, target.vocab_size).topk(4).indices
        starts = {"empty": torch.full_like(warm_VC, -1), "warm": warm_VC}
        return {name: cls(target, num_draft_tokens, start) for name, start in starts.items()}

    def network(self) -> None:
        """There is none: nothing is trained, nothing is published."""

    def not_for_sglang(self) -> list[str]:
        return ["it has no network that a worker of SGLang could run"]

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        del (
            max_length,
            window,
        )  # what it keeps does not grow with the text: a window changes nothing
        start_VC = self._matrix_VC
        return State(start_VC.repeat(max_batch, 1, 1), start_VC.new_zeros(max_batch))

    @torch.no_grad()
    def observe(self, state: State, slot: int, tokens_R1: Tensor, features_RF: Tensor) -> None:
        last = {token: row for row, token in enumerate(tokens_R1[:-1].tolist())}
        logits = self._target.head(features_RF[list(last.values())])
        state.matrix_BVC[slot, list(last)] = logits.topk(self._matrix_VC.shape[1]).indices
        state.anchor_B[slot] = tokens_R1[-1]

    def propose(self, state: State, num_slots: int, choose: Choose) -> Proposal:
        token_B = state.anchor_B[:num_slots]
        slots_B = torch.arange(num_slots, device=token_B.device)
        # A candidate is half as likely as the one before it; behind an unknown token comes any.
        spread_C = 0.5 ** torch.arange(self._matrix_VC.shape[1], device=token_B.device)
        tokens, logits = [], []
        for _ in range(self.num_draft_tokens):
            row_BC = state.matrix_BVC[slots_B, token_B]
            known_BC = (row_BC >= 0) * spread_C
            mass_BV = known_BC.new_zeros(num_slots, self._target.vocab_size)
            mass_BV.scatter_add_(1, row_BC.clamp_min(0), known_BC)
            unknown_B1 = known_BC.sum(-1, keepdim=True) == 0
            logits.append((mass_BV + unknown_B1).log())
            token_B = choose(len(tokens), logits[-1])
            tokens.append(token_B)
        return Proposal(torch.stack(tokens, 1), torch.stack(logits, 1))

    def move_slot(self, state: State, source: int, destination: int) -> None:
        for kept, empty in ((state.matrix_BVC, self._matrix_VC), (state.anchor_B, 0)):
            kept[destination] = kept[source].clone()
            kept[source] = empty
