"""The decoding loop: draft, verify, commit, for a batch of requests at different positions.

Letters: B requests, K drafted tokens, S = K + 1 rows, R committed rows, X teacher width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from cosched.engines.embedded.rows import RunsLayers
from cosched.engines.embedded.slots import Slot
from cosched.engines.embedded.stopping import Stopping
from cosched.engines.embedded.target import TargetRows
from cosched.engines.embedded.verification import RandomStream
from cosched.engines.embedded.verifying import RoundVerifier, Verified
from cosched.engines.request import FinishedRequest, GenerationRequest
from cosched.loop.teacher_rows import pack_best
from cosched.records import (
    Proposal,
    Refused,
    RoundRow,
    Segment,
    ServedBlock,
    TeacherForm,
    VerifyRound,
)

if TYPE_CHECKING:
    from cosched.engines.embedded.rows import RowSource
    from cosched.engines.embedded.verifiers import Verifier
    from cosched.loop.lengths import DraftLengths
    from cosched.loop.roles import RoundObserver
    from cosched.protocols import Drafter, ServesAdapters

Admit = Callable[[GenerationRequest], int]
"""``admit(request)``: the adapter that serves a request from its prefill to its end."""

Recorder = Callable[[GenerationRequest, TargetRows, int, int, int], None]
"""``recorder(request, rows, index, start, count)``: rows ``[index, :count]`` are at ``start``."""

OnRow = Callable[[RoundRow], None]
"""``on_row(row)``: one request in one round, when it is committed."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits and habits of one engine. ``window`` is how many tokens back the draft sees.

    ``teacher_top_k`` is how many logits a teacher row of the form ``top_k`` keeps.
    """

    max_batch: int
    max_length: int
    seed: int
    stop_tokens: frozenset[int]
    window: int | None = None
    teacher: TeacherForm = "hidden"
    teacher_top_k: int = 64


@dataclass(slots=True)
class EngineSeconds:
    """Wall time by what it was spent on, since the engine was made."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0


