"""Which rows of a batch count, and which of them are alike, without asking the device.

Letters: R requests, N anchors, K drafted tokens, M rows that count, T teacher rows that differ, X teacher
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosched.loop.teacher_rows import distinct
from cosched.records import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cosched.records import SignalBatch, TeacherForm


@dataclass(frozen=True, slots=True)
class CountedRows:
    """The rows of a batch whose weight is not zero, counted through all ``R * N * K``.

    ``teacher_TX`` are the teacher's rows that differ, ``first_T`` the place of one of each, and
    ``says_M`` which of them each row has. The first ``count`` rows are those that count; where the
    batch has a ``room`` others of weight zero follow, and teacher rows that nobody has.
    """

    places_M: Tensor
    teacher_TX: Tensor
    first_T: Tensor
    says_M: Tensor
    count: int


def counted_rows(batch: SignalBatch, form: TeacherForm) -> CountedRows:
    """Where the host knows the batch's layout nobody waits; else for the device, twice.

    Rows of requests that sample at different temperatures are never taken for one. Teacher rows that
    are kept as logits are not held against one another: nothing is computed of them that it would spare.
    """
    teacher_MX, known = batch.teacher_RNKX.flatten(0, 2), batch.known
    if known is None:
        places_M = batch.weights_RNK.flatten().nonzero().squeeze(-1)  # host waits for the device
        rows_MX = teacher_MX.index_select(0, places_M)
        if len(set(batch.temperatures or ())) > 1:
            return _each_its_own(places_M, rows_MX, len(places_M))
        rows_TX, says_M = distinct(rows_MX, form)
        first_T = places_M.new_empty(len(rows_TX)).scatter_(0, says_M, places_M)
        return CountedRows(places_M, rows_TX, first_T, says_M, len(places_M))
    device = batch.weights_RNK.device
    weights, room = known.weights_RNK.ravel(), known.room
    (places,) = weights.nonzero()
    count = len(places)
    more = 0 if room is None else room.rows - count
    whole = np.concatenate((places, (weights == 0).nonzero()[0][:more]))
    places_M = upload(whole, device)
    if form != "hidden":
        return _each_its_own(places_M, teacher_MX.index_select(0, places_M), count)
    of_each = known.says_RNK.ravel()[places]
    _, first, says = np.unique(of_each, return_index=True, return_inverse=True)
    more_teachers = 0 if room is None else room.teacher_rows - len(first)
    first_T = upload(np.pad(places[first], (0, more_teachers)), device)
    rows_TX = teacher_MX.index_select(0, first_T)
    says_M = upload(np.pad(says, (0, more)), device)
    return CountedRows(places_M, rows_TX, first_T, says_M, count)


def first_places(batch: SignalBatch, places: int) -> SignalBatch:
    """The batch with the first rows of each anchor: those behind them weigh nothing."""
    if places >= batch.weights_RNK.shape[-1]:
        return batch
    weights_RNK, known = batch.weights_RNK.clone(), batch.known
    weights_RNK[..., places:] = 0
    cut = replace(batch, weights_RNK=weights_RNK)
    if known is None:
        return cut
    on_host = known.weights_RNK.copy()
    on_host[..., places:] = 0
    of = cut.starts_R, cut.weights_RNK, cut.teacher_RNKX
    layout = Layout(known.starts, on_host, known.says_RNK, of, known.room)
    return replace(cut, layout=layout)


def _each_its_own(places_M: Tensor, rows_MX: Tensor, count: int) -> CountedRows:
    own_M = torch.arange(len(places_M), device=places_M.device)
    return CountedRows(places_M, rows_MX, places_M, own_M, count)


def upload(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """The numbers on a device, behind all that it has to do; out of pinned memory nobody waits."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory(device).to(device, non_blocking=True)
