"""What decides from numbers alone: its roles, its settings, what it is shown and what it says.

Cadences, objectives and draft lengths. Plugins take the roles from ``cosched.protocols`` and the records from
``cosched.records``, where the others are. No tensor has a part in this.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Protocol

import msgspec
from msgspec import Meta

MOST_UNDRAFTED = 128
"""In how many rounds in a row, at most, an engine drafts nothing."""


class Snapshot(msgspec.Struct, frozen=True):
    """Everything a policy may know. Counters run from the start of the arm.

    ``seconds_updating`` and ``seconds_publishing`` are those that the engine waited for. The mean
    behind ``reference_acceptance_length`` is slow (5,000 rounds that drafted as many tokens as the newest
    one), that behind the recent one fast (20).
    ``acceptance_shortfall`` is how many tokens a request has lost against the reference since
    acceptance began to fall. ``last_update_seconds`` is what the newest update has cost since it began,
    publication included; ``serving_seconds_since_update`` what drafting and verifying took since then.
    ``micro_step_seconds`` is 0 until it has been measured. ``update_gain`` is the acceptance length
    after an update over the one before it, a geometric moving mean that starts at 1; where a guard
    scores candidates it is theirs over the serving draft's, on the same rows. ``seconds_earned`` is
    what drafting and verifying would have taken longer with the draft as loaded, by the guard's mean
    difference less its standard error, and where ``drafter.length`` chooses, also without a draft. The
    seconds ``…_here`` are of text like this alone (``Standing.level``): drafting and verifying, updates and
    their judgement and publication, and what was earned; ``level`` is that level, known by ``level_rows``.
    ``expected_tokens_left`` is per running request; ``forgets`` says that what is learnt ends with its request,
    and ``updates_since_reset`` were made since that was last so.
    ``tokens_since_loaded`` were committed since the draft was last as it was loaded. ``trials`` are the
    newest comparisons of objectives, the oldest first: what one update with each of them, from the same
    weights, would have brought over the serving draft, in tokens; ``num_trials`` counts all there were.
    ``serves_loaded`` says whether what serves is the draft as it was loaded; for ``pause_rounds`` more
    the guard, which has just undone a publication, would have nothing trained.
    """

    round_index: int
    num_running: int
    num_committed: int
    num_drafted: int
    num_accepted: int
    recent_acceptance_length: float
    rounds_since_update: int
    tokens_since_update: int
    num_updates: int
    draft_version: int
    buffered_tokens: int
    seconds_drafting: float
    seconds_verifying: float
    seconds_updating: float
    seconds_publishing: float
    recent_drafted_tokens: float = 0.0  # a request
    recent_round_seconds: float = 0.0
    reference_acceptance_length: float = 0.0
    acceptance_shortfall: float = 0.0
    last_update_seconds: float = 0.0
    serving_seconds_since_update: float = 0.0
    micro_step_seconds: float = 0.0
    update_gain: float = 1.0
    expected_tokens_left: float = 0.0
    forgets: bool = False
    updates_since_reset: int = 0
    num_queued: int = 0
    seconds_earned: float = 0.0
    seconds_serving_here: float = 0.0
    seconds_learning_here: float = 0.0
    seconds_earned_here: float = 0.0
    level: int = 0
    level_rows: int = 0
    num_finished: int = 0
    requests_since_update: int = 0
    tokens_since_loaded: int = 0
    updates_since_trial: int = 0
    num_trials: int = 0
    trials: tuple[tuple[float, ...], ...] = ()
    serves_loaded: bool = True
    pause_rounds: int = 0
    lead_tokens: float = 0.0  # as the guard's Standing has it


class Standing(msgspec.Struct, frozen=True):
    """What a guard knows, in numbers, for the next ``Snapshot``.

    ``lead_tokens`` is by how much what was learnt is known to be better than the draft as loaded on text
    like this, in tokens a round: the mean difference less its standard error, and never less than 0.
    ``level`` tells texts apart by how well the draft as loaded does on them, 0 the worst; ``level_rows`` is of how
    many rows of this text that is known.
    ``resumes_at`` is the round until which the guard would have nothing trained.
    """

    lead_tokens: float = 0.0
    level: int = 0
    level_rows: int = 0
    resumes_at: int = 0


class Decision(msgspec.Struct, frozen=True):
    """Train now, or not. ``learning_rate`` None keeps the trainer's own.

    The rest says what with: the loss of which of the objectives (0 where there is but one), what
    share of the learning rate, and whether all objectives are tried and the best of them is kept.
    """

    num_steps: int
    learning_rate: float | None = None
    reason: str = ""
    objective: int = 0
    rate_share: float = 1.0
    trial: bool = False


NOTHING = Decision(num_steps=0)  # not now


class Choice(msgspec.Struct, frozen=True):
    """Which objective the next update takes, and whether it tries all of them instead."""

    objective: int = 0
    trial: bool = False


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
