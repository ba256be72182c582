"""Weights & Biases: a run of its own for each arm, in one group; its own variables say where to."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROJECT = "cosched"  # unless WANDB_PROJECT names one


class WandB:
    """Logs into a run called ``RUN ARM``; its files are in ``wandb/`` in ``folder``.

    Only the scalars go there: no console, no code, nothing of the machine.
    """

    def __init__(self, folder: Path, run: str, arm: str) -> None:
        # By its name, and here: it is a package that nothing else needs.
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run,
            name=f"{run} {arm}",
            dir=str(folder),
            reinit="create_new",  # arms take turns in one process
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                silent=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()
