"""Token Recycling (arXiv 2408.08696): what the target nearly said is what it will say next time.

A matrix has for every token the target's best ones to follow it, as they were when that token was last
verified. From the newest token a tree goes along it, the further the better the ranks it takes. No network,
no gradient: to observe is to learn, each request for itself.

Letters: B slots, V vocabulary, W candidates of a token, L tokens of a level.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError
from cosched.protocols import Choose, Drafter, DrafterSettings, TargetInfo
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS


class TokenRecyclingSettings(DrafterSettings, frozen=True, forbid_unknown_fields=True):
    """``path`` is the folder of a saved matrix; left out, requests start with an empty one.

    ``width`` is how many candidates each token has. A tree has the paths along which the product of the
    ranks, counted from 1, is no more than that; with 1 it is one path.
    """

    path: str = ""
    width: Annotated[int, Meta(ge=1, le=64)] = 4


class Level(NamedTuple):
    rows: list[int]  # that its tokens are behind
    behind: list[int]  # the same, counted on the level before
    ranks: list[int]


def levels(width: int, depth: int) -> list[Level]:
    found: list[Level] = []
    rooms, row = [width], 0  # ranks there are behind each row of a level, and the first of these
    for _ in range(depth):
        ways = [(at, rank) for at, room in enumerate(rooms) for rank in range(room)]
        behind, ranks = [at for at, _ in ways], [rank for _, rank in ways]
        found.append(Level([row + at for at in behind], behind, ranks))
        row += len(rooms)
        rooms = [rooms[at] // (rank + 1) for at, rank in ways]
    return found


class State(NamedTuple):
    best_BVW: Tensor  # -1 where a token is unknown
    anchor_B: Tensor  # each slot's newest token


@DRAFTERS.register("token_recycling")
class TokenRecycling(Drafter):
    """Token Recycling: drafts what the target would have said the last time."""

    Settings: ClassVar = TokenRecyclingSettings
    draft_type = "none"  # it learns by itself: no network, nothing is trained or published

    def __init__(self, target: TargetInfo, num_draft_tokens: int, best_VW: Tensor) -> None:
        self._target, self._best_VW = target, best_VW
        self._levels = levels(best_VW.shape[1], num_draft_tokens)
        self.num_draft_tokens = num_draft_tokens
        self.num_tree_tokens = sum(len(level.rows) for level in self._levels)
        self.slot_bytes = best_VW.element_size() * best_VW.numel()
        # After the final norm: the target's head makes its logits of these features.
        self.signal = SignalSpec(feature_layers=(target.num_layers,), conditioning="none")

    @classmethod
    def sketch(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> "TokenRecycling":
        shape, device = (target.vocab_size, settings.width), target.embedding.weight.device
        return cls(target, settings.num_draft_tokens, torch.full(shape, -1, device=device))

    @classmethod
    def load(cls, settings: TokenRecyclingSettings, target: TargetInfo) -> "TokenRecycling":
        """Read what ``save`` wrote, if a path is given."""
        drafter, path = cls.sketch(settings, target), Path(settings.path, "model.safetensors")
        if settings.path:
            try:
                best_VW = load_file(path)["best"].to(drafter._best_VW.device)
            except (OSError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"drafter.path: no matrix in {path}: {error}") from error
            if (found := tuple(best_VW.shape)) != (wanted := tuple(drafter._best_VW.shape)):
                raise CheckpointError(f"{path} has {found} tokens and candidates, not {wanted}")
            drafter._best_VW = best_VW
        return drafter

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"best": self._best_VW}, directory / "model.safetensors")

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, "TokenRecycling"]:
        warm_VW = torch.randint(target.vocab_size, (target.vocab_size, 4))
        starts = {"empty": torch.full_like(warm_VW, -1), "warm": warm_VW}
        return {name: cls(target, num_draft_tokens, start) for name, start in starts.items()}

    def not_for_sglang(self) -> list[str]:
        return ["it has no network that a worker of SGLang could run"]

    @property
    def cache_bytes_per_token(self) -> int:
        return 0  # a matrix a slot, however long its text is

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        del max_length, window
        start = self._best_VW
        return State(start.repeat(max_batch, 1, 1), start.new_zeros(max_batch))

    @torch.no_grad()
    def observe(self, state: State, slot: int, segment: Segment) -> None:
        if (refused := segment.refused) is not None:  # first: what is text has the last word
            self._recycle(state.best_BVW[slot], refused.tokens_Q, refused.features_QF)
        self._recycle(state.best_BVW[slot], segment.tokens_R1[:-1], segment.features_RF)
        state.anchor_B[slot] = segment.tokens_R1[-1]

    def _recycle(self, best_VW: Tensor, tokens_R: Tensor, features_RF: Tensor | None) -> None:
        assert features_RF is not None
        last = {token: row for row, token in enumerate(tokens_R.tolist())}
        logits = self._target.head(features_RF[list(last.values())])
        best_VW[list(last)] = logits.topk(best_VW.shape[1]).indices

    def propose(
        self, state: State, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        del choose  # it has no distribution to choose from: its tokens alone
        drawn = self._levels[:num_draft_tokens]
        tokens, slots = [state.anchor_B[:num_slots, None]], [[slot] for slot in range(num_slots)]
        for level in drawn:
            before_BL = tokens[-1][:, level.behind]
            best_BL = state.best_BVW[slots, before_BL, level.ranks]
            tokens.append(torch.where(best_BL < 0, before_BL, best_BL))  # unknown: it comes again
        tokens_BK = torch.cat(tokens[1:], 1)
        parents = tokens_BK.new_tensor([row for level in drawn for row in level.rows])
        return Proposal(tokens_BK, parents_BK=parents.expand_as(tokens_BK))

    def move_slot(self, state: State, source: int, destination: int) -> None:
        for kept, empty in zip(state, (self._best_VW, 0), strict=True):
            kept[destination], kept[source] = kept[source].clone(), empty
