"""A worker process: experiments come in on standard input, what becomes of them goes out.

One JSON object a line, both ways. In: ``{"yaml": …, "record": …}``. Out: ``{"total": tokens}`` when
it begins, ``{"tokens": n}`` as they are decoded, and at last ``{"done": true}`` or ``{"error": …}``.
The models are imported once for many experiments; each builds its own world.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import DictConfig, OmegaConf

from cosched.errors import CoschedError
from cosched.runs.experiment import Experiment
from cosched.settings.load import typed
from cosched.telemetry.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable

REPORT_SECONDS = 0.3


def run_one(task: dict[str, Any], tell: Callable[..., None]) -> None:
    """Run one experiment, into its folder, whatever was left there."""
    merged = OmegaConf.create(task["yaml"])
    assert isinstance(merged, DictConfig)
    config = typed(merged, "experiment")
    experiment = Experiment(config, task["record"])
    folder = RunFolder(config.run_folder)
    folder.create(overwrite=True)
    tell(total=experiment.total_tokens)
    waiting, told = 0, time.monotonic()

    def on_tokens(_arm: str, number: int) -> None:
        nonlocal waiting, told
        waiting += number
        if time.monotonic() - told >= REPORT_SECONDS:
            tell(tokens=waiting)
            waiting, told = 0, time.monotonic()

    experiment.run(folder, on_tokens)
    tell(tokens=waiting)


def main() -> None:
    """Until standard input ends."""
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries print what they like; the answers are ours alone

    def tell(**what: Any) -> None:
        channel.write(msgspec.json.encode(what) + b"\n")

    for line in sys.stdin.buffer:
        try:
            run_one(msgspec.json.decode(line), tell)
        except CoschedError as error:
            tell(error=str(error))
        except Exception as error:  # noqa: BLE001  one cell must not end the others
            traceback.print_exc()  # into the worker's log
            tell(error=f"{type(error).__name__}: {error}")
        else:
            tell(done=True)


if __name__ == "__main__":
    main()
