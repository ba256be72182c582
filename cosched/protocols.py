"""The roles of plugins. A plugin inherits its role, and from it the default of all that it leaves out.

A class that lacks a member of its role is refused when it is registered (``cosched.registry``). What else the house has roles for is in ``cosched.loop.roles``: no plugin plays those.

Shapes: B requests, K drafted tokens, R rows of a request, N anchors, F feature width, V vocabulary,
M = R * N * K student rows of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, runtime_checkable

import msgspec
from msgspec import Meta

from cosched.policies import MOST_UNDRAFTED as MOST_UNDRAFTED  # so that plugins have all from here
from cosched.policies import DraftLength as DraftLength
from cosched.policies import Expert as Expert
from cosched.policies import ExpertSettings as ExpertSettings
from cosched.policies import LengthSettings as LengthSettings
from cosched.policies import LengthSnapshot as LengthSnapshot
from cosched.policies import Objective as Objective
from cosched.policies import ObjectiveSettings as ObjectiveSettings
from cosched.policies import Policy as Policy
from cosched.policies import PolicySettings as PolicySettings
from cosched.records import (
    DraftType,
    Proposal,
    Rows,
    Scope,
    Segment,
    SglangWorker,
    SignalBatch,
    SignalSpec,
)
from cosched.records import LayersForward as LayersForward
from cosched.records import TargetInfo as TargetInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn


class LossSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``adapt.loss``: weights that every loss shares; a loss adds its own fields in a subclass.

    ``rows`` is what it is trained on: ``delayed``, what the target went on to generate from any
    anchor; ``accepted``, what was drafted, up to the first rejection; ``refused``, only the row of
    that rejection, where the draft was wrong; ``all``, what was drafted to its end.
    After a rejection a chain is trained on the path that it drafted itself, and all rows count in
    full; a block, which does not know what it drafted, would be trained on the continuation of a
    rejected text: there ``refused_weight`` is how much such rows count.

    Row weights multiply. ``position_decay`` assumes how likely a position is reached,
    ``acceptance_prefix`` computes it from the rows before (set ``position_decay: 1`` beside it).
    ``hardest_share`` keeps that share of the rows, those where student and teacher differ most, and
    ``easiest_share`` those where they differ least; with both, what lies between.

    ``vocab_top_k`` takes the loss over the tokens that are among so many likeliest of any row of the
    update, of the teacher's or of the draft's before it, both renormalised; null: over all. Most of
    an update with a large head is spent on tokens that neither would say.
    """

    replaced: ClassVar[dict[str, str]] = {"chunk_rows": "adapt.memory.chunk_rows"}
    kind: str
    refused_weight: Annotated[float, Meta(ge=0, le=1)] = 0.3
    position_decay: Annotated[float, Meta(gt=0, le=1)] = 0.85
    acceptance_prefix: bool = False
    hardest_share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    easiest_share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    vocab_top_k: Annotated[int, Meta(ge=1)] | None = None
    rows: Rows = "delayed"

    def __post_init__(self) -> None:
        if self.hardest_share + self.easiest_share <= 1:
            raise ValueError(
                f"hardest_share {self.hardest_share} and easiest_share {self.easiest_share} have no "
                f"row in common; together they must be above 1"
            )


class DrafterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``drafter``: what every drafter has; a drafter adds its own fields in a subclass.

    ``kind`` is the family and ``path`` the folder of the checkpoint.
    ``num_draft_tokens`` counts drafted tokens, the anchor excluded (SGLang counts it in).
    That is the most; ``length`` says how many of them a round drafts, by its kind.
    ``window`` is how many of the last tokens the draft sees in arms named ``…+window``.
    """

    kind: str
    path: str
    num_draft_tokens: Annotated[int, Meta(ge=1)] = 3
    length: dict[str, Any] = {}
    window: Annotated[int, Meta(ge=1)] | None = None


class ComposedSettings(DrafterSettings, frozen=True, kw_only=True):
    """``drafter`` of a kind that is made of others; a drafter adds its own fields in a subclass.

    ``drafters`` are the sections of those: ``kind``, ``path`` and what each kind has of its own. How much
    is drafted, and how far back the draft sees, is said of the whole. It has no ``path``.
    """

    path: str = ""
    drafters: Annotated[tuple[dict[str, Any], ...], Meta(min_length=2)]

    def __post_init__(self) -> None:
        if self.path:
            raise ValueError(
                f"path: each of its drafters has one, got {self.path!r} for all of them"
            )


OF_THE_WHOLE = ("num_draft_tokens", "length", "window")  # settings that no part of one has


class Choose(Protocol):
    """How drafted tokens are picked from the draft's logits: ``choose(k, logits_BV)``, token by token."""

    @abstractmethod
    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor | None:
        """Token k of each request's chain ``[B]``.

        None, never of the first one: neither that token nor more are wanted.
        """
        ...

    @abstractmethod
    def siblings(self, first: int, logits_BRV: Tensor, rows_BW: Tensor) -> Tensor:
        """Tokens ``first .. first + W - 1`` of each request's tree ``[B, W]``.

        Token w is picked from the logits ``rows_BW[:, w]``, and several from the same are siblings. How many
        each row has may follow from all logits and all tokens before these, and from nothing else.
        """
        ...


