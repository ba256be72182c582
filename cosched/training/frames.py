"""Sizes that batches are filled up to, so that those of one update are those of many others.

A CUDA graph repeats what it was captured with, shapes included, and what comes differs: in requests,
in the length of their contexts, in anchors, in rows that count and in teacher rows that differ. What
fills a batch up weighs nothing, so the loss and its gradients are those of the batch.

Letters: R requests, C context rows, N anchors, K drafted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cosched.loop.request_rows import CONTEXT_STEP
from cosched.records import Layout, Room, SignalBatch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Frames:
    """A size for every power of two of requests, as far as ``most_requests`` need.

    Each request has a whole ``window`` of context, and as many anchors as it may have where so many
    share ``anchors``: at most twice as many as there are, of all requests together. Rows that count are
    filled up to those of ``anchors`` alone. Teacher rows are fewer where paths run along the text
    (``along_text``), so that neighbours have most of theirs in common. A text may begin at ``longest``
    at most: tables of positions are made for it before anything is captured.
    """

    window: int
    anchors: int
    most_requests: int
    along_text: bool
    longest: int

    @property
    def sizes(self) -> list[int]:
        """Numbers of requests, from the largest."""
        most = min(self.most_requests, self.anchors)
        return [1 << power for power in range((most - 1).bit_length(), -1, -1)]

    @property
    def context(self) -> int:
        """C, which a batch has in whole steps (``cosched.loop.request_rows``)."""
        return -(-self.window // CONTEXT_STEP) * CONTEXT_STEP

    def fill(self, batch: SignalBatch) -> SignalBatch:
        """The batch in its frame, with the room of its rows; itself where it has none.

        It has none if it is larger than any, or if the host does not know its layout.
        """
        requests, anchors, path = batch.weights_RNK.shape
        size = 1 << (requests - 1).bit_length()
        share = max(1, self.anchors // (size // 2 + 1))  # of the fewest requests of that size
        known, room = batch.known, self._room(size * share, size, path)
        if (
            known is None
            or size > self.sizes[0]
            or anchors > share
            or not self._holds(batch, known, room)
        ):
            return batch
        starts_R = _filled(batch.starts_R, size)
        weights_RNK = _filled(batch.weights_RNK, size, share)
        teacher_RNKX = _filled(batch.teacher_RNKX, size, share)
        features, temperatures = batch.features_RCF, batch.temperatures
        more = size - requests
        sides = (0, more), (0, share - anchors), (0, 0)
        return replace(
            batch,
            starts_R=starts_R,
            lengths_R=_filled(batch.lengths_R, size),
            tokens_RC1=_filled(batch.tokens_RC1, size, self.context + 1),
            features_RCF=None if features is None else _filled(features, size, self.context),
            anchors_RN=_filled(batch.anchors_RN, size, share, of=1),  # each has to see something
            paths_RNK=_filled(batch.paths_RNK, size, share),
            teacher_RNKX=teacher_RNKX,
            weights_RNK=weights_RNK,
            temperatures=None if temperatures is None else (*temperatures, *(1.0,) * more),
            layout=Layout(
                (*known.starts, *(0,) * more),
                np.pad(known.weights_RNK, sides),
                np.pad(known.says_RNK, sides),
                of=(starts_R, weights_RNK, teacher_RNKX),
                room=room,
            ),
        )

    def _holds(self, batch: SignalBatch, known: Layout, room: Room) -> bool:
        says = known.says_RNK[known.weights_RNK > 0]
        return (
            batch.tokens_RC1.shape[1] - 1 <= self.context
            and max(known.starts) <= self.longest
            and len(says) <= room.rows
            and len(np.unique(says)) <= room.teacher_rows
        )

    def _room(self, places: int, requests: int, path: int) -> Room:
        """For the rows of that many anchors, of which no more than ``anchors`` count."""
        anchors = min(self.anchors, places)
        rows = anchors * path
        along = anchors + requests * (path - 1)
        return Room(rows, min(rows, along) if self.along_text else rows)


def _filled(tensor: Tensor, *sizes: int, of: int = 0) -> Tensor:
    """With its first dimensions that long, what is new being that number."""
    shape = (*sizes, *tensor.shape[len(sizes) :])
    if tensor.shape == shape:
        return tensor
    out = tensor.new_full(shape, of)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out
