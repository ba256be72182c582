"""What crosses a stage of the round, as frozen records.

Data records hold tensors; control records hold numbers and words only, so that a policy or a
report can be read, replayed and tested without torch.

Shapes: B requests of the round, K drafted tokens, S = K + 1 verified rows, R rows of one request,
N anchors per request, C rows of context, F feature width, H hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Rows = Literal["accepted", "refused", "all", "delayed"]
DraftType = Literal["chain", "block", "parallel", "none"]
"""How a drafter drafts: token by token, as EAGLE-3 does; a block at once from the target's features
(DFlash); all tokens in parallel behind its own text (PARD); or it learns by itself."""
TeacherForm = Literal["hidden", "logits", "top_k"]
"""How a teacher row is kept: the target's last hidden state, its logits, or the best of them
(``cosched.loop.teacher_rows``)."""

Acceptance = Literal["sampled", "target_only", "greedy"]
"""How an engine accepts a drafted token (``cosched.guard.scorer``): it was drawn from the draft's
distribution, and speculative sampling corrects for that; it is the draft's best one, and the target draws
it; or it is the best one of both. Of a request at temperature 0 the last holds whatever the engine's way."""


# --- data records: tensors -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """What a drafter needs to see of the target, declared once when it is loaded.

    ``feature_layers`` are 0-based and mean "after that layer"; the number of layers itself means
    after the final norm. ``conditioning`` says what drafted token k knows: ``chain`` drafters know
    d_1..d_k, ``block`` drafters only the context, ``none`` learns by itself and replays nothing.
    ``last_logits`` asks for ``Segment.logits_V``.
    """

    feature_layers: tuple[int, ...]
    conditioning: Literal["chain", "block", "none"]
    last_logits: bool = False


LORA = "lora"  # the scope of adapters, which is none of a drafter's own
OF_ADAPTERS = ("rank", "alpha", "targets")  # settings that only that one has


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be trained, by parameter name, and whether the draft's KV cache stays exact then."""

    parameters: tuple[str, ...]
    keeps_cache: bool


@dataclass(frozen=True, slots=True)
class SglangWorker:
    """How SGLang drafts with a drafter. Names alone: nothing of SGLang's is imported to know them.

    ``worker`` (``module:Class``), an ``AdaptedWorker`` mixed in before one of SGLang's, is registered as
    ``algorithm`` and taken for ``builtin``; ``stock``: that one drafts with the same checkpoints by itself.
    ``has_steps``: it drafts in steps, one a token, and is told how many; ``changes_length``: other numbers
    in other rounds. ``algorithm_class`` (``module:function``) makes of ``builtin`` what it is registered with.
    """

    algorithm: str
    worker: str
    builtin: str
    stock: bool = True
    has_steps: bool = True
    algorithm_class: str = "cosched.engines.sglang.worker.as_builtin:adapted_algorithm"
    changes_length: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Drafted tokens of a round that did not become text, the target's own in the place of the first.

    Row q is the target's behind token q and all before it; features and teacher as in a ``Segment``.
    """

    tokens_Q: Tensor
    features_QF: Tensor | None
    teacher_QX: Tensor | None


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one request that became part of its text.

    Row i sits at position ``start + i``. ``tokens_R1`` has one token more than there are rows: the
    last is the token that the last row decided. ``features_RF`` and ``teacher_RX`` (X goes by
    the teacher form) may be None where nobody asked or the engine does not have them. ``refused`` is
    what the target saw besides; None where that is nothing, where the request has ended, and where the
    text is given: the rows behind what is committed of it are of its future. ``temperature`` is that at
    which the request samples, 0 where it is greedy. ``logits_V``, for a drafter that asks, are the last
    row's, before temperature; who keeps them copies them.
    """

    request_id: str
    start: int
    tokens_R1: Tensor
    features_RF: Tensor | None
    teacher_RX: Tensor | None
    refused: Refused | None = None
    temperature: float = 1.0
    logits_V: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ServedBlock:
    """What the draft proposed from one anchor, with the target's verdict.

    Drafted token k is judged by ``teacher_KX[k]``. Rows up to and including ``num_accepted`` stand
    on text that was committed; later ones on at least one refused token. ``num_committed`` is
    ``num_accepted + 1``, less where the request ended inside the block. ``teacher_KX`` is None
    where nobody learns from it. K is this block's own: a round may draft fewer tokens, or none.
    """

    request_id: str
    anchor: int
    path_K: Tensor
    teacher_KX: Tensor | None
    num_accepted: int
    num_committed: int