class CheckpointFormats(Protocol):
    """The public formats of a family, as a module: ``drafters.eagle3.formats`` is one.

    A checkpoint is the family's own record of shape and tensors; ``cosched convert`` passes it from
    ``read`` to ``write`` unseen.
    """

    @property
    def FORMATS(self) -> tuple[str, ...]:  # noqa: N802  a constant of the module
        """Names for ``--format``."""
        ...

    def recognises(self, raw: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this family."""
        ...

    def read_shape(
        self, directory: Path, settings: DrafterSettings | None = None
    ) -> tuple[Any, str, dict[str, Any]]:
        """Configuration, format, and the file itself, without weights."""
        ...

    def read(self, directory: Path, settings: DrafterSettings | None = None) -> Any:
        """A whole checkpoint."""
        ...

    def write(self, checkpoint: Any, directory: Path, form: str) -> None:
        """Write in a format, or refuse what it cannot express."""
        ...

    def first_fit(self, config: Any) -> str:
        """The format for a draft that was never in any."""
        ...

    def not_for_sglang(self, config: Any, names: frozenset[str]) -> list[str]:
        """Why stock SGLang would not run it as it is; empty where it would."""
        ...


class Drafter(Protocol):
    """A draft model: serves proposals, and replays them with gradients.

    A plugin class also has two constructors, ``load(settings, target) -> Drafter`` and
    ``sketch(settings, target) -> Drafter``, which reads no weights and shows what the drafter would
    take: its target's embedding lies on the meta device. ``examples(target, num_draft_tokens) ->
    Mapping[str, Drafter]`` makes small ones with random weights, one for each kind of checkpoint, for
    the contract tests (``cosched.testing``). Everything up to ``save`` is owed by every drafter; what
    follows ``network`` is used only where that is not None.

    ``num_draft_tokens`` is how many it drafts at most, and how many a path has that it is trained on. Of
    a drafter of trees that is the longest path; ``num_tree_tokens`` is how many tokens a tree has at most.
    ``draft_type`` says which defaults are its own, and has none itself. ``formats`` is the module of
    its public formats (``CheckpointFormats``), for ``cosched convert``; None where it has but one.
    ``sglang`` names what drafts with it in SGLang; None where nothing does. It keeps
    ``slot_bytes`` of each request, however long it is, and ``shared_bytes`` of those that are done. One
    that ``needs_target`` drafts with layers of the target, which an engine that runs it will ``lend``.
    Where it is ``capturable`` a CUDA graph may repeat a ``replay``: what is asked of the device goes by
    shapes alone, and what it reads besides its weights stays where it is.
    """

    Settings: ClassVar[type[DrafterSettings]] = DrafterSettings
    draft_type: ClassVar[DraftType]
    formats: ClassVar[Any] = None
    sglang: ClassVar[SglangWorker | None] = None
    signal: SignalSpec
    num_draft_tokens: int
    num_tree_tokens: int = 0
    slot_bytes: int = 0
    shared_bytes: int = 0
    needs_target: bool = False
    capturable: ClassVar[bool] = False

    @property
    def own_settings(self) -> Mapping[str, Any]:
        """What it was made with beside ``num_draft_tokens``, by the names of its ``Settings``.

        What a file holds as well may be left out; contract tests load with them what they saved.
        """
        return {}

    @property
    def num_verified(self) -> int:
        """How many drafted tokens of a request one round verifies at most."""
        return max(self.num_draft_tokens, self.num_tree_tokens)

    @property
    @abstractmethod
    def cache_bytes_per_token(self) -> int:
        """What serving keeps of each token of a request, in bytes."""
        ...

    @abstractmethod
    def new_state(self, max_batch: int, max_length: int, window: int | None) -> Any:
        """Empty serving state: slots, positions in each, and how many tokens back it sees."""
        ...

    def lend(self, state: Any, forward: LayersForward) -> None:
        """Before anything is observed: what runs layers of the target, for who drafts with them."""
        del state, forward

    @abstractmethod
    def observe(self, state: Any, slot: int, segment: Segment) -> None:
        """Rows of the request in ``slot`` were committed, and others refused: the whole segment.

        Its last token is the next anchor. A request's first segment starts with the first token of
        its text, each later one with the last anchor. There are rounds that draft nothing, of which
        segments come all the same: up to ``MOST_UNDRAFTED`` before the next ``propose``.
        """
        ...

    @abstractmethod
    def propose(
        self, state: Any, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        """Draft so many tokens for slots ``0..num_slots - 1`` from their newest tokens.

        At least one, and at most the drafter's own ``num_draft_tokens``: the first of those that it would
        draft then, for these are what ``replay`` gives. It ends earlier where ``choose`` wants no more.
        Of a tree it is how far one path at least reaches and none goes beyond.
        Who has logits lets ``choose`` pick from them, token by token, and goes on from what it picked;
        who has none proposes tokens of its own, which must not depend on what is still to be drawn.
        """
        ...

    @abstractmethod
    def move_slot(self, state: Any, source: int, destination: int) -> None:
        """The request in slot ``source`` goes on in slot ``destination``, ``source`` is empty."""
        ...

    def cost(self, num_draft_tokens: int) -> float:
        """What drafting so many tokens takes, about, in forward passes of the target.

        0 where it copies: without a model, and tokens without logits.
        """
        del num_draft_tokens
        return 0.0

    @abstractmethod
    def not_for_sglang(self) -> Sequence[str]:
        """Why stock SGLang cannot run this draft as it is; empty where it can."""
        ...

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the public checkpoint format of the family."""
        ...

    def network(self) -> nn.Module | None:
        """The weights that serve and that training may change; None if it learns by itself."""
        return None

    def scopes(self) -> Mapping[str, Scope]:
        """What of ``network()`` may be trained, by the name that ``adapt.scope.kind`` gives it."""
        ...

    def clone(self, dtype: torch.dtype) -> Drafter:
        """A second drafter with its own network in ``dtype``; what is the target's stays shared."""
        ...

    @property
    def state_width(self) -> int:
        """H, the width of what the head is put to."""
        ...

    def replay_states(self, batch: SignalBatch) -> Tensor:
        """What the head is put to, with gradient ``[R, N, K, H]``, aligned to ``batch.teacher_RNKX``.

        Nothing here is as wide as a vocabulary: that is left to ``project``, a few rows at a time.
        """
        ...

    def project(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Student logits ``[..., V_draft]`` of states ``[..., H]``, each row by itself.

        With ``tokens [W]``, ids of the draft's vocabulary, those of them alone ``[..., W]``.
        """
        ...

    def replay(self, batch: SignalBatch) -> Tensor:
        """``project(replay_states(batch))``: student logits with gradient ``[R, N, K, V_draft]``."""
        return self.project(self.replay_states(batch))

    def target_ids(self) -> Tensor | None:
        """Target token of each draft token ``[V_draft]``; None where the vocabularies are one."""
        return None


@runtime_checkable
class ServesAdapters(Protocol):
    """What a drafter has besides, if it can serve requests with adapters of their own in one batch."""

    def adapt(
        self, layers: Sequence[str], count: int, rank: int, scale: float
    ) -> Sequence[Mapping[str, tuple[Tensor, Tensor]]]:
        """Put ``count`` adapters, all zero, on those linear layers of ``network()``.

        Returns A ``[rank, in]`` and B ``[out, rank]`` of every layer for each of them: the storage
        that serves, into which is published. A layer gives ``W x + scale B A x`` from now on.
        """
        ...

    def use_adapter(self, state: Any, slot: int, adapter: int) -> None:
        """The request that enters ``slot`` is served with that adapter; it goes where it goes."""
        ...

    def alone(self, adapter: int) -> Drafter:
        """A drafter of its own, with that adapter merged into its weights."""
        ...


class Loss(Protocol):
    """A pure function of student rows, teacher rows and row weights.

    It comes in two parts, so that logits need not all be there at once: ``measure`` looks at single
    rows, ``reduce`` at what was measured of all.

    What it says of itself, of the class or, where its settings decide, of the instance:
    ``needs_reference``  it compares with the draft before the update too, and is given its rows
    ``proper``           it is least at q = p; if not, only where the teacher is certain
    ``detaches``         it holds factors that depend on the student fixed, so its gradient is not that
                         of its value
    ``teaches``          it looks at the teacher; if not, it can only be a part of another
    ``at_temperature``   it is given the teacher's logits divided by the temperature of their request
    """

    Settings: ClassVar[type[LossSettings]] = LossSettings
    settings: LossSettings
    needs_reference: bool = False
    proper: bool = True
    detaches: bool = False
    teaches: bool = True
    at_temperature: bool = False

    @abstractmethod
    def measure(
        self, student_MV: Tensor, teacher_MV: Tensor, reference_MV: Tensor | None = None
    ) -> Tensor:
        """What ``reduce`` needs of each row ``[M, Q]``, from logits over the draft's vocabulary.

        Row by row: those of a few rows are the same as among all. Sizes do not depend on values.
        """
        ...

    @abstractmethod
    def reduce(self, measured_RNKQ: Tensor, weights_RNK: Tensor) -> Tensor:
        """One number to step on; rows of weight zero may hold anything."""
        ...

    def __call__(
        self,
        student_RNKV: Tensor,
        teacher_RNKV: Tensor,
        weights_RNK: Tensor,
        reference_RNKV: Tensor | None = None,
    ) -> Tensor:
        """``reduce`` of the ``measure`` of all rows at once: the plain form, to compare with."""
        ...
