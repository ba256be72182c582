"""Recorded target trajectories: written by an engine, replayed in the place of the target.

Adaptation is lossless, so the text does not depend on the draft: whatever drafts, trains and
publishes can be judged on the same recorded text, without the target's forward passes.

Letters: B requests, S rows, P prompt rows, T tokens of a text, F fused feature width, H hidden
width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.engines.embedded.target import Target, TargetRows
from cosched.engines.embedded.verifiers import ForcedKind
from cosched.engines.request import GenerationRequest
from cosched.errors import NOT_DECODED, CheckpointError, WorkloadError

if TYPE_CHECKING:
    from collections.abc import Sequence

META = "trace.json"


class TraceRequest(msgspec.Struct, frozen=True):
    """One recorded text: its file, and how many of its tokens were the prompt."""

    id: str
    file: str
    num_prompt_tokens: int
    num_tokens: int
    tenant: str | None = None
    source: str | None = None


class TraceMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``trace.json``: written last, so that a folder that has it is whole."""

    target_checksum: str
    feature_layers: tuple[int, ...]
    kind: ForcedKind
    temperature: float
    top_p: float
    requests: tuple[TraceRequest, ...]
    format: Literal[1] = 1


class TraceWriter:
    """Collects rows while an engine decodes, and writes each request when it is done.

    A request that would take the folder above ``max_bytes`` is left out and counted.
    """

    def __init__(
        self,
        kind: ForcedKind,
        temperature: float,
        top_p: float,
        target_checksum: str,
        feature_layers: tuple[int, ...],
        dtype: torch.dtype,
        max_bytes: int,
    ) -> None:
        self.directory = Path()
        self.feature_layers = feature_layers
        self._meta = (target_checksum, feature_layers, kind, temperature, top_p)
        self._dtype = dtype
        self._left = max_bytes
        self._open: dict[str, list[tuple[Tensor | None, Tensor]]] = {}
        self._requests: list[TraceRequest] = []
        self.num_left_out = 0

    def open(self, directory: Path) -> None:
        """Make the folder that the files go to."""
        directory.mkdir(parents=True)
        self.directory = directory

    def record(
        self, request: GenerationRequest, rows: TargetRows, index: int, start: int, count: int
    ) -> None:
        """The engine's ``Recorder``: rows ``[index, :count]`` became text at ``start``."""
        del start  # rows arrive in order
        features = rows.features_BTF
        self._open.setdefault(request.id, []).append(
            (
                None if features is None else features[index, :count].to("cpu", self._dtype),
                rows.hidden_BTH[index, :count].to("cpu", self._dtype),
            )
        )

    def finish(self, request: GenerationRequest, generated: Sequence[int]) -> None:
        """Write a request's file."""
        parts = self._open.pop(request.id)
        tensors = {
            "tokens": torch.tensor([*request.prompt_P.tolist(), *generated], dtype=torch.int32),
            "hidden": torch.cat([hidden for _, hidden in parts]),
        }
        features = [part for part, _ in parts if part is not None]
        if features:
            tensors["features"] = torch.cat(features)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self._left:
            self.num_left_out += 1
            return
        self._left -= size
        name = f"{len(self._requests):05d}.safetensors"
        save_file(tensors, self.directory / name)
        self._requests.append(
            TraceRequest(
                request.id,
                name,
                len(request.prompt_P),
                len(tensors["tokens"]),
                request.tenant,
                request.source,
            )
        )

    def close(self) -> None:
        """Write ``trace.json`` over what was finished."""
        meta = TraceMeta(*self._meta, tuple(self._requests))
        (self.directory / META).write_bytes(msgspec.json.format(msgspec.json.encode(meta)))


def read_meta(directory: Path) -> TraceMeta:
    """Read ``trace.json``.

    Raises:
        WorkloadError: the folder is no finished trace.
    """
    path = directory / META
    try:
        return msgspec.json.decode(path.read_bytes(), type=TraceMeta)
    except OSError as error:
        raise WorkloadError(
            f"engine.trace: {directory} is no recorded trace (no {META}): record one with --record"
        ) from error
    except NOT_DECODED as error:
        raise WorkloadError(f"engine.trace: {path} is damaged: {error}") from error


class RecordedRows:
    """Answers with recorded rows instead of running the target."""

    def __init__(
        self, directory: Path, meta: TraceMeta, target: Target, feature_layers: tuple[int, ...]
    ) -> None:
        missing = [layer for layer in feature_layers if layer not in meta.feature_layers]
        if missing:
            raise WorkloadError(
                f"engine.trace: {directory} has features after layers {list(meta.feature_layers)}, "
                f"the drafter needs {list(feature_layers)}; record again with this drafter"
            )
        self._target = target
        self._directory = directory
        self._columns = [meta.feature_layers.index(layer) for layer in feature_layers]
        self._files = {request.id: request for request in meta.requests}
        self._slots: dict[int, dict[str, Tensor]] = {}

    def requests(self) -> list[GenerationRequest]:
        """The recorded texts as forced requests."""
        requests = []
        for one in self._files.values():
            tokens_T = self._load(one)["tokens"].to(self._target.device, torch.int64)
            prompt_P = tokens_T[: one.num_prompt_tokens]
            num_new = len(tokens_T) - len(prompt_P)
            requests.append(
                GenerationRequest(
                    one.id, prompt_P, num_new, tokens_T, one.tenant, source=one.source
                )
            )
        return requests

    def _load(self, request: TraceRequest) -> dict[str, Tensor]:
        try:
            return load_file(self._directory / request.file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"engine.trace: {self._directory / request.file} cannot be read: {error}"
            ) from error

    def prefill(self, slot: int, request: GenerationRequest) -> TargetRows:
        tensors = self._load(self._files[request.id])
        stored = {"hidden": tensors["hidden"].to(self._target.device, self._target.dtype)}
        if self._columns:
            width = self._target.hidden_size
            parts = [tensors["features"][:, c * width : (c + 1) * width] for c in self._columns]
            stored["features"] = torch.cat(parts, -1).to(self._target.device, self._target.dtype)
        self._slots[slot] = stored
        at_1P = torch.arange(len(request.prompt_P), device=self._target.device)[None]
        rows = self._rows([slot], at_1P)
        return TargetRows(
            self._target.head(rows.hidden_BTH[:, -1:]).float(), rows.hidden_BTH, rows.features_BTF
        )

    def verify(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        counts: Sequence[int] | None = None,
        sees_BSS: Tensor | None = None,
    ) -> TargetRows:
        # A row costs the head's product alone, and of a tree those count that are the text's.
        del counts, sees_BSS
        rows = self._rows(range(len(ids_BS)), positions_BS)
        return TargetRows(
            self._target.head(rows.hidden_BTH).float(), rows.hidden_BTH, rows.features_BTF
        )

    def _rows(self, slots: Sequence[int], positions_BS: Tensor) -> TargetRows:
        hidden, features = [], []
        for slot, at_S in zip(slots, positions_BS, strict=True):
            stored = self._slots[slot]
            inside_S = at_S.clamp_max(len(stored["hidden"]) - 1)  # rows past the end never count
            hidden.append(stored["hidden"][inside_S])
            if "features" in stored:
                features.append(stored["features"][inside_S])
        hidden_BSH = torch.stack(hidden)
        return TargetRows(
            hidden_BSH[..., :0], hidden_BSH, torch.stack(features) if features else None
        )

    def keep(self, slot: int, start: int, rows: Sequence[int]) -> None:
        """What was recorded is the text's already."""

    def move_slot(self, source: int, destination: int, length: int) -> None:
        del length
        self._slots[destination] = self._slots.pop(source)
