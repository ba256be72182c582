"""Idle ticks: SGLang's scheduler calls ``on_idle`` when it has nothing to run."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from cosched.engines.sglang import compat


def watch_idle() -> None:
    """Let the worker of a scheduler know when it idles."""
    compat.HookRegistry.register(compat.SCHEDULER_IDLE, _tick, compat.HookType.AFTER)


def _tick(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    adaptation = getattr(scheduler.draft_worker, "adaptation", None)
    if adaptation is not None and scheduler.is_fully_idle():
        adaptation.idle()
