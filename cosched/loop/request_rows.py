"""The newest rows of one request, and what is drawn of them to train on.

Letters: R requests, C context rows, N anchors, K drafted tokens, F fused feature width, X teacher
width (hidden or vocabulary).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosched.loop.layout import upload
from cosched.records import Layout, SignalBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cosched.loop.copies import Copies
    from cosched.records import Rows, Segment, ServedBlock


@dataclass(frozen=True, slots=True)
class Drawn:
    """Context, anchors and paths of one request, which samples at ``temperature``.

    Teacher rows of the same number in ``says_NK`` are alike; it and the weights are the host's.
    """

    start: int
    tokens_C1: Tensor
    features_CF: Tensor | None
    anchors_N: Tensor
    paths_NK: Tensor
    teacher_NKX: Tensor
    weights_NK: NDArray[np.float32]
    says_NK: NDArray[np.int64]
    temperature: float


CONTEXT_STEP = 64  # rows

Found = tuple[int, Tensor, Tensor, Tensor, "NDArray[np.float32]", "NDArray[np.int64]"]
"""The first anchor; anchors [N], oldest first, paths [N, K], their teacher, weights, and alike rows."""


class RequestRows:
    """The newest rows of one request, contiguous, in storage twice as long as what is kept.

    Rows are appended; when the storage is full its newest half moves to the front, so appending
    costs one copy of each row and now and then one more.
    """

    def __init__(self, window: int, first: Segment, draft_window: int | None) -> None:
        self.capacity = window
        self._draft_window = draft_window
        size = 2 * self.capacity
        self.start = first.start
        self.temperature = first.temperature
        self.begin = 0
        self.count = 0
        self.fresh_from = 0  # position of the first anchor that may be drawn
        self.finished = False
        self.teacher_from: int | None = None
        self.trained_to = 0  # position behind the newest row that was in a sample
        self.given_to = 0  # position behind the newest anchor that was given once
        self.tokens = first.tokens_R1.new_zeros(size + 1)
        features = first.features_RF
        self.features = None if features is None else features.new_zeros(size, features.shape[-1])
        self.teacher: Tensor | None = None
        self.blocks: deque[ServedBlock] = deque(maxlen=window)

    def append(self, segment: Segment, copies: Copies) -> None:
        """Take in rows; they are there when the ``copies`` have been made."""
        skipped = max(0, len(segment.tokens_R1) - 1 - self.capacity)
        new = len(segment.tokens_R1) - 1 - skipped
        start = segment.start + skipped
        if skipped or start != self.start + self.count:
            self.start, self.begin, self.count = start, 0, 0  # a gap: older rows no longer connect
            self.teacher_from = None
            self.blocks.clear()
        elif self.begin + self.count + new > 2 * self.capacity:
            copies.make()  # what moves must be there
            self._move_to_front(self.capacity - new)
        end = self.begin + self.count
        copies.add(self.tokens[end : end + new + 1], segment.tokens_R1[skipped:])
        if self.features is not None:
            assert segment.features_RF is not None
            copies.add(self.features[end : end + new], segment.features_RF[skipped:])
        if segment.teacher_RX is None:
            self.teacher_from = None
        else:
            if self.teacher is None:
                width = segment.teacher_RX.shape[-1]
                self.teacher = segment.teacher_RX.new_zeros(2 * self.capacity, width)
            copies.add(self.teacher[end : end + new], segment.teacher_RX[skipped:])
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
    ) -> Drawn | None:
        """The newest anchors with their paths, less ``spare`` rows, or None while there is none."""
        if self.teacher is None or self.teacher_from is None:
            return None
        if rows == "delayed":
            found = self._committed_paths(num_anchors, path, 1, self.count - spare)
        else:
            newest = self.newest(rows, path, spare)
            found = self._served_paths(num_anchors, path, rows == "refused", refused_weight, newest)
        if found is None:
            return None
        self.trained_to = max(self.trained_to, self.start + self.count - spare)
        return self._drawn(found)

    def newest(self, rows: Rows, path: int, spare: int) -> int:
        """The newest anchor that may be drawn; a served one has its rows with it."""
        return self.count - path - spare if rows == "delayed" or spare else self.count - 1

    def untrained(self, num_anchors: int, path: int, once: bool) -> Drawn | None:
        """The newest anchors behind all rows that were in a sample, or None while there is none."""
        if self.teacher is None or self.teacher_from is None:
            return None
        first = max(1, max(self.trained_to, self.given_to if once else 0) - self.start)
        found = self._committed_paths(num_anchors, path, first, self.count)
        return None if found is None else self._drawn(found)

    def give(self, path: int) -> None:
        """What is untrained now has been given once."""
        self.given_to = self.start + self.count - path + 1

    def _drawn(self, found: Found) -> Drawn:
        """With what is kept as context, or of it what the window of the first anchor reaches."""
        first, anchors, paths, teacher, weights, says = found
        unseen = max(0, first - self._draft_window - 1) if self._draft_window else 0
        begin, end = self.begin + unseen, self.begin + self.count
        return Drawn(
            start=self.start + unseen,
            tokens_C1=self.tokens[begin : end + 1],
            features_CF=None if self.features is None else self.features[begin:end],
            anchors_N=anchors - unseen,
            paths_NK=paths,
            teacher_NKX=teacher,
            weights_NK=weights,
            says_NK=says,
            temperature=self.temperature,
        )

    def _committed_paths(self, num_anchors: int, path: int, first: int, end: int) -> Found | None:
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
            np.ones(ahead.shape, np.float32),
            np.arange(len(anchors))[:, None] + np.arange(path),  # the text's own rows
        )

    def _served_paths(
        self, num_anchors: int, path: int, only_refused: bool, refused_weight: float, newest: int
    ) -> Found | None:
        """Anchors that were served with what was drafted, and the weight of rows after a refusal.

        The row of the refused token itself stands on accepted text and counts in full; with
        ``only_refused`` no other does. Places of the path that were not drafted weigh nothing.
        """
        oldest = max(1, self.fresh_from - self.start)
        drafted = (b for b in self.blocks if len(b.path_K))
        blocks = [b for b in drafted if oldest <= b.anchor - self.start <= newest]
        if only_refused:  # a block that was accepted whole would be all zeros
            blocks = [b for b in blocks if b.num_accepted < len(b.path_K)]
        blocks = blocks[-num_anchors:]
        if not blocks:
            return None
        anchors = np.array([block.anchor - self.start for block in blocks])
        paths = stacked([b.path_K for b in blocks], path)
        weights = np.ones(paths.shape, np.float32)
        accepted_N1 = np.array([[block.num_accepted] for block in blocks])
        drafted_N1 = np.array([[len(block.path_K)] for block in blocks])
        k_K = np.arange(path)
        weights[k_K > accepted_N1] = refused_weight
        if only_refused:
            weights[k_K < accepted_N1] = 0
        weights[k_K >= drafted_N1] = 0
        teacher = stacked([b.teacher_KX for b in blocks if b.teacher_KX is not None], path)
        says = np.arange(weights.size).reshape(weights.shape)  # no two stand behind the same text
        return (
            blocks[0].anchor - self.start,
            upload(anchors, self.tokens.device),
            paths,
            teacher,
            weights,
            says,
        )


def stacked(tensors: list[Tensor], length: int, fill: int = 0) -> Tensor:
    """Tensors of unequal length as one, each filled up behind its end."""
    if all(len(tensor) == length for tensor in tensors):
        return torch.stack(tensors)
    shape = (len(tensors), length, *tensors[0].shape[1:])
    out = tensors[0].new_full(shape, fill)
    for row, tensor in zip(out, tensors, strict=True):
        row[: len(tensor)] = tensor
    return out


def pad(drawn: list[Drawn], draft_window: int | None) -> SignalBatch:
    """Stack requests of unequal length; padding has weight zero and anchor one.

    Contexts are padded to whole multiples of ``CONTEXT_STEP``: some kernels are compiled for every
    shape that comes, which takes longer than they run.
    """
    longest = max(len(one.tokens_C1) for one in drawn) - 1
    context = -(-longest // CONTEXT_STEP) * CONTEXT_STEP
    anchors = max(len(one.anchors_N) for one in drawn)

    device = drawn[0].tokens_C1.device
    features = [one.features_CF for one in drawn if one.features_CF is not None]
    starts = tuple(one.start for one in drawn)
    starts_R = upload(np.array(starts), device)
    weights, says = _on_host(drawn, anchors)
    weights_RNK = upload(weights, device)
    teacher_RNKX = stacked([one.teacher_NKX for one in drawn], anchors)
    return SignalBatch(
        starts_R=starts_R,
        lengths_R=upload(np.array([len(one.tokens_C1) - 1 for one in drawn]), device),
        tokens_RC1=stacked([one.tokens_C1 for one in drawn], context + 1),
        features_RCF=stacked(features, context) if features else None,
        anchors_RN=stacked([one.anchors_N for one in drawn], anchors, fill=1),
        paths_RNK=stacked([one.paths_NK for one in drawn], anchors),
        teacher_RNKX=teacher_RNKX,
        weights_RNK=weights_RNK,
        window=draft_window,
        temperatures=tuple(one.temperature for one in drawn),
        layout=Layout(starts, weights, says, of=(starts_R, weights_RNK, teacher_RNKX)),
    )


def _on_host(drawn: list[Drawn], num_anchors: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Weights ``[R, N, K]`` and which teacher rows are alike, none of two requests."""
    shape = (len(drawn), num_anchors, drawn[0].weights_NK.shape[1])
    weights, says = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    for row, one in enumerate(drawn):
        weights[row, : len(one.weights_NK)] = one.weights_NK
        says[row, : len(one.says_NK)] = one.says_NK + row * says[0].size
    return weights, says
