"""Rows of requests that have ended, as tensors by name: what a run that is resumed learns from as well.

Letters: C rows that are kept, B served blocks, S drafted tokens of all of them, F fused feature width,
X teacher width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosched.errors import RunFolderError
from cosched.loop.copies import Copies
from cosched.loop.request_rows import RequestRows
from cosched.records import Segment, ServedBlock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

NOBODY = -1  # where a request has no teacher


def tensors_of(request_id: str, rows: RequestRows) -> dict[str, Tensor]:
    """Copies of all that is kept of one request."""
    kept = slice(rows.begin, rows.begin + rows.count)
    teacher_from = NOBODY if rows.teacher_from is None else rows.teacher_from
    numbers = (
        rows.start, rows.fresh_from, teacher_from, rows.trained_to, rows.given_to, rows.finished,
    )  # fmt: skip
    tensors = {
        "id": torch.tensor(list(request_id.encode()), dtype=torch.uint8),
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "temperature": torch.tensor(rows.temperature, dtype=torch.float64),
        "tokens": rows.tokens[rows.begin : rows.begin + rows.count + 1].clone(),
    }
    for name, storage in (("features", rows.features), ("teacher", rows.teacher)):
        if storage is not None:
            tensors[name] = storage[kept].clone()
    if rows.blocks:
        blocks = [
            (one.anchor, one.num_accepted, one.num_committed, len(one.path_K))
            for one in rows.blocks
        ]
        tensors["blocks"] = torch.tensor(blocks, dtype=torch.int64)
        tensors["paths"] = torch.cat([one.path_K for one in rows.blocks])
        judged = [one.teacher_KX for one in rows.blocks if one.teacher_KX is not None]
        tensors["judged"] = torch.cat(judged)
    return tensors


def rows_of(
    tensors: Mapping[str, Tensor], window: int, draft_window: int | None
) -> tuple[str, RequestRows]:
    """A request's id and its rows again, on the device of the tensors.

    Raises:
        RunFolderError: these are no request's.
    """
    try:
        request_id = bytes(tensors["id"].tolist()).decode()
        start, fresh, teacher, trained, given, finished = map(int, tensors["numbers"].tolist())
        segment = Segment(
            request_id=request_id,
            start=start,
            tokens_R1=tensors["tokens"],
            features_RF=tensors.get("features"),
            teacher_RX=tensors.get("teacher"),
            temperature=float(tensors["temperature"]),
        )
        rows, copies = RequestRows(window, segment, draft_window), Copies()
        if len(segment.tokens_R1) - 1 > window:
            raise ValueError(f"{len(segment.tokens_R1) - 1} rows, and {window} are kept")
        rows.append(segment, copies)
        copies.make()
        rows.blocks.extend(_blocks_of(request_id, tensors))
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise RunFolderError(f"the saved state has no rows of a request: {error}") from error
    rows.teacher_from = None if teacher == NOBODY else teacher
    rows.fresh_from, rows.trained_to, rows.given_to = fresh, trained, given
    rows.finished = bool(finished)
    return request_id, rows


def _blocks_of(request_id: str, tensors: Mapping[str, Tensor]) -> list[ServedBlock]:
    if "blocks" not in tensors:
        return []
    numbers = tensors["blocks"].tolist()
    lengths = [length for *_, length in numbers]
    paths = tensors["paths"].split(lengths)
    judged = tensors["judged"].split(lengths)
    return [
        ServedBlock(request_id, anchor, path.clone(), teacher.clone(), accepted, committed)
        for (anchor, accepted, committed, _), path, teacher in zip(
            numbers, paths, judged, strict=True
        )
    ]
