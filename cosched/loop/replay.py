"""The replay buffer: what the last rounds taught, bounded in tokens and in bytes.

Letters: R requests, C context rows, N anchors, K drafted tokens, F fused feature width, X teacher
width (hidden or vocabulary).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosched.records import Rows, Segment, ServedBlock, SignalBatch, VerifyRound

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN_BYTES = torch.int64.itemsize


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """What is kept and what is drawn.

    ``window`` rows of context are kept of each request, ``anchors`` are drawn for a micro-step at
    most, shared evenly by the requests (those heard of last, where they are more). ``max_tokens``
    and ``max_bytes`` bound the whole buffer; ``feature_row_bytes`` and ``teacher_row_bytes`` are
    what one row of each takes, so that a request's cost is known before it is let in.
    """

    window: int
    anchors: int
    path: int
    max_tokens: int
    max_bytes: int
    feature_row_bytes: int
    teacher_row_bytes: int

    def request_bytes(self, keep_blocks: bool) -> int:
        """Most bytes that one request takes: rows twice over, and a served block for each row."""
        row = TOKEN_BYTES + self.feature_row_bytes + self.teacher_row_bytes
        block = self.path * (TOKEN_BYTES + self.teacher_row_bytes) if keep_blocks else 0
        return 2 * self.window * row + TOKEN_BYTES + self.window * block

    def room(self, request_bytes: int) -> int:
        """How many requests fit."""
        return min(self.max_bytes // request_bytes, self.max_tokens // self.window)


class ReplayBuffer:
    """Committed rows and served blocks of the running requests.

    A request costs its full reservation from its first segment on; when a new one does not fit,
    the requests that have been silent longest are dropped, and counted in ``num_evicted``. One that
    has finished is dropped at once, unless ``keep_finished``: then it is drawn from where no running
    one has an anchor. ``fresh`` draws an anchor once at most: those that have come since the last
    draw, of finished requests too, which have no more to come and go then.

    Context that no anchor's window reaches is left out of a batch. A draft of several layers, whose
    older rows have seen more than their window when it serves, loses a little by that.

    With ``held_out`` a sample leaves out the newest rows of every request, enough for that many
    anchors in all, and ``held_out()`` gives them: no row of theirs has been in a sample, only the
    context before them. They are sampled later, when they are no longer the newest: training lags
    behind the text by that many tokens and a path, which is what an honest score costs. What is
    evidence is given once (``once``): the same rows again would seem to say more than they do.
    """

    def __init__(
        self,
        limits: ReplayLimits,
        rows: Rows,
        draft_window: int | None,
        refused_weight: float = 1.0,
        keep_finished: bool = False,
        fresh: bool = False,
        held_out: int = 0,
    ) -> None:
        self.limits = limits
        self.rows: Rows = rows
        self.draft_window = draft_window
        self._keep_finished = keep_finished
        self._fresh = fresh
        self._held_out = held_out
        # What rows behind the first refusal weigh: as set where they are kept, nothing where cut.
        self._refused_weight = refused_weight if rows == "all" else 0.0
        self.num_evicted = 0
        self._keep_blocks = rows != "delayed"
        self._request_bytes = limits.request_bytes(self._keep_blocks)
        self._requests: OrderedDict[str, _RequestRows] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return sum(rows.count for rows in self._requests.values())

    @property
    def num_bytes(self) -> int:
        """Reserved bytes: every request counts at its most from the start."""
        return len(self._requests) * self._request_bytes

    def collect(self, round_: VerifyRound) -> None:
        """Take in a round: new rows, served blocks, and which requests are done."""
        for segment in round_.segments:
            if segment.request_id not in self._requests and not self._admit(segment):
                continue
            self._requests[segment.request_id].append(segment)
            self._requests.move_to_end(segment.request_id)
        if self._keep_blocks:
            for block in round_.blocks:
                if block.request_id in self._requests:
                    self._requests[block.request_id].blocks.append(_owned(block))
        for request_id in self._requests.keys() & set(round_.finished):
            self._requests[request_id].finished = True
            if not self._keep_finished:
                del self._requests[request_id]

    def _admit(self, segment: Segment) -> bool:
        limits = self.limits
        room = limits.room(self._request_bytes)
        if room == 0:
            self.num_evicted += 1
            return False
        while len(self._requests) >= room:
            self._requests.popitem(last=False)
            self.num_evicted += 1
        self._requests[segment.request_id] = _RequestRows(limits, segment, self.draft_window)
        return True

    def sample(self) -> SignalBatch | None:
        """The newest anchors of the requests; None while none has one."""
        path, refused_weight = self.limits.path, self._refused_weight
        drawn = self._shared(
            lambda one, share, spare: one.draw(self.rows, share, path, refused_weight, spare),
            self.limits.anchors,
        )
        if self._fresh:
            self._forget_drawn()
        return _pad(drawn[::-1], self.draft_window) if drawn else None

    def held_out(
        self, num_anchors: int, once: bool = False, at_least: int = 1
    ) -> SignalBatch | None:
        """The newest anchors, none of whose rows was in a sample, with the text that followed.

        At most ``num_anchors``, shared as those of a sample; None while there are not ``at_least``
        so many. Paths are committed text, whatever ``rows`` says. What was given ``once`` is not
        given so again.
        """
        path, givers = self.limits.path, list[_RequestRows]()

        def draw(one: _RequestRows, share: int, _spare: int) -> _Drawn | None:
            drawn = one.untaught(share, path, once)
            if drawn is not None:
                givers.append(one)
            return drawn

        drawn = self._shared(draw, num_anchors)
        if sum(len(one.anchors_N) for one in drawn) < at_least:
            return None
        if once:
            for one in givers:
                one.give(path)
        return _pad(drawn, self.draft_window)

    def _shared(
        self, draw: Callable[[_RequestRows, int, int], _Drawn | None], num_anchors: int
    ) -> list[_Drawn]:
        """What ``draw(request, anchors, rows to spare)`` finds, in at most so many requests."""
        requests = list(reversed(self._requests.values()))  # those heard of last come first
        running = [rows for rows in requests if not rows.finished]
        finished = [rows for rows in requests if rows.finished]
        for group in [running + finished] if self._fresh else [running, finished]:
            share, spare = max(1, num_anchors // max(1, len(group))), self._spare(len(group))
            found = (draw(rows, share, spare) for rows in group)
            if drawn := list(islice((one for one in found if one is not None), num_anchors)):
                return drawn
        return []

    def _spare(self, sharing: int) -> int:
        """Newest rows of each of so many requests that no sample has."""
        if not self._held_out:
            return 0
        return max(1, self._held_out // max(1, sharing)) + self.limits.path - 1

    def _forget_drawn(self) -> None:
        """Nothing that could be drawn now will be again."""
        spare = self._spare(len(self._requests))
        for rows in self._requests.values():
            newest = rows.start + rows.newest(self.rows, self.limits.path, spare)
            rows.fresh_from = max(rows.fresh_from, newest + 1)
        done = [request_id for request_id, rows in self._requests.items() if rows.finished]
        for request_id in done:
            del self._requests[request_id]


def _owned(block: ServedBlock) -> ServedBlock:
    """The block in storage of its own: a view would keep the rows of the whole batch alive."""
    assert block.teacher_KX is not None, "a block without its teacher's rows teaches nothing"
    return replace(block, path_K=block.path_K.clone(), teacher_KX=block.teacher_KX.clone())


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Context, anchors and paths of one request."""

    start: int
    tokens_C1: Tensor
    features_CF: Tensor | None
    anchors_N: Tensor
    paths_NK: Tensor
    teacher_NKX: Tensor
    weights_NK: Tensor


