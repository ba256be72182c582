"""TensorBoard: a folder of event files for each arm, so that arms lie on top of one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FLUSH_S = 10  # until what is written is in the file, at most


class TensorBoard:
    """Writes ``tensorboard/ARM`` in ``folder``, behind step ``done``: what was there of later ones is void."""

    def __init__(self, folder: Path, arm: str, done: int) -> None:
        # Imported here: it needs a package that nothing else does.
        from torch.utils.tensorboard import SummaryWriter

        path, void = folder / "tensorboard" / arm, done + 1 if done else None
        self._writer = SummaryWriter(str(path), purge_step=void, flush_secs=FLUSH_S)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
