"""``python -m cosched.engines.sglang.launcher.probe``: whether SGLang takes our plugin up, as JSON.

``cosched doctor`` runs it in a process of its own: SGLang loads plugins once a process, and only
logs one that fails.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata

from cosched.engines.sglang import compat
from cosched.engines.sglang.worker.algorithms import algorithms, has_worker

GROUP = "sglang.srt.plugins"


def probe() -> dict[str, list[str]]:
    """Names of what works: entry points of ours, algorithms, hooks; and workers that are missing."""
    named = algorithms()
    points = [point.name for point in metadata.entry_points(group=GROUP)]
    compat.load_plugins()
    patched: set[str] = compat.HookRegistry._patched
    hooks = (
        compat.SCHEDULER_NEXT,
        compat.SCHEDULER_IDLE,
        compat.SCHEDULER_END,
        compat.INTERNAL_STATE,
    )
    return {
        "entry_points": [name for name in points if name.startswith("cosched")],
        "algorithms": [name for name in named if _is_registered(name)],
        "without_worker": [name for name, worker in named.items() if not has_worker(worker)],
        "hooks_missing": [target for target in hooks if target not in patched],
    }


def _is_registered(name: str) -> bool:
    try:
        compat.SpeculativeAlgorithm.from_string(name)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
