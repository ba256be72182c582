"""What SGLang's scheduler tells its worker: who waits, who is gone, that it idles or ends."""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat

if TYPE_CHECKING:
    from cosched.engines.sglang.worker.adaptation import Adaptation


def watch_scheduler() -> None:
    """Let the worker of a scheduler know of its requests, when it idles, and when it ends."""
    compat.HookRegistry.register(compat.SCHEDULER_NEXT, _chose, compat.HookType.AFTER)
    compat.HookRegistry.register(compat.SCHEDULER_IDLE, _idled, compat.HookType.AFTER)
    compat.HookRegistry.register(compat.SCHEDULER_COUNTS, _counts, compat.HookType.BEFORE)
    compat.HookRegistry.register(compat.SCHEDULER_END, _ends, compat.HookType.AFTER)


def _adaptation(scheduler: Any) -> Adaptation | None:
    return getattr(scheduler.draft_worker, "adaptation", None)


def _chose(plan: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """The next batch has been put together; who still waits found no place in it."""
    if (adaptation := _adaptation(scheduler)) is not None:
        gone = functools.partial(compat.gone, plan=plan, scheduler=scheduler)
        adaptation.chose(len(scheduler.waiting_queue), gone)


def _idled(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    adaptation = _adaptation(scheduler)
    if adaptation is not None and scheduler.is_fully_idle():
        adaptation.idle()


def _ends(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """SGLang has answered everybody, and kills its processes some seconds later."""
    if (adaptation := _adaptation(scheduler)) is not None:
        adaptation.ending()


def _counts(processor: Any, _result: Any, batch: Any) -> None:
    """The worker is told next how many drafts of this batch were accepted, but not of which."""
    adaptation = getattr(processor.model_worker, "adaptation", None)
    if adaptation is not None:
        adaptation.counts_follow(batch.forward_iter)