class EmbeddedEngine:
    """Continuous batching over slots; slots ``0..n - 1`` run, a finished one is filled by the last.

    The engine knows no co-scheduler: it calls ``observer.on_round`` after each prefill and each
    round, and goes on with whatever draft then serves. With ``admit`` the drafter must be one that
    ``ServesAdapters``. ``lengths`` says how many tokens a round drafts; without, as many as the
    drafter can.
    """

    def __init__(
        self,
        rows: RowSource,
        verifier: Verifier,
        drafter: Drafter | None,
        options: EngineOptions,
        device: torch.device,
        observer: RoundObserver | None = None,
        recorder: Recorder | None = None,
        on_tokens: Callable[[int], None] = lambda _n: None,
        admit: Admit | None = None,
        clock: Callable[[], float] = time.perf_counter,
        lengths: DraftLengths | None = None,
        on_row: OnRow | None = None,
    ) -> None:
        self._rows = rows
        self._verifier = verifier
        self._round_verifier = RoundVerifier(rows, verifier)
        self._drafter = drafter
        self._options = options
        self._device = device
        self._observer = observer
        self._recorder = recorder
        self._on_tokens = on_tokens
        self._on_row = on_row
        self._admit_to = admit
        self._clock = clock
        self._most = drafter.num_verified if drafter else 0
        self._lengths = lengths
        self._state = (
            drafter.new_state(options.max_batch, options.max_length, options.window)
            if drafter
            else None
        )
        if drafter is not None and drafter.needs_target:
            assert isinstance(rows, RunsLayers), "settings.check refuses it over a trace"
            drafter.lend(self._state, rows.layers)
        self._slots: list[Slot] = []
        self.seconds = EngineSeconds()

    @property
    def draft_version(self) -> int:
        return 0 if self._observer is None else self._observer.version

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[FinishedRequest]:
        """Decode all requests; each is yielded when it is done, in the order of finishing.

        The next turn of a conversation takes its place behind those that wait.
        """
        for finished in self.rounds(requests):
            yield from finished

    def rounds(self, requests: Iterable[GenerationRequest]) -> Iterator[list[FinishedRequest]]:
        """The same, a prefill or a round at a time: what that one has finished, often nothing."""
        waiting = deque(requests)
        while waiting or self._slots:
            while waiting and len(self._slots) < self._options.max_batch:
                self._admit(waiting.popleft())
                yield self._finished(waiting)
            if self._slots:
                self._round()
                yield self._finished(waiting)

    def _finished(self, waiting: deque[GenerationRequest]) -> list[FinishedRequest]:
        finished = [one.with_next_turn() for one in self._retire()]
        waiting.extend(one.following for one in finished if one.following is not None)
        return finished

    # --- a request enters and leaves -------------------------------------------------------

    @torch.no_grad()
    def _admit(self, request: GenerationRequest) -> None:
        """Prefill: the prompt's rows, and the first token of the answer."""
        started = self._clock()
        index, num_prompt = len(self._slots), len(request.prompt_P)
        rows = self._rows.prefill(index, request)
        text = request.prompt_P.new_zeros(request.max_length + self._most + 1)
        text[:num_prompt] = request.prompt_P
        slot = Slot(request, text, num_prompt, RandomStream(self._options.seed, request.id))
        self._slots.append(slot)
        if self._admit_to is not None:
            adapters = cast("ServesAdapters", self._drafter)
            adapters.use_adapter(self._state, index, self._admit_to(request))
        outcome = self._verifier.verify(
            self._nothing(1),
            rows.logits_BTV[:, -1:],
            slot.random.uniforms(num_prompt - 1, 1)[None].to(self._device),
            slot.path(1)[None],
        )
        slot.commit(outcome.next_B, self._options.stop_tokens)
        segment = self._segment(slot, rows, self._teacher(rows), 0, 0, num_prompt)
        self._observe(index, segment)
        self._record(slot, rows, 0, 0, num_prompt)
        self.seconds.prefill += self._now() - started
        self._report((segment,), (), 0.0, 0.0)

    def _retire(self) -> Iterator[FinishedRequest]:
        for index in reversed(range(len(self._slots))):
            slot = self._slots[index]
            if not slot.done:
                continue
            last = len(self._slots) - 1
            if self._drafter:
                self._drafter.move_slot(self._state, last, index)
            if index != last:
                self._rows.move_slot(last, index, self._slots[last].length)
                self._slots[index] = self._slots[last]
            self._slots.pop()
            yield slot.finished()

    def abandon(self) -> list[FinishedRequest]:
        """What the running requests have so far; they are not continued."""
        unfinished = [slot.finished() for slot in self._slots]
        self._slots.clear()
        return unfinished

    # --- one round -------------------------------------------------------------------------

    @torch.no_grad()
    def _round(self) -> None:
        slots, started = self._slots, self._clock()
        anchor_B = torch.stack([slot.text[slot.length - 1] for slot in slots])
        drawn_BU = torch.stack(
            [slot.random.uniforms(slot.length - 1, 2 * self._most + 1) for slot in slots]
        ).to(self._device)
        path_BS = torch.stack([slot.path(self._most + 1) for slot in slots])
        proposal, tops = self._propose(drawn_BU, path_BS)
        drafted = self._now()
        starts = [slot.length - 1 for slot in slots]
        verified = self._round_verifier.verify(proposal, anchor_B, starts, drawn_BU, path_BS)
        judged = self._clock()
        segments, blocks = self._commit(verified)
        self.seconds.draft += drafted - started
        self.seconds.verify += judged - drafted
        plain_share = None
        if self._lengths is not None:
            seconds = self._clock() - started
            self._lengths.observe(verified.depths, verified.accepted, tops, seconds)
            plain_share = self._lengths.plain_share(max(verified.depths))
        self._report(segments, blocks, drafted - started, judged - drafted, plain_share)

    def _propose(
        self, drawn_BU: Tensor, path_BS: Tensor
    ) -> tuple[Proposal, Sequence[Sequence[float]] | None]:
        """Drafted tokens, and where their number goes by request the top probabilities behind them."""
        slots, lengths = self._slots, self._lengths
        if self._drafter is None:
            return self._nothing(len(slots)), None
        num_drafted = self._drafter.num_draft_tokens
        if lengths is not None and not (num_drafted := lengths.of_round(len(slots))):
            return self._nothing(len(slots)), None
        choose = self._verifier.choose(drawn_BU, path_BS[:, :num_drafted])
        if lengths is None or not lengths.by_request:
            return self._drafter.propose(self._state, len(slots), choose, num_drafted), None
        stopping = Stopping(choose, lengths, len(slots))
        proposal = self._drafter.propose(self._state, len(slots), stopping, num_drafted)
        return stopping.cut(proposal), stopping.tops if stopping.asked else None

    def _commit(self, verified: Verified) -> tuple[tuple[Segment, ...], tuple[ServedBlock, ...]]:
        """What became text, for who learns from it."""
        segments: list[Segment] = []
        blocks: list[ServedBlock] = []
        rows = verified.rows
        teacher, version = self._teacher(rows), self.draft_version
        for index, slot in enumerate(self._slots):
            verified_K = verified.tokens_BK[index, : verified.counts[index]]
            tokens_K = verified_K[: verified.lengths[index]]
            start, count = slot.length - 1, verified.accepted[index]
            new = torch.cat((tokens_K[:count], verified.next_B[index : index + 1]))
            committed = slot.commit(new, self._options.stop_tokens)
            count = min(count, committed)  # drafts past the end of the text were not asked for
            segment = self._segment(slot, rows, teacher, index, start, committed, verified_K)
            self._observe(index, segment)
            self._record(slot, rows, index, start, committed)
            segments.append(segment)
            if self._drafter:
                teacher_KX = None if teacher is None else teacher[index, : len(tokens_K)]
                blocks.append(
                    ServedBlock(slot.request.id, start, tokens_K, teacher_KX, count, committed)
                )
            generated = start + 1 - len(slot.request.prompt_P)
            row = RoundRow(slot.request.id, generated, version, len(tokens_K), count, committed)
            slot.rounds.append(row)
            if self._on_row:
                self._on_row(row)
        return tuple(segments), tuple(blocks)

    def _nothing(self, num_slots: int) -> Proposal:
        """No drafts: what plain decoding verifies."""
        return Proposal(torch.zeros(num_slots, 0, dtype=torch.int64, device=self._device))

    def _observe(self, slot_index: int, segment: Segment) -> None:
        if self._drafter:
            self._drafter.observe(self._state, slot_index, segment)

    def _record(self, slot: Slot, rows: TargetRows, row_index: int, start: int, count: int) -> None:
        if self._recorder:
            self._recorder(slot.request, rows, row_index, start, count)

    def _segment(
        self,
        slot: Slot,
        rows: TargetRows,
        teacher: Tensor | None,
        row_index: int,
        start: int,
        count: int,
        drafted_K: Tensor | None = None,
    ) -> Segment:
        """The rows that were committed and those that were not, for who learns from them."""
        if teacher is not None and teacher.shape[1] < count:
            teacher = None  # a prompt has logits for its last row only
        refused, kept = None, slice(count)
        goes_on = not slot.done and slot.request.forced_T is None
        if goes_on and drafted_K is not None and count <= len(drafted_K):
            rest = slice(count, len(drafted_K) + 1)
            refused = Refused(
                drafted_K[count - 1 :],
                _part(rows.features_BTF, row_index, rest),
                _part(teacher, row_index, rest),
            )
        logits_V = None
        if self._drafter is not None and self._drafter.signal.last_logits:
            # A prompt has logits for its last row only.
            logits_V = rows.logits_BTV[row_index, min(count, rows.logits_BTV.shape[1]) - 1]
        return Segment(
            slot.request.id,
            start,
            slot.text[start : start + count + 1],
            _part(rows.features_BTF, row_index, kept),
            _part(teacher, row_index, kept),
            refused,
            self._verifier.temperature,
            logits_V,
        )

    def _teacher(self, rows: TargetRows) -> Tensor | None:
        """Teacher rows ``[B, T, X]`` in the form asked for; None where nobody looks."""
        if self._observer is None:
            return None
        match self._options.teacher:
            case "hidden":
                return rows.hidden_BTH
            case "logits":
                return rows.logits_BTV
            case "top_k":
                return pack_best(rows.logits_BTV, self._options.teacher_top_k)

    def _report(
        self,
        segments: tuple[Segment, ...],
        blocks: tuple[ServedBlock, ...],
        draft_seconds: float,
        verify_seconds: float,
        plain_share: float | None = None,
    ) -> None:
        self._on_tokens(sum(block.num_committed for block in blocks) or len(segments))
        if self._observer is None:
            return
        self._observer.on_round(
            VerifyRound(
                segments=segments,
                blocks=blocks,
                finished=tuple(slot.request.id for slot in self._slots if slot.done),
                draft_seconds=draft_seconds,
                verify_seconds=verify_seconds,
                num_running=len(self._slots),
                tokens_left=sum(
                    slot.request.max_length - slot.length for slot in self._slots if not slot.done
                ),
                plain_share=plain_share,
            )
        )

    def _now(self) -> float:
        """The time once the device has done what it was given, so that a span is true."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # host waits for the device
        return self._clock()


def _part(rows_BTX: Tensor | None, index: int, part: slice) -> Tensor | None:
    return None if rows_BTX is None else rows_BTX[index, part]
