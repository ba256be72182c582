"""The replay buffer: what the last rounds left to train on, bounded in tokens and in bytes.

Letters: K drafted tokens, X teacher width (hidden or vocabulary).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from cosched.errors import RunFolderError
from cosched.loop.copies import Copies
from cosched.loop.kept_rows import rows_of, tensors_of
from cosched.loop.request_rows import Drawn, RequestRows, pad

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from cosched.records import Rows, Segment, ServedBlock, SignalBatch, VerifyRound

STATE = "replay."  # begins the names of what is saved
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
    the requests that have been silent longest are dropped, and ``collect`` counts them. One that has
    finished is dropped at once, unless ``keep_finished``: then it is drawn from where no running
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
        device: torch.device | None = None,
    ) -> None:
        self.limits = limits
        self.rows: Rows = rows
        self.draft_window = draft_window
        self._keep_finished = keep_finished
        self._fresh = fresh
        self._held_out = held_out
        self._device = device
        # What rows behind the first refusal weigh: as set where they are kept, nothing where cut.
        self.refused_weight = refused_weight if rows == "all" else 0.0
        self._keep_blocks = rows != "delayed"
        self._request_bytes = limits.request_bytes(self._keep_blocks)
        self._requests: OrderedDict[str, RequestRows] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return sum(rows.count for rows in self._requests.values())

    @property
    def num_bytes(self) -> int:
        """Reserved bytes: every request counts at its most from the start."""
        return len(self._requests) * self._request_bytes

    @property
    def max_bytes(self) -> int:
        return self.limits.max_bytes

    def collect(self, round_: VerifyRound) -> int:
        """Take in a round: new rows, served blocks, and which requests are done.

        Returns how many requests it has dropped, or not let in, because there was no room.
        """
        num_evicted, finished = 0, set(round_.finished)
        gone = set() if self._keep_finished else finished
        for request_id in self._requests.keys() & gone:
            del self._requests[request_id]  # first, so that nobody has to go for who begins
        copies, appended = Copies(), set[str]()
        for segment in round_.segments:
            if segment.request_id in gone:
                continue
            if segment.request_id not in self._requests:
                num_evicted += self._admit(segment)
            if (rows := self._requests.get(segment.request_id)) is not None:
                if segment.request_id in appended:
                    copies.make()  # its first token is the last of before
                appended.add(segment.request_id)
                rows.append(segment, copies)
                self._requests.move_to_end(segment.request_id)
        copies.make()
        if self._keep_blocks:
            for block in round_.blocks:
                if block.request_id in self._requests:
                    self._requests[block.request_id].blocks.append(_owned(block))
        for request_id in self._requests.keys() & finished:
            self._requests[request_id].finished = True
        return num_evicted

    def _admit(self, segment: Segment) -> int:
        """Make room for a request; how many had to go for it, itself where none is large enough."""
        room = self.limits.room(self._request_bytes)
        if room == 0:
            return 1
        num_evicted = max(0, len(self._requests) - room + 1)
        for _ in range(num_evicted):
            self._requests.popitem(last=False)
        rows = RequestRows(self.limits.window, segment, self.draft_window)
        self._requests[segment.request_id] = rows
        return num_evicted

    def sample(self) -> SignalBatch | None:
        """The newest anchors of the requests; None while none has one."""
        path, refused_weight = self.limits.path, self.refused_weight
        drawn = self._shared(
            lambda one, share, spare: one.draw(self.rows, share, path, refused_weight, spare),
            self.limits.anchors,
        )
        if self._fresh:
            self._forget_drawn()
        return pad(drawn[::-1], self.draft_window) if drawn else None

    def held_out(
        self, num_anchors: int, once: bool = False, at_least: int = 1
    ) -> SignalBatch | None:
        """The newest anchors, none of whose rows was in a sample, with the text that followed.

        At most ``num_anchors``, shared as those of a sample; None while there are not ``at_least``
        so many. Paths are committed text, whatever ``rows`` says. What was given ``once`` is not
        given so again.
        """
        path, givers = self.limits.path, list[RequestRows]()

        def draw(one: RequestRows, share: int, _spare: int) -> Drawn | None:
            drawn = one.untrained(share, path, once)
            if drawn is not None:
                givers.append(one)
            return drawn

        drawn = self._shared(draw, num_anchors)
        if sum(len(one.anchors_N) for one in drawn) < at_least:
            return None
        if once:
            for one in givers:
                one.give(path)
        return pad(drawn, self.draft_window)

    def _shared(
        self, draw: Callable[[RequestRows, int, int], Drawn | None], num_anchors: int
    ) -> list[Drawn]:
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

    def state(self) -> dict[str, Tensor]:
        """Rows of requests that have ended; there are none but with ``keep_finished``."""
        ended = [(name, rows) for name, rows in self._requests.items() if rows.finished]
        return {
            f"{STATE}{place}.{key}": tensor
            for place, (name, rows) in enumerate(ended)
            for key, tensor in tensors_of(name, rows).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the rows of a ``state()``, in the same order; other tensors are not looked at.

        Raises:
            RunFolderError: they are no rows, or more than there is room for.
        """
        each: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(STATE):
                place, _, key = name.removeprefix(STATE).partition(".")
                each.setdefault(place, {})[key] = tensor.to(self._device)
        room = self.limits.room(self._request_bytes)
        if len(each) > room:
            raise RunFolderError(
                f"the saved state has rows of {len(each)} requests, and there is room for {room}"
            )
        in_order = sorted(each, key=lambda place: (len(place), place))  # numbers, as text
        window = self.limits.window
        self._requests = OrderedDict(
            rows_of(each[place], window, self.draft_window) for place in in_order
        )


def _owned(block: ServedBlock) -> ServedBlock:
    """The block in storage of its own: a view would keep the rows of the whole batch alive."""
    assert block.teacher_KX is not None, "a block without its teacher's rows teaches nothing"
    return replace(block, path_K=block.path_K.clone(), teacher_KX=block.teacher_KX.clone())
