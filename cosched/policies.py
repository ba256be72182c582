"""The roles of what decides from numbers alone, and its settings: cadences, objectives, draft lengths.

Plugins take them from ``cosched.protocols``, where the other roles are. No tensor has a part in this.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from cosched.records import Choice, Decision, Snapshot


class PolicySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``adapt.policy``: a policy adds its own fields in a subclass.

    ``max_time_share`` caps the share of the engine's time that updates take, whatever the policy
    says (``cosched.loop.budget``); 1 is no cap, and the only value with which a cadence counted in
    rounds or tokens repeats exactly. To spend no time, take the policy ``never``.
    """

    kind: str
    max_time_share: Annotated[float, Meta(gt=0, le=1)] = 1.0


class ObjectiveSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``adapt.objective``: an objective adds its own fields in a subclass.

    The learning rate is ``t / warm_tokens`` of what it would be while t, the tokens committed since
    the draft was last as it was loaded, is less than that; 0 is no warm start. A fresh draft is then
    trained gently while there is little text to train it on, and AdamW's moments are of a few steps.
    """

    kind: str
    warm_tokens: Annotated[int, Meta(ge=0)] = 0


class Expert(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to make an update: a ``loss`` over ``adapt.loss``, and an ``lr`` (null: the trainer's)."""

    loss: dict[str, Any] = {}
    lr: Annotated[float, Meta(gt=0)] | None = None


class ExpertSettings(ObjectiveSettings, frozen=True, kw_only=True):
    """``adapt.objective`` of a kind that chooses among ``experts`` by trials."""

    experts: Annotated[tuple[Expert, ...], Meta(min_length=2)]


class Policy(Protocol):
    """When to train, and how much. Pure: the same snapshot gives the same decision.

    What it says of itself:
    ``trains``          if not, an engine that would have to take rows off a device for it leaves that
    ``needs_scores``    it goes by what a guard has scored: refused beside a guard that scores nothing
    ``needs_finished``  it learns from finished requests: refused where they are not kept
    ``idle_steps``      micro-steps that it takes when all requests have finished, so that there are no
                        others to learn from: refused likewise, unless 0
    """

    Settings: ClassVar[type[PolicySettings]] = PolicySettings
    trains: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_finished: ClassVar[bool] = False
    idle_steps: int = 0

    @abstractmethod
    def decide(self, snapshot: Snapshot) -> Decision: ...


class Objective(Protocol):
    """What an update is made with. Pure, as a policy is: the same snapshot gives the same choice."""

    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings

    @abstractmethod
    def choose(self, snapshot: Snapshot) -> Choice: ...


# --- how many tokens to draft ----------------------------------------------------------------


class LengthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``drafter.length``: how many tokens a round drafts; a policy adds its own fields in a subclass."""

    kind: str


class LengthSnapshot(msgspec.Struct, frozen=True):
    """What is known when a round is to draft (``cosched.loop.lengths``).

    ``max_tokens`` is the drafter's ``num_draft_tokens``. ``acceptance[k]`` is how likely drafted token
    k, counted from 0, is accepted where all before it are. ``seconds[K]`` is what a round takes that
    drafts K tokens for each of ``num_running`` requests, 0 where that has to be tried first; empty
    unless the policy ``needs_seconds``. ``ages[K]`` is how many rounds ago K was last drafted.
    ``chances``, of a policy ``by_request`` alone, are of one request's drafted tokens so far: how likely
    each is accepted where all before it are, as sure as the draft was of it; None before the round.
    """

    max_tokens: int
    num_running: int
    round_index: int
    acceptance: tuple[float, ...]
    ages: tuple[int, ...]
    seconds: tuple[float, ...] = ()
    chances: tuple[float, ...] | None = None


class DraftLength(Protocol):
    """How many tokens to draft, from 0 to ``max_tokens``. Pure: the same snapshot, the same number.

    What it says of itself:
    ``needs_seconds``  it weighs what rounds take: refused where their seconds are not those of serving
    ``by_request``     it is also asked of each request, after each token that was drafted for it, how
                       many of them are to be verified; once that is not all of them, no more are
                       drafted
    """

    Settings: ClassVar[type[LengthSettings]] = LengthSettings
    needs_seconds: ClassVar[bool] = False
    by_request: ClassVar[bool] = False

    def choices(self, max_tokens: int) -> tuple[int, ...]:
        """The numbers that it chooses among, rising. SGLang prepares for each of them at its start."""
        return tuple(range(max_tokens + 1))

    @abstractmethod
    def choose(self, snapshot: LengthSnapshot) -> int: ...