_Found = tuple[int, Tensor, Tensor, Tensor, Tensor]
"""The first anchor; anchors [N], oldest first, paths [N, K], their teacher and weights."""


class _RequestRows:
    """The newest rows of one request, contiguous, in storage twice as long as what is kept.

    Rows are appended; when the storage is full its newest half moves to the front, so appending
    costs one copy of each row and now and then one more.
    """

    def __init__(self, limits: ReplayLimits, first: Segment, draft_window: int | None) -> None:
        self.capacity = limits.window
        self._draft_window = draft_window
        size = 2 * self.capacity
        self.start = first.start
        self.begin = 0
        self.count = 0
        self.fresh_from = 0  # position of the first anchor that may be drawn
        self.finished = False
        self.teacher_from: int | None = None
        self.taught_to = 0  # position behind the newest row that was in a sample
        self.given_to = 0  # position behind the newest anchor that was given once
        self.tokens = first.tokens_R1.new_zeros(size + 1)
        features = first.features_RF
        self.features = None if features is None else features.new_zeros(size, features.shape[-1])
        self.teacher: Tensor | None = None
        self.blocks: deque[ServedBlock] = deque(maxlen=limits.window)

    def append(self, segment: Segment) -> None:
        skipped = max(0, len(segment.tokens_R1) - 1 - self.capacity)
        new = len(segment.tokens_R1) - 1 - skipped
        start = segment.start + skipped
        if skipped or start != self.start + self.count:
            self.start, self.begin, self.count = start, 0, 0  # a gap: older rows no longer connect
            self.teacher_from = None
            self.blocks.clear()
        elif self.begin + self.count + new > 2 * self.capacity:
            self._move_to_front(self.capacity - new)
        end = self.begin + self.count
        self.tokens[end : end + new + 1] = segment.tokens_R1[skipped:]
        if self.features is not None:
            assert segment.features_RF is not None
            self.features[end : end + new] = segment.features_RF[skipped:]
        if segment.teacher_RX is None:
            self.teacher_from = None
        else:
            if self.teacher is None:
                width = segment.teacher_RX.shape[-1]
                self.teacher = segment.teacher_RX.new_zeros(2 * self.capacity, width)
            self.teacher[end : end + new] = segment.teacher_RX[skipped:]
            self.teacher_from = start if self.teacher_from is None else self.teacher_from
        self.count += new
        self._drop(max(0, self.count - self.capacity))

    def _drop(self, number: int) -> None:
        self.begin += number
        self.start += number
        self.count -= number

    def _move_to_front(self, keep: int) -> None:
        self._drop(max(0, self.count - keep))
        source = slice(self.begin, self.begin + self.count)
        self.tokens[: self.count + 1] = self.tokens[
            self.begin : self.begin + self.count + 1
        ].clone()
        for storage in (self.features, self.teacher):
            if storage is not None:
                storage[: self.count] = storage[source].clone()
        self.begin = 0

    def draw(
        self, rows: Rows, num_anchors: int, path: int, refused_weight: float, spare: int
    ) -> _Drawn | None:
        """The newest anchors with their paths, less ``spare`` rows, or None while there is none."""
        if self.teacher is None or self.teacher_from is None:
            return None
        if rows == "delayed":
            found = self._committed_paths(num_anchors, path, 1, self.count - spare)
        else:
            newest = self.newest(rows, path, spare)
            found = self._served_paths(num_anchors, rows == "refused", refused_weight, newest)
        if found is None:
            return None
        self.taught_to = max(self.taught_to, self.start + self.count - spare)
        return self._drawn(found)

    def newest(self, rows: Rows, path: int, spare: int) -> int:
        """The newest anchor that may be drawn; a served one has its rows with it."""
        return self.count - path - spare if rows == "delayed" or spare else self.count - 1

    def untaught(self, num_anchors: int, path: int, once: bool) -> _Drawn | None:
        """The newest anchors behind all rows that were in a sample, or None while there is none."""
        if self.teacher is None or self.teacher_from is None:
            return None
        first = max(1, max(self.taught_to, self.given_to if once else 0) - self.start)
        found = self._committed_paths(num_anchors, path, first, self.count)
        return None if found is None else self._drawn(found)

    def give(self, path: int) -> None:
        """What is untaught now has been given once."""
        self.given_to = self.start + self.count - path + 1

    def _drawn(self, found: _Found) -> _Drawn:
        """With what is kept as context, or of it what the window of the first anchor reaches."""
        first, anchors, paths, teacher, weights = found
        unseen = max(0, first - self._draft_window - 1) if self._draft_window else 0
        begin, end = self.begin + unseen, self.begin + self.count
        return _Drawn(
            start=self.start + unseen,
            tokens_C1=self.tokens[begin : end + 1],
            features_CF=None if self.features is None else self.features[begin:end],
            anchors_N=anchors - unseen,
            paths_NK=paths,
            teacher_NKX=teacher,
            weights_NK=weights,
        )

    def _committed_paths(self, num_anchors: int, path: int, first: int, end: int) -> _Found | None:
        """Anchors in the text with what the target went on to say; teacher rows are the text's.

        The newest whose rows lie in ``first .. end - 1``.
        """
        assert self.teacher is not None
        assert self.teacher_from is not None
        last = end - path  # its path ends at the newest row
        known = max(self.teacher_from, self.fresh_from) - self.start
        first = max(first, known, last - num_anchors + 1)
        if first > last:
            return None
        anchors = torch.arange(first, last + 1, device=self.tokens.device)
        ahead = anchors[:, None] + torch.arange(path, device=anchors.device)
        return (
            first,
            anchors,
            self.tokens[self.begin + ahead + 1],
            self.teacher[self.begin + ahead],
            torch.ones(ahead.shape, device=anchors.device),
        )

    def _served_paths(
        self, num_anchors: int, only_refused: bool, refused_weight: float, newest: int
    ) -> _Found | None:
        """Anchors that were served with what was drafted, and the weight of rows after a refusal.

        The row of the refused token itself stands on accepted text and counts in full; with
        ``only_refused`` no other does.
        """
        oldest = max(1, self.fresh_from - self.start)
        blocks = [b for b in self.blocks if oldest <= b.anchor - self.start <= newest]
        if only_refused:  # a block that was accepted whole would be all zeros
            blocks = [b for b in blocks if b.num_accepted < len(b.path_K)]
        blocks = blocks[-num_anchors:]
        if not blocks:
            return None
        device = self.tokens.device
        anchors = torch.tensor([b.anchor - self.start for b in blocks], device=device)
        paths = torch.stack([b.path_K for b in blocks])
        weights = torch.ones(paths.shape, device=device)
        accepted_N = torch.tensor([b.num_accepted for b in blocks], device=device)
        k_K = torch.arange(paths.shape[1], device=device)
        weights = weights.masked_fill(k_K > accepted_N[:, None], refused_weight)
        if only_refused:
            weights = weights.masked_fill(k_K < accepted_N[:, None], 0)
        teacher = [b.teacher_KX for b in blocks if b.teacher_KX is not None]
        return blocks[0].anchor - self.start, anchors, paths, torch.stack(teacher), weights


