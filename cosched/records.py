"""What crosses a stage of the round, as frozen records.

Those of numbers and words can be read without a tensor library; what policies see and say is from
``cosched.policies``.

Shapes: B requests of the round, K drafted tokens, S = K + 1 verified rows, R rows of one request,
N anchors per request, C rows of context, F feature width, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from cosched.policies import NOTHING as NOTHING
from cosched.policies import Choice as Choice
from cosched.policies import Decision as Decision
from cosched.policies import Snapshot as Snapshot
from cosched.policies import Standing as Standing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

Rows = Literal["accepted", "refused", "all", "delayed"]
DraftType = Literal["chain", "block", "parallel", "none"]
"""How a drafter drafts: token by token, as EAGLE-3 does; a block at once from the target's features
(DFlash); all tokens in parallel behind its own text (PARD); or it learns by itself."""
TeacherForm = Literal["hidden", "logits", "top_k"]
"""A teacher row is the target's last hidden state, its logits, or the best of them (``loop.teacher_rows``)."""

Acceptance = Literal["sampled", "target_only", "greedy"]
"""How an engine accepts a drafted token (``cosched.guard.scorer``): it was drawn from the draft's
distribution, and speculative sampling corrects for that; it is the draft's best one, and the target draws
it; or it is the best one of both. Of a request at temperature 0 the last holds whatever the engine's way."""


class TargetInfo(Protocol):
    """What a drafter may know of the target when it is loaded; ``model_type`` is transformers' name."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_length: int
    model_type: str
    embedding: nn.Embedding
    head: nn.Module

    def token_ids(self) -> Mapping[str, int] | None:
        """The tokenizer's vocabulary; None where the target came without a tokenizer."""
        ...


LayersForward = Callable[["Tensor", "Tensor", Sequence[int], "Sequence[int] | None"], "Tensor"]
"""``forward(ids_BT, positions_BT, layers, counts) -> logits_BTV``: the target with those of its layers alone.

For slots ``0..B - 1``, of each its first ``counts[b]`` rows (None: all; zeros for the others), over the
keys and values of the text that is committed. It writes at ``positions_BT``: from the newest token on.
"""


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
    in other rounds; ``width`` is the drafter's setting of how many tokens a step drafts, where that may be
    several. ``algorithm_class`` (``module:function``) makes of ``builtin`` what it is registered with.
    """

    algorithm: str
    worker: str
    builtin: str
    stock: bool = True
    has_steps: bool = True
    algorithm_class: str = "cosched.engines.sglang.worker.as_builtin:adapted_algorithm"
    changes_length: bool = False
    width: str | None = None

    def width_of(self, settings: Any) -> int:
        """How many tokens SGLang drafts in a step with these settings of the drafter; above one, a tree."""
        return 1 if self.width is None else getattr(settings, self.width)


@dataclass(frozen=True, slots=True)
class Refused:
    """Drafted tokens of a round that did not become text, the target's own in the place of the first.

    Row q is the target's behind token q and its ancestors; features and teacher as in a ``Segment``.
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

    Drafted token k is judged by ``teacher_KX[k]``. Rows up to and including ``num_accepted`` stand on text that
    was committed; later ones on at least one refused token. ``num_committed`` is ``num_accepted + 1``, less where
    the request ended inside the block. ``teacher_KX`` is None where nobody learns from it. K is this block's own:
    a round may draft fewer tokens, or none. Of a tree it is the accepted path with the first choices behind it.
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
    a place; in the embedded engine nobody waits. ``served_loaded``: of a server elsewhere, whether the draft
    as loaded drafted it there, which may not serve yet what serves here; None: it was served here.
    ``plain_share`` is what a round without drafts is expected to take, as a share of this one's time; None where
    nobody measures that.
    """

    segments: tuple[Segment, ...]
    blocks: tuple[ServedBlock, ...]
    finished: tuple[str, ...]
    draft_seconds: float
    verify_seconds: float
    num_running: int
    tokens_left: int | None = None
    num_queued: int = 0
    served_loaded: bool | None = None
    plain_share: float | None = None

    @property
    def num_committed(self) -> int:
        """Tokens that joined the texts in this round, bonus tokens included."""
        return sum(block.num_committed for block in self.blocks)


IDLE_TICK = VerifyRound((), (), (), draft_seconds=0.0, verify_seconds=0.0, num_running=0)
"""Nothing ran, and nothing is known to have finished."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many rows those of a batch that count are filled up to, and its teacher rows that differ."""

    rows: int
    teacher_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What the host knows of a batch that it has put together, so that it need not ask the device.

    Teacher rows of the same number in ``says_RNK`` are alike. ``of`` are the batch's starts, weights and
    teacher: of others it is void. ``room`` is there where the batch fills a frame (``Frames``).
    """

    starts: tuple[int, ...]
    weights_RNK: NDArray[Any]
    says_RNK: NDArray[Any]
    of: tuple[Tensor, Tensor, Tensor]
    room: Room | None = None


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

    A drafter without distributions gives no logits: it chose its tokens by itself, with certainty. Sampled
    verification then accepts token d with probability p(d). Of each request the first ``counts`` are verified.

    Row 0 is the anchor's, row k + 1 is behind token k. In a tree token k comes behind row ``parents_BK[:, k]``,
    of the target, which judges it, and of the logits, which it was chosen from; None: a chain, row k. Tokens
    come level by level, those behind one row as they were drawn (``cosched.engines.embedded.trees``).
    """

    tokens_BK: Tensor
    logits_BKV: Tensor | None = None
    counts: tuple[int, ...] | None = None  # all
    parents_BK: Tensor | None = None


# --- numbers and words only ----------------------------------------------------------------


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
    was scored. Evidence is that learning is better, or worse, than nothing, as a share of what its
    error rate asks for: a hypothesis is rejected from 1 on (``cosched.guard.statistics``).
    """

    action: Action
    reason: str = ""
    to: int | None = None
    num_rows: int | None = None
    candidate_score: float | None = None
    serving_score: float | None = None
    loaded_score: float | None = None
    evidence_better: float | None = None
    evidence_worse: float | None = None


KEEP = Verdict("keep")  # there was nothing to look at


class GuardFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How a guard's tests stand, for people: each is a wealth, in natural logarithms, and its bound.

    ``better`` rejects that learning is no better than the draft as loaded, ``worse`` that it is no
    worse. ``lead_tokens`` is the mean difference a round, ``lead_error`` its standard error. Scores are
    mean acceptance lengths of what serves and of the draft as loaded on the same, newest rows. What is
    not known yet is None.
    """

    better: float
    better_bound: float
    worse: float
    worse_bound: float
    trusted: bool
    serves_loaded: bool
    lead_tokens: float | None = None
    lead_error: float | None = None
    serving_score: float | None = None
    loaded_score: float | None = None


class WeightVersion(msgspec.Struct, frozen=True):
    """The serving draft after a publication: its number and checksums in hexadecimal.

    That of the draft is of all of it, also where ranks serve parts. That of the target is of the slice which was looked at; None where none was.
    """

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