@dataclass(frozen=True, slots=True)
class VerifyRound:
    """One draft, verify, commit cycle of a batch, the prefill of one request, or an idle tick.

    The last two have no blocks. ``tokens_left`` is how many tokens the running requests may still
    commit, together; None where the engine does not know. ``num_queued`` counts requests that wait for
    a place; in the embedded engine nobody waits.
    """

    segments: tuple[Segment, ...]
    blocks: tuple[ServedBlock, ...]
    finished: tuple[str, ...]
    draft_seconds: float
    verify_seconds: float
    num_running: int
    tokens_left: int | None = None
    num_queued: int = 0

    @property
    def num_committed(self) -> int:
        """Tokens that joined the texts in this round, bonus tokens included."""
        return sum(block.num_committed for block in self.blocks)


IDLE_TICK = VerifyRound((), (), (), draft_seconds=0.0, verify_seconds=0.0, num_running=0)
"""Nothing ran, and nothing is known to have finished."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the host knows of a batch that it has put together, so that it need not ask the device.

    Teacher rows of the same number in ``says_RNK`` are alike. ``of`` are the batch's starts, weights and
    teacher: of others it is void.
    """

    starts: tuple[int, ...]
    weights_RNK: NDArray[Any]
    says_RNK: NDArray[Any]
    of: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class SignalBatch:
    """Contexts, anchors and paths to train on, padded over R requests.

    Context row c of request r is position ``starts_R[r] + c``; rows from ``lengths_R[r]`` on are
    padding. ``tokens_RC1`` holds the token at each row and the one after the last. An anchor is an
    index into the context: the draft may see tokens up to and including it, and features before
    it. ``weights_RNK`` is zero where a row must not teach. ``window`` is how many tokens back the
    draft saw when it served, None for all. ``temperatures`` has one number a request, on the host: that
    at which it samples, 0 if it is greedy; None where all sample at 1. ``layout`` is what it knows besides.
    """

    starts_R: Tensor
    lengths_R: Tensor
    tokens_RC1: Tensor
    features_RCF: Tensor | None
    anchors_RN: Tensor
    paths_RNK: Tensor
    teacher_RNKX: Tensor
    weights_RNK: Tensor
    window: int | None = None
    temperatures: tuple[float, ...] | None = None
    layout: Layout | None = None

    @property
    def num_rows(self) -> int:
        return int(self.weights_RNK.numel())

    @property
    def known(self) -> Layout | None:
        """The layout, unless the tensors that it is of have been replaced."""
        known, own = self.layout, (self.starts_R, self.weights_RNK, self.teacher_RNKX)
        return known if known and list(map(id, own)) == list(map(id, known.of)) else None

    @property
    def last_start(self) -> int:
        """The greatest of ``starts_R``, for tables of positions."""
        known = self.known  # without it the host waits for the device
        return max(known.starts) if known else int(self.starts_R.max())


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens of a batch and the logits they were chosen from, in target vocabulary ids.

    A drafter without distributions gives no logits: it chose its tokens by itself, with certainty.
    Sampled verification then accepts token d with probability p(d). In ``counts`` the engine says how
    many of each request's tokens, the first ones, are verified; None: all. One chain a request: a tree
    would be more tokens and, for each, the index of its parent; row j is then judged behind its parents.
    """

    tokens_BK: Tensor
    logits_BKV: Tensor | None = None
    counts: tuple[int, ...] | None = None


# --- control records: numbers only ---------------------------------------------------------


class Snapshot(msgspec.Struct, frozen=True):
    """Everything a policy may know. Counters run from the start of the arm.

    ``seconds_updating`` and ``seconds_publishing`` are those that the engine waited for. The mean
    behind ``reference_acceptance_length`` is slow (5,000 rounds), that behind the recent one fast (20).
    ``acceptance_shortfall`` is how many tokens a request has lost against the reference since
    acceptance began to fall (``cosched.loop.counters``). ``last_update_seconds`` is what the newest
    update has cost since it began, publication included; ``serving_seconds_since_update`` what drafting
    and verifying took since then. ``micro_step_seconds`` is 0 until it has been measured.
    ``update_gain`` is the acceptance length after an update over the one before it, a geometric moving
    mean that starts at 1; where a guard scores candidates it is theirs over the serving draft's, on the
    same rows. ``seconds_earned`` is what drafting and verifying would have taken longer with the draft
    as loaded, by the guard's mean difference less its standard error. ``expected_tokens_left`` is per
    running request (``cosched.loop.counters``). ``num_finished`` counts requests that are done.
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
    recent_round_seconds: float = 0.0
    reference_acceptance_length: float = 0.0
    acceptance_shortfall: float = 0.0
    last_update_seconds: float = 0.0
    serving_seconds_since_update: float = 0.0
    micro_step_seconds: float = 0.0
    update_gain: float = 1.0
    expected_tokens_left: float = 0.0
    num_queued: int = 0
    seconds_earned: float = 0.0
    num_finished: int = 0
    requests_since_update: int = 0
    tokens_since_loaded: int = 0
    updates_since_trial: int = 0
    num_trials: int = 0
    trials: tuple[tuple[float, ...], ...] = ()
    serves_loaded: bool = True
    pause_rounds: int = 0