def _pad(drawn: list[_Drawn], draft_window: int | None) -> SignalBatch:
    """Stack requests of unequal length; padding has weight zero and anchor one."""
    context = max(len(one.tokens_C1) for one in drawn) - 1
    anchors = max(len(one.anchors_N) for one in drawn)

    def stacked(tensors: list[Tensor], length: int, fill: int = 0) -> Tensor:
        if all(len(tensor) == length for tensor in tensors):
            return torch.stack(tensors)
        shape = (len(tensors), length, *tensors[0].shape[1:])
        out = tensors[0].new_full(shape, fill)
        for row, tensor in zip(out, tensors, strict=True):
            row[: len(tensor)] = tensor
        return out

    device = drawn[0].tokens_C1.device
    features = [one.features_CF for one in drawn if one.features_CF is not None]
    return SignalBatch(
        starts_R=torch.tensor([one.start for one in drawn], device=device),
        lengths_R=torch.tensor([len(one.tokens_C1) - 1 for one in drawn], device=device),
        tokens_RC1=stacked([one.tokens_C1 for one in drawn], context + 1),
        features_RCF=stacked(features, context) if features else None,
        anchors_RN=stacked([one.anchors_N for one in drawn], anchors, fill=1),
        paths_RNK=stacked([one.paths_NK for one in drawn], anchors),
        teacher_RNKX=stacked([one.teacher_NKX for one in drawn], anchors),
        weights_RNK=stacked([one.weights_NK for one in drawn], anchors),
        window=draft_window,
    )
