"""SGLang's door: it calls ``install`` in every process that finds cosched installed.

Inert unless ``COSCHED_CONFIG`` names a configuration. Then the algorithms ``COSCHED_EAGLE3``,
``COSCHED_DFLASH`` and ``COSCHED_PARD`` exist, and their workers learn as that file says. SGLang
only logs a plugin that raises, so nothing is read here: a configuration that cannot be used stops
the worker, and with it the server, when it starts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosched.engines.sglang.adaptation import Adaptation
    from cosched.engines.sglang.worker import WorkerParts

CONFIG = "COSCHED_CONFIG"  # a YAML file
EVENTS = "COSCHED_EVENTS"  # a file that rank 0 appends every event to, rounds included


def install() -> None:
    """Register our algorithms with SGLang, if a configuration asks for them."""
    if not os.environ.get(CONFIG):
        return
    from cosched.engines.sglang.algorithms import register
    from cosched.engines.sglang.idle import watch_idle

    register(_build)
    watch_idle()


def _build(parts: WorkerParts) -> Adaptation:
    from pathlib import Path

    from cosched.build import build_adaptation
    from cosched.config import load_config
    from cosched.engines.sglang.adaptation import Nobody
    from cosched.telemetry.run_folder import EventLog, NoEvents

    config = load_config(Path(os.environ[CONFIG]))
    events = os.environ.get(EVENTS)
    sink = NoEvents()
    if events and parts.ranks.rank == 0:
        log = EventLog()
        log.open(Path(events), buffered=False)
        sink = log.for_arm("served")
    return build_adaptation(config, parts, Nobody(), sink, with_rounds=bool(events))