class Standing(msgspec.Struct, frozen=True):
    """What a guard knows, in numbers, for the next ``Snapshot``.

    ``lead_tokens`` is by how much what serves is known to be better than the draft as loaded, in
    tokens a round: the mean difference less its standard error, 0 where that is not above it.
    ``resumes_at`` is the round until which the guard would have nothing trained.
    """

    lead_tokens: float = 0.0
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


NOTHING = Decision(num_steps=0)
"""Not now."""


class Choice(msgspec.Struct, frozen=True):
    """Which objective the next update takes, and whether it tries all of them instead."""

    objective: int = 0
    trial: bool = False


class UpdateResult(msgspec.Struct, frozen=True):
    """What the trainer did: micro-steps taken, steps skipped as non-finite, loss of each step.

    ``lost_mass`` is the share of the teacher's mass outside of the draft's vocabulary, estimated on
    some rows of the batch (``BatchLoss``; of this rank's share, where there are several); None where
    the vocabularies are one. After a trial ``objective`` is the one whose update was kept, and
    ``trial`` what each brought: the score of its candidate above that of the serving draft, in tokens.
    """

    num_steps: int
    num_skipped: int
    losses: tuple[float, ...]
    num_rows: int
    seconds: float
    lost_mass: float | None = None
    objective: int = 0
    trial: tuple[float, ...] = ()


Action = Literal["keep", "publish", "roll_back", "wait"]


class Verdict(msgspec.Struct, frozen=True):
    """What is to become of the candidate and of what serves: one action, and why.

    ``keep``       what serves stays, and no candidate is looked at; without a reason nothing was
    ``wait``       what serves stays, and the candidate is trained on until more is known of it
    ``publish``    the candidate serves
    ``roll_back``  training starts again from version ``to``, with an empty optimizer; that version
                   serves again, if it does not already

    Scores are mean acceptance lengths, expected on ``num_rows`` held-out rows; None where nothing
    was scored.
    """

    action: Action
    reason: str = ""
    to: int | None = None
    num_rows: int | None = None
    candidate_score: float | None = None
    serving_score: float | None = None
    loaded_score: float | None = None


KEEP = Verdict("keep")
"""There was nothing to look at."""


class WeightVersion(msgspec.Struct, frozen=True):
    """The serving draft after a publication: its number and checksums in hexadecimal."""

    version: int
    draft_checksum: str
    target_checksum: str | None
    seconds: float


class RoundRow(msgspec.Struct, frozen=True):
    """One request in one round, for the reports: where it stood and what was committed.

    ``position`` counts generated tokens: 0 is the first token of the answer.
    """

    request_id: str
    position: int
    draft_version: int
    num_drafted: int
    num_accepted: int
    num_committed: int
