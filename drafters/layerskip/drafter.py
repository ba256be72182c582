"""Self-speculation (SWIFT, arXiv 2410.06916; DEL, arXiv 2504.05598): the target drafts with some of its layers.

Nothing is trained: which layers are left out follows from what verification accepts (``choices.py``). It
drafts over the target's own keys and values, which every layer has of all that is committed. What it writes
at the newest token and behind it verification writes anew, before anything looks at it.

Letters: B slots, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from cosched.protocols import Choose, Drafter, DrafterSettings, LayersForward, TargetInfo
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS
from drafters.costs import layer_and_head
from drafters.layerskip.choices import Choices, skipped_sets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from drafters.layerskip.choices import Layers


class LayerskipSettings(DrafterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``shared``: what one request shows chooses for all of them; else each begins anew.

    It has no checkpoint and needs no ``path``. ``window`` changes nothing: the target sees all its text.
    """

    path: str = ""
    shared: bool = True


@dataclass(slots=True)
class Slot:
    """One request: where it stands, and by what its layers are chosen."""

    choices: Choices
    length: int = 0
    newest: int = 0
    drafted: tuple[int, int] | None = None  # without which set, and how many tokens


@dataclass(slots=True)
class State:
    """Of each slot what is known, and what runs the target's layers over the same slots."""

    slots: list[Slot]
    forward: LayersForward | None = None


@DRAFTERS.register("layerskip")
class LayerskipDrafter(Drafter):
    """Self-speculation: drafts with some of the target's own layers, which are chosen as it serves."""

    Settings: ClassVar = LayerskipSettings
    draft_type: ClassVar = "none"  # no network of its own
    needs_target = True

    def __init__(self, target: TargetInfo, num_draft_tokens: int, shared: bool) -> None:
        self._device = target.embedding.weight.device
        self.num_draft_tokens = num_draft_tokens
        self.signal = SignalSpec(feature_layers=(), conditioning="none")
        every = range(target.num_layers)
        skipped = skipped_sets(target.num_layers)
        self._kept: list[Layers] = [tuple(i for i in every if i not in one) for one in skipped]
        layer, head = layer_and_head(target)
        whole = target.num_layers * layer + head
        self._costs = [(len(kept) * layer + head) / whole for kept in self._kept]
        self._supposed = [1 - (len(one) / target.num_layers) ** 2 for one in skipped]
        self._shared = self._new_choices() if shared else None

    def _new_choices(self) -> Choices:
        return Choices(self._supposed, self._costs, self.num_draft_tokens)

    @classmethod
    def load(cls, settings: LayerskipSettings, target: TargetInfo) -> LayerskipDrafter:
        return cls(target, settings.num_draft_tokens, settings.shared)

    sketch = load  # ready to serve, too: there are no weights

    def save(self, directory: Path) -> None:
        """An empty folder: it has no weights, and finds its layers as it serves."""
        directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, LayerskipDrafter]:
        return {"each alone": cls(target, num_draft_tokens, shared=False)}

    def not_for_sglang(self) -> list[str]:
        return [
            "it has no network; a worker of SGLang would have to leave out layers of the target"
        ]

    def cost(self, num_draft_tokens: int) -> float:
        return num_draft_tokens * sum(self._costs) / len(self._costs)

    @property
    def cache_bytes_per_token(self) -> int:
        return 0  # it drafts over the target's

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        del max_length, window  # the target's keys and values are the engine's, and see all
        return State([self._new_slot() for _ in range(max_batch)])

    def _new_slot(self) -> Slot:
        return Slot(self._shared or self._new_choices())

    def lend(self, state: State, forward: LayersForward) -> None:
        state.forward = forward

    def observe(self, state: State, slot: int, segment: Segment) -> None:
        if segment.start == 0:
            state.slots[slot] = self._new_slot()
        one, num_new = state.slots[slot], len(segment.tokens_R1) - 1
        if one.drafted is not None:
            one.choices.observe(*one.drafted, accepted=num_new - 1)
            one.drafted = None
        one.length = segment.start + num_new + 1
        one.newest = int(segment.tokens_R1[-1])  # host waits for the device

    @torch.no_grad()
    def propose(
        self, state: State, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        slots = state.slots[:num_slots]
        chosen = {each: each.choose(num_draft_tokens) for each in {one.choices for one in slots}}
        left_out = [chosen[one.choices] for one in slots]
        for one, taken in zip(slots, left_out, strict=True):
            one.drafted = taken, num_draft_tokens
        ids_B = torch.tensor([one.newest for one in slots], device=self._device)
        positions_B = torch.tensor([one.length - 1 for one in slots], device=self._device)
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        for k in range(num_draft_tokens):
            at_k_BV = self._logits(state, left_out, ids_B, positions_B + k)
            if (picked_B := choose(k, at_k_BV)) is None:
                break
            tokens.append(ids_B := picked_B)
            logits.append(at_k_BV)
        return Proposal(torch.stack(tokens, 1), torch.stack(logits, 1))

    def _logits(
        self, state: State, left_out: list[int], ids_B: Tensor, positions_B: Tensor
    ) -> Tensor:
        """What each slot's layers make of its newest token: one pass for all that leave out the same."""
        assert state.forward is not None, "an engine that runs the target lends it"
        found: list[Tensor] = []
        for one in (sets := sorted(set(left_out))):
            rows = [int(taken == one) for taken in left_out] if len(sets) > 1 else None
            at = ids_B[:, None], positions_B[:, None]
            found.append(state.forward(*at, self._kept[one], rows)[:, 0])
        return sum(found[1:], found[0])  # in each what is of other slots is zeros

    def move_slot(self, state: State, source: int, destination: int) -> None:
        state.slots[destination] = state.slots[source]
        state.slots[source] = self._new_slot()
