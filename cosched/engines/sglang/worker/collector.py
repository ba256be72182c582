"""From what a worker saw on the device to rounds as the co-scheduler takes them.

A worker hands over tensors when it launched a forward pass; how many drafts were accepted is known
to the host later, when the scheduler has copied the counts anyway. Until then a round waits here,
in order, so that nothing of ours makes the host wait for the device.

Letters: B requests, K drafted tokens, S = K + 1 rows, F fused feature width, X teacher width.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cosched.records import RoundRow, Segment, ServedBlock, VerifyRound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

KNOWN_REQUESTS = 4096  # whose place in their text is remembered; the longest silent are forgotten


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt rows of one request that were run: ``length`` of them from position ``start`` on.

    ``rows`` are the last of them, as many as are worth keeping, with the token that came out;
    None where nobody learns from them. ``prompt_length`` is that of the whole prompt, ``max_length``
    that of prompt and answer at most, None where the request has no limit of its own. It samples at
    ``temperature``, 0 where it is greedy.
    """

    request_id: str
    start: int
    length: int
    prompt_length: int
    rows: Segment | None
    max_length: int | None = None
    temperature: float = 1.0


Prefill = tuple[Prompt, ...]
"""One prefill, chunks included; rows of a cached prefix are not in it."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One verification. Row 0 of ``tokens_BS`` is the anchor; ``decided_BS`` is what came out.

    ``features_BSF`` and ``teacher_BSX`` are None where nobody learns from them. ``seconds`` gives
    the time that went into drafting and verifying, and may be asked once the counts are known.
    ``iteration`` is the scheduler's number of the pass, which rises. Of a tree the rows are those of the
    path that was taken, and ``lengths`` gives, likewise, how many drafted tokens are on each; None: all.
    """

    iteration: int
    request_ids: tuple[str, ...]
    version: int
    tokens_BS: Tensor
    decided_BS: Tensor
    features_BSF: Tensor | None
    teacher_BSX: Tensor | None
    seconds: Callable[[], tuple[float, float]]
    lengths: Callable[[], list[int]] | None = None


@dataclass(slots=True)
class _Text:
    """Where a request stands: its anchor's position, how long its prompt was, its limit and temperature."""

    anchor: int
    prompt_length: int
    max_length: int | None
    temperature: float

    @property
    def left(self) -> int | None:
        """Tokens that may still be committed; the anchor has been."""
        return None if self.max_length is None else max(0, self.max_length - self.anchor - 1)


