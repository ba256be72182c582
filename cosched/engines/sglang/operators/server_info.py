"""``/server_info``: each scheduler's internal state has an entry ``cosched``."""

from __future__ import annotations

from typing import Any

import msgspec

from cosched.engines.sglang import compat


def show_in_server_info() -> None:
    """Let SGLang's readback of its schedulers tell how the adaptation stands."""
    compat.HookRegistry.register(compat.INTERNAL_STATE, _add, compat.HookType.AFTER)


def _add(result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    adaptation = getattr(scheduler.draft_worker, "adaptation", None)
    if adaptation is not None:
        result.internal_state["cosched"] = msgspec.to_builtins(adaptation.status())
