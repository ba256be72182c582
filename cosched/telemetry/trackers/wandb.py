"""Weights & Biases: a run for each arm, in the group of the folder, so that arms lie on top of one another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROJECT = "cosched"  # unless WANDB_PROJECT names another


class WeightsAndBiases:
    """Logs a run named ``arm``; files lie in ``folder``/wandb, whether it is online or not.

    W&B's own variables say where to (``WANDB_PROJECT``, ``WANDB_API_KEY``, ``WANDB_MODE=offline``). A run
    that is gone on with is a new one there, which begins where the saved state was.
    """

    def __init__(self, folder: Path, arm: str) -> None:
        # Imported here: it needs a package that nothing else does.
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder),
            group=folder.name,
            name=arm,
            reinit="create_new",  # arms run at once, each in a run of its own
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