class RoundCollector:
    """Puts counts to tensors, and keeps each request's place in its text."""

    def __init__(self, on_row: Callable[[RoundRow], None] | None = None) -> None:
        self._on_row = on_row
        self._waiting: deque[Prefill | Verified] = deque()
        self._texts: OrderedDict[str, _Text] = OrderedDict()
        self._finished: list[str] = []
        self.num_queued = 0  # requests that wait for a place, as far as is known

    def prefilled(self, prefill: Prefill) -> None:
        if prefill:
            self._waiting.append(prefill)

    def verified(self, verified: Verified) -> None:
        self._waiting.append(verified)

    @property
    def requests(self) -> set[str]:
        """Those that were seen and have not finished, as far as is known here."""
        prefills = (one for one in self._waiting if isinstance(one, tuple))
        return {*self._texts, *(prompt.request_id for one in prefills for prompt in one)}

    def finish(self, request_id: str) -> None:
        """The request is done or was aborted; what still comes of it is dropped.

        One that ends with its prompt is never drafted for, so no counts take its prompt from here:
        that is dropped as well.
        """
        if self._texts.pop(request_id, None) is not None:
            self._finished.append(request_id)
        waiting, self._waiting = self._waiting, deque[Prefill | Verified]()
        for one in waiting:
            if isinstance(one, Verified):
                self.verified(one)
            else:
                self.prefilled(tuple(prompt for prompt in one if prompt.request_id != request_id))

    def idle(self) -> VerifyRound:
        """A tick in which nothing runs; it says who has finished, which no other round would."""
        return self._make((), (), (0.0, 0.0), [])

    def counted(
        self, num_accepted: list[int], iteration: int | None = None
    ) -> Iterator[VerifyRound]:
        """Rounds up to the verification of that pass, whose counts these are; None: the oldest.

        Counts of one that was not watched change nothing. Requests of one whose counts never came have
        lost their place in their text: nothing more is taken of them.
        """
        yield from self.before_counts()
        while self._waiting:
            verified = self._waiting[0]
            assert isinstance(verified, Verified)
            if iteration is not None and verified.iteration > iteration:
                return
            self._waiting.popleft()
            if iteration is None or verified.iteration == iteration:
                assert len(verified.request_ids) == len(num_accepted), "counts of another batch"
                yield self._round(verified, num_accepted)
                return
            for request_id in verified.request_ids:
                self.finish(request_id)
            yield from self.before_counts()

    def before_counts(self) -> Iterator[VerifyRound]:
        """Rounds that wait for no counts: prefills in front."""
        while self._waiting and isinstance(self._waiting[0], tuple):
            prefill = self._waiting.popleft()
            assert isinstance(prefill, tuple)
            yield self._prefill_round(prefill)

    def _prefill_round(self, prefill: Prefill) -> VerifyRound:
        for prompt in prefill:
            end = prompt.start + prompt.length
            text = _Text(end, prompt.prompt_length, prompt.max_length, prompt.temperature)
            self._remember(prompt.request_id, text)
        segments = tuple(prompt.rows for prompt in prefill if prompt.rows is not None)
        return self._make(segments, (), (0.0, 0.0), [prompt.request_id for prompt in prefill])

    def _round(self, verified: Verified, num_accepted: list[int]) -> VerifyRound:
        segments: list[Segment] = []
        blocks: list[ServedBlock] = []
        teacher = verified.teacher_BSX
        lengths = verified.lengths() if verified.lengths else [None] * len(num_accepted)
        # Once for all of them: an anchor with what came out behind it.
        text_BT = torch.cat((verified.tokens_BS[:, :1], verified.decided_BS), 1)
        for i, (request_id, accepted) in enumerate(
            zip(verified.request_ids, num_accepted, strict=True)
        ):
            text = self._texts.get(request_id)
            if text is None:
                continue  # it finished while this round was under way
            anchor, count = text.anchor, accepted + 1
            path_K = verified.tokens_BS[i, 1:][: lengths[i]]
            if teacher is not None:
                tokens = text_BT[i, : count + 1]
                features = verified.features_BSF
                features_RF = None if features is None else features[i, :count]
                rows_RX, at = teacher[i, :count], text.temperature
                segments.append(
                    Segment(request_id, anchor, tokens, features_RF, rows_RX, temperature=at)
                )
            rows = None if teacher is None else teacher[i, : len(path_K)]
            blocks.append(ServedBlock(request_id, anchor, path_K, rows, accepted, count))
            if self._on_row is not None:
                position = anchor + 1 - text.prompt_length
                num_drafted = len(path_K)
                self._on_row(
                    RoundRow(request_id, position, verified.version, num_drafted, accepted, count)
                )
            text.anchor += count
            self._texts.move_to_end(request_id)
        running = [block.request_id for block in blocks]
        return self._make(tuple(segments), tuple(blocks), verified.seconds(), running)

    def _make(
        self,
        segments: tuple[Segment, ...],
        blocks: tuple[ServedBlock, ...],
        seconds: tuple[float, float],
        running: list[str],
    ) -> VerifyRound:
        left = [self._texts[request_id].left for request_id in running]
        known = [tokens for tokens in left if tokens is not None]
        finished = tuple(self._finished)
        self._finished.clear()
        return VerifyRound(
            segments=segments,
            blocks=blocks,
            finished=finished,
            draft_seconds=seconds[0],
            verify_seconds=seconds[1],
            num_running=len(running),
            tokens_left=sum(known) if len(known) == len(left) else None,
            num_queued=self.num_queued,
        )

    def _remember(self, request_id: str, text: _Text) -> None:
        self._texts[request_id] = text
        self._texts.move_to_end(request_id)
        while len(self._texts) > KNOWN_REQUESTS:
            self._texts.popitem(last=False)
