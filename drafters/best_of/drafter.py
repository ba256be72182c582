"""Best of several: each request is drafted for by whoever gets most tokens a second for it.

A drafter with a network knows the language, and learns what it is wrong about; one that copies is right
wherever a text says again what it was given. Which of them is, is seen from committed text alone, request
by request (``drafters.best_of.record``): so a choice does not depend on what else is in the batch, and
nothing that is drawn in a round has a part in who drafts in it, which keeps sampled text exact.

At most one of them may be a model: two cannot pick their tokens in one round, nor would both be trained.
What trains is that one's, scopes, replay and checkpoint. Its updates do not depend on who drafts, as long
as they are made of committed text (``adapt.loss.rows: delayed``, the default).

Letters: B slots, K drafted tokens, V vocabulary, C context rows, H hidden width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from cosched.errors import ConfigError
from cosched.protocols import (
    MOST_UNDRAFTED,
    Choose,
    ComposedSettings,
    Drafter,
    LayersForward,
    TargetInfo,
)
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS
from drafters.best_of.merging import Best, Merging
from drafters.best_of.record import Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cosched.records import Scope, SignalBatch

Named = tuple[str, Drafter]


class BestOfSettings(ComposedSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``costs`` is what a round's drafting takes with each, as a share of what its verification takes.

    Those are ``seconds.draft / seconds.verify`` of an arm of its own in ``summary.json``; null: as each
    counts itself, a network by its weights over the target's and a copy as nothing. ``window`` is how
    many of the last tokens the model sees; beside one, those that copy look at the whole text.
    """

    costs: tuple[Annotated[float, Meta(ge=0)], ...] | None = None


class State(NamedTuple):
    """Of each drafter its own, and of each slot what is known."""

    parts: tuple[Any, ...]
    records: list[Record]


