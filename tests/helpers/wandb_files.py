"""What Weights & Biases keeps of a run that is offline, read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768
HEADER = 7  # of the file, and of each piece of a record: checksum, length, kind
WHOLE, LAST = 1, 4


def _records(raw: bytes) -> Iterator[bytes]:
    """LevelDB's log format, of which W&B's file is one: records in pieces that cross no block."""
    at, record = HEADER, b""
    while at + HEADER < len(raw):
        if BLOCK - at % BLOCK < HEADER:  # too little is left of the block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        record += raw[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield record
            record = b""


def offline_runs(folder: Path, project: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By the runs' names and those of what was logged: steps and values. All runs are of that project."""
    from wandb.proto import wandb_internal_pb2 as messages

    runs: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        points: dict[str, list[tuple[int, float]]] = {}
        for raw in _records(path.read_bytes()):
            record = messages.Record.FromString(raw)
            if record.HasField("run"):
                assert record.run.run_group == folder.name
                assert record.run.project == project
                runs[record.run.display_name] = points
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    value = float(json.loads(item.value_json))
                    points.setdefault(name, []).append((record.history.step.num, value))
    return runs
