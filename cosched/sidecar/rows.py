"""A round as a header and bytes, and back.

Behind one another lie, each on a boundary (``starts_of``): tokens of all segments and blocks (int64),
features of all segments, teacher rows of all segments and blocks.

Letters: R rows of one request, K drafted tokens, F feature width, X teacher width.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cosched.loop.copies import Copies, starts_of
from cosched.records import Segment, ServedBlock, VerifyRound
from cosched.sidecar.messages import BlockHead, RowForm, SegmentHead
from cosched.sidecar.wire import FrameError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from cosched.sidecar.messages import Rounds

CPU = torch.device("cpu")
LONGEST_ID = 64  # letters of a request's name in a message
TYPES = {
    str(one).removeprefix("torch."): one for one in (torch.float32, torch.bfloat16, torch.float16)
}
"""What rows and weights may be of, by the names that messages have."""


def form_of(features_0F: Tensor, teacher_0X: Tensor) -> RowForm:
    """The form of rows like these, of which there may be none."""
    return RowForm(
        feature_width=features_0F.shape[-1],
        teacher_width=teacher_0X.shape[-1],
        feature_type=str(features_0F.dtype).removeprefix("torch."),
        teacher_type=str(teacher_0X.dtype).removeprefix("torch."),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where everything lies: how many of each there are, and the bytes of all."""

    tokens: int
    features: int
    teachers: int
    form: RowForm

    @property
    def sizes(self) -> tuple[int, int, int]:
        form = self.form
        return (
            self.tokens * torch.int64.itemsize,
            self.features * form.feature_width * TYPES[form.feature_type].itemsize,
            self.teachers * form.teacher_width * TYPES[form.teacher_type].itemsize,
        )

    @property
    def starts(self) -> list[int]:
        """Of the three, and the end of the last."""
        return starts_of(self.sizes)

    def views(self, bytes_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three, as they lie in ``bytes_``."""
        form = self.form
        tokens, features, teachers = (
            bytes_[start : start + size]
            for start, size in zip(self.starts, self.sizes, strict=False)
        )
        return (
            tokens.view(torch.int64),
            features.view(TYPES[form.feature_type]).view(self.features, form.feature_width),
            teachers.view(TYPES[form.teacher_type]).view(self.teachers, form.teacher_width),
        )


def _plan(segments: Sequence[SegmentHead], blocks: Sequence[BlockHead], form: RowForm) -> _Plan:
    return _Plan(
        sum(one.rows + 1 for one in segments) + sum(one.drafted for one in blocks),
        sum(one.rows for one in segments if one.features),
        sum(one.rows for one in segments if one.teacher)
        + sum(one.drafted for one in blocks if one.teacher),
        form,
    )


def size_of(rows: int, form: RowForm) -> int:
    """Bytes of so many rows with all that belongs to them, in one segment each."""
    return _Plan(3 * rows, rows, 2 * rows, form).starts[-1]


def bounded(request_id: str) -> str:
    """The name that a request has in messages: a hash where it is longer, or what no message can hold.

    Clients choose these names, and no client may write a message that is refused.
    """
    name = request_id.encode(errors="surrogatepass")
    if request_id.isascii() and 0 < len(name) <= LONGEST_ID:
        return request_id
    return hashlib.sha256(name).hexdigest()


@dataclass(slots=True)
class Packer:
    """Packs rounds into bytes that others have. Of a segment the last ``window`` rows are kept.

    ``with_blocks``: teacher rows of served blocks go along, which only some losses learn from.
    """

    form: RowForm
    window: int
    with_blocks: bool
    _copies: Copies = field(default_factory=Copies, init=False)

    def heads(
        self, round_: VerifyRound
    ) -> tuple[tuple[SegmentHead, ...], tuple[BlockHead, ...], int]:
        """What is said of its segments and blocks, and how many bytes their tensors take."""
        segments = tuple(map(self._head, round_.segments))
        blocks = tuple(
            BlockHead(
                bounded(one.request_id),
                one.anchor,
                len(one.path_K),
                self.with_blocks and one.teacher_KX is not None,
                one.num_accepted,
                one.num_committed,
            )
            for one in round_.blocks
        )
        return segments, blocks, _plan(segments, blocks, self.form).starts[-1]

    def _head(self, one: Segment) -> SegmentHead:
        rows = len(one.tokens_R1) - 1
        kept = min(rows, self.window)
        features, teacher = one.features_RF is not None, one.teacher_RX is not None
        start, temperature = one.start + rows - kept, float(one.temperature)
        return SegmentHead(bounded(one.request_id), start, kept, features, teacher, temperature)

    def pack(
        self,
        round_: VerifyRound,
        segments: Sequence[SegmentHead],
        blocks: Sequence[BlockHead],
        bytes_: Tensor,
    ) -> None:
        """Copy the tensors of a round with these heads; where they are on a device, this waits for it."""
        tokens, features, teachers = _plan(segments, blocks, self.form).views(bytes_)
        put_tokens, put_features, put_teachers = map(self._putter, (tokens, features, teachers))
        for head, one in zip(segments, round_.segments, strict=True):
            put_tokens(one.tokens_R1[-head.rows - 1 :])
            if one.features_RF is not None and head.rows:
                put_features(one.features_RF[-head.rows :])
            if one.teacher_RX is not None and head.rows:
                put_teachers(one.teacher_RX[-head.rows :])
        for head, block in zip(blocks, round_.blocks, strict=True):
            put_tokens(block.path_K)
            if head.teacher and block.teacher_KX is not None:
                put_teachers(block.teacher_KX)
        self._copies.make()

    def _putter(self, destination: Tensor) -> Callable[[Tensor], None]:
        end = 0

        def put(source: Tensor) -> None:
            nonlocal end
            self._copies.add(destination[end : end + len(source)], source)
            end += len(source)

        return put


def unpack(
    message: Rounds,
    bytes_: Tensor,
    form: RowForm,
    vocab_size: int,
    whose: str,
    device: torch.device = CPU,
) -> VerifyRound:
    """The round of a message; requests are named as ``whose`` they are.

    Its tensors lie over the bytes themselves, or over one copy of them on another device.

    Raises:
        FrameError: the bytes are more or fewer than the header says, or tokens are none.
    """
    plan = _plan(message.segments, message.blocks, form)
    if not plan.starts[-1] == message.size == len(bytes_):
        raise FrameError(f"{len(bytes_)} bytes of rows, and by the header {plan.starts[-1]}")
    if any(one.num_accepted > one.drafted for one in message.blocks):
        raise FrameError("more tokens accepted than drafted")
    seconds = message.draft_seconds, message.verify_seconds, message.plain_share or 0.0
    if not all(map(math.isfinite, (*seconds, *(one.temperature for one in message.segments)))):
        raise FrameError("a time or a temperature that is no number")
    tokens, *_ = plan.views(bytes_)
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        raise FrameError("tokens that the target does not have")
    take_tokens, take_features, take_teachers = map(_taker, plan.views(bytes_.to(device)))
    segments = tuple(
        Segment(
            request_id=f"{whose}/{one.request_id}",
            start=one.start,
            tokens_R1=take_tokens(one.rows + 1),
            features_RF=take_features(one.rows) if one.features else None,
            teacher_RX=take_teachers(one.rows) if one.teacher else None,
            temperature=one.temperature,
        )
        for one in message.segments
    )
    blocks = tuple(
        ServedBlock(
            request_id=f"{whose}/{one.request_id}",
            anchor=one.anchor,
            path_K=take_tokens(one.drafted),
            teacher_KX=take_teachers(one.drafted) if one.teacher else None,
            num_accepted=one.num_accepted,
            num_committed=one.num_committed,
        )
        for one in message.blocks
    )
    return VerifyRound(
        segments=segments,
        blocks=blocks,
        finished=tuple(f"{whose}/{one}" for one in message.finished),
        draft_seconds=message.draft_seconds,
        verify_seconds=message.verify_seconds,
        num_running=message.num_running,
        tokens_left=message.tokens_left,
        num_queued=message.num_queued,
        plain_share=message.plain_share,
    )


def _taker(source: Tensor) -> Callable[[int], Tensor]:
    end = 0

    def take(count: int) -> Tensor:
        nonlocal end
        end += count
        return source[end - count : end]

    return take