@DRAFTERS.register("best_of")
class BestOfDrafter(Drafter):
    """Best of several drafters: chooses for each request by what each gets accepted, and its cost."""

    Settings: ClassVar = BestOfSettings
    draft_type: ClassVar = "none"  # by itself; of its drafters another may say more

    def __init__(
        self,
        drafters: Sequence[Named],
        target: TargetInfo,
        num_draft_tokens: int,
        costs: Sequence[float] | None = None,
    ) -> None:
        self._named = tuple(drafters)
        self._parts = tuple(drafter for _, drafter in drafters)
        self._target = target
        self.num_draft_tokens = num_draft_tokens
        models = [number for number, part in enumerate(self._parts) if _is_model(part)]
        if len(models) > 1:
            names = " and ".join(self._named[number][0] for number in models)
            raise ConfigError(
                f"drafter.drafters: {names} each draft with a model, and one of them at most can; "
                f"leave one out, or replace it by one that copies (ngram, logitspec)"
            )
        if trees := [kind for kind, part in self._named if part.num_tree_tokens]:
            raise ConfigError(
                f"drafter.drafters: {trees[0]} drafts trees, and what is chosen among are chains; leave "
                f"out its top_k or branches"
            )
        if costs is not None and len(costs) != len(self._parts):
            raise ConfigError(
                f"drafter.costs: one for each of {len(self._parts)} drafters, got {len(costs)}"
            )
        self._model = models[0] if models else None
        self.costs = None if costs is None else tuple(costs)
        self._costs_of_number = [self._costs_of(number) for number in range(num_draft_tokens + 1)]
        signals = [part.signal for part in self._parts]
        signals.sort(key=lambda one: one.conditioning == "none")  # the model's features come first
        self.signal = SignalSpec(
            tuple(dict.fromkeys(layer for one in signals for layer in one.feature_layers)),
            conditioning=signals[0].conditioning,
            last_logits=any(one.last_logits for one in signals),
        )
        self.needs_target = any(part.needs_target for part in self._parts)
        self.slot_bytes = sum(part.slot_bytes for part in self._parts)
        self.shared_bytes = sum(part.shared_bytes for part in self._parts)

    def _costs_of(self, number: int) -> list[float]:
        """Of each drafter, for so many tokens; one that was given is of the most."""
        own = [part.cost(number) for part in self._parts]
        if self.costs is None:
            return own
        most = [part.cost(self.num_draft_tokens) for part in self._parts]
        return [
            given * (one / whole if whole else 1)
            for given, one, whole in zip(self.costs, own, most, strict=True)
        ]

    # --- from and to files -----------------------------------------------------------------

    @classmethod
    def load(cls, settings: BestOfSettings, target: TargetInfo) -> BestOfDrafter:
        return cls._make("load", settings, target)

    @classmethod
    def sketch(cls, settings: BestOfSettings, target: TargetInfo) -> BestOfDrafter:
        return cls._make("sketch", settings, target)

    @classmethod
    def _make(cls, how: str, settings: BestOfSettings, target: TargetInfo) -> BestOfDrafter:
        """Raises what a drafter's own loading does, and ConfigError where they do not go together."""
        drafters: list[Named] = []
        for section in settings.drafters:
            kind = DRAFTERS.get(section["kind"])
            whole = {**section, "num_draft_tokens": settings.num_draft_tokens}
            drafters.append(
                (section["kind"], getattr(kind, how)(msgspec.convert(whole, kind.Settings), target))
            )
        return cls(drafters, target, settings.num_draft_tokens, settings.costs)

    def save(self, directory: Path) -> None:
        """Each in a folder of its own, ``0-eagle3`` and so on, in its own format."""
        for number, (kind, part) in enumerate(self._named):
            part.save(directory / f"{number}-{kind}")

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, BestOfDrafter]:
        """With costs of a real model: here, where a target is as small as its draft, none would pay."""

        def named(kind: str, key: str) -> Named:
            return kind, DRAFTERS.get(kind).examples(target, num_draft_tokens)[key]

        ngram, logitspec = named("ngram", "suffix"), named("logitspec", "suffix")
        made = {
            "chain": [named("eagle3", "plain"), ngram, logitspec],
            "copies": [ngram, logitspec],
            "block": [logitspec, named("dflash", "plain")],
        }
        return {
            key: cls(
                drafters,
                target,
                num_draft_tokens,
                [0.15 if part.network() else 0.0 for _, part in drafters],
            )
            for key, drafters in made.items()
        }

    def not_for_sglang(self) -> list[str]:
        return ["it chooses among several drafters, and a worker of SGLang runs one"]

    # --- serving ---------------------------------------------------------------------------

    def cost(self, num_draft_tokens: int) -> float:
        return max(part.cost(num_draft_tokens) for part in self._parts)

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(part.cache_bytes_per_token for part in self._parts)

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        seen = [window if self._model in {None, n} else None for n in range(len(self._parts))]
        parts = [
            part.new_state(max_batch, max_length, back)
            for part, back in zip(self._parts, seen, strict=True)
        ]
        return State(tuple(parts), [self._new_record() for _ in range(max_batch)])

    def _new_record(self) -> Record:
        return Record(len(self._parts), self._model, self.num_draft_tokens)

    def lend(self, state: State, forward: LayersForward) -> None:
        for part, own in zip(self._parts, state.parts, strict=True):
            part.lend(own, forward)

    def observe(self, state: State, slot: int, segment: Segment) -> None:
        for part, own in zip(self._parts, state.parts, strict=True):
            part.observe(own, slot, self._as_asked(part, segment))
        if segment.start == 0:
            state.records[slot] = self._new_record()
            state.records[slot].length = 1
        record = state.records[slot]
        record.observe(segment.tokens_R1[1:].tolist())  # host waits for the device
        if self._model is not None and record.rounds_without_model >= MOST_UNDRAFTED:
            # What it has not taken in is bounded; what it drafts of it here is not used.
            self._by_model(state, slot + 1, Best(), 1)

    def _as_asked(self, part: Drafter, segment: Segment) -> Segment:
        """With the features that this drafter asked for."""
        layers = part.signal.feature_layers
        if layers == self.signal.feature_layers:
            return segment
        refused = segment.refused
        if refused is not None:
            refused = replace(refused, features_QF=self._features(refused.features_QF, layers))
        return replace(
            segment, features_RF=self._features(segment.features_RF, layers), refused=refused
        )

    def _features(self, features: Tensor | None, layers: Sequence[int]) -> Tensor | None:
        """Those of some layers ``[..., F]`` out of those of all."""
        if features is None or not layers:
            return None
        by_layer = features.unflatten(-1, (-1, self._target.hidden_size))
        there = self.signal.feature_layers
        return by_layer[..., [there.index(layer) for layer in layers], :].flatten(-2)

    def propose(
        self, state: State, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        model, costs = self._model, self._costs_of_number[num_draft_tokens]
        copied = {
            number: part.propose(state.parts[number], num_slots, choose, num_draft_tokens)
            for number, part in enumerate(self._parts)
            if number != model
        }
        listed = {number: one.tokens_BK.tolist() for number, one in copied.items()}
        taken: list[int] = []
        for slot, record in enumerate(state.records[:num_slots]):
            taken.append(record.choose(num_draft_tokens, costs))
            proposed = {number: tokens[slot] for number, tokens in listed.items()}
            record.propose(proposed, num_draft_tokens if taken[-1] == model else 0)
        tokens_BK = torch.stack(
            [
                copied[one if one != model else next(iter(copied))].tokens_BK[slot]
                for slot, one in enumerate(taken)
            ]
        )
        if model is None or model not in taken:
            return Proposal(tokens_BK)
        if set(taken) == {model}:
            return self._by_model(state, num_slots, choose, num_draft_tokens)
        copies_B = torch.tensor([one != model for one in taken], device=tokens_BK.device)
        merging = Merging(choose, tokens_BK, copies_B)
        return merging.whole(self._by_model(state, num_slots, merging, num_draft_tokens))

    def _by_model(
        self, state: State, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        assert self._model is not None
        for record in state.records[:num_slots]:
            record.rounds_without_model = 0
        own = state.parts[self._model]
        return self._parts[self._model].propose(own, num_slots, choose, num_draft_tokens)

    def move_slot(self, state: State, source: int, destination: int) -> None:
        for part, own in zip(self._parts, state.parts, strict=True):
            part.move_slot(own, source, destination)
        state.records[destination] = state.records[source]
        state.records[source] = self._new_record()

    # --- learning: the model's -------------------------------------------------------------

    @property
    def _learner(self) -> Drafter:
        assert self._model is not None
        return self._parts[self._model]

    def network(self) -> nn.Module | None:
        return None if self._model is None else self._learner.network()

    def scopes(self) -> Mapping[str, Scope]:
        return self._learner.scopes()

    def clone(self, dtype: torch.dtype) -> BestOfDrafter:
        drafters = [
            (kind, part if number != self._model else part.clone(dtype))
            for number, (kind, part) in enumerate(self._named)
        ]
        return BestOfDrafter(drafters, self._target, self.num_draft_tokens, self.costs)

    @property
    def state_width(self) -> int:
        return self._learner.state_width

    def replay_states(self, batch: SignalBatch) -> Tensor:
        layers = self._learner.signal.feature_layers
        if layers != self.signal.feature_layers:
            batch = replace(batch, features_RCF=self._features(batch.features_RCF, layers))
        return self._learner.replay_states(batch)

    def project(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self._learner.project(states, tokens)

    def target_ids(self) -> Tensor | None:
        return None if self.network() is None else self._learner.target_ids()


def _is_model(drafter: Drafter) -> bool:
    return drafter.network() is not None or drafter.cost(1) > 0
