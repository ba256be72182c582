"""Look up in the SGLang that is found first all that we use of it; run as a module.

The last line of the output is JSON: the version, per table what could not be resolved, which targets
of hooks are missing, what our workers override and which of their methods refuse an argument that
SGLang's take, and what they read and SGLang's never mention.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
from types import ModuleType, SimpleNamespace
from typing import Any

# What workers read of themselves. SGLang's own code must know it, or it was renamed.
READ = {
    "COSCHED_EAGLE3": ("draft_worker", "adaptive_controller"),
    "COSCHED_DFLASH": (
        "draft_model", "draft_model_runner", "_draft_block_tokens_buf", "_fused_kv_helper",
        "_init_fused_kv_helper",
    ),
    "COSCHED_PARD": ("draft_worker", "_draft_worker", "_target_worker"),
}  # fmt: skip
READ_BY_ALL = ("gpu_id", "device", "target_worker", "speculative_num_draft_tokens")
READ_BY_PARD_DRAFT = (
    "draft_runner", "req_to_token_pool", "target_worker", "speculative_num_steps", "device",
    "tree_mask_mode", "_topk1_parents_prealloc", "_topk1_score_indices_prealloc",
)  # fmt: skip


def unresolved(table: ModuleType) -> list[str]:
    missing = []
    for name in table._PATHS:
        try:
            getattr(table, name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    return missing


def missing_targets(table: ModuleType) -> list[str]:
    """Hooks are placed by a dotted path; SGLang only logs one that leads nowhere."""
    targets = [value for value in vars(table).values() if str(value).startswith("sglang.")]
    missing = []
    for target in targets:
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError):
            missing.append(target)
    return missing


def refused(ours: Any, theirs: Any) -> list[str]:
    """Arguments that a method of SGLang's takes, and ours in its place does not."""
    known = inspect.signature(ours).parameters.values()
    any_name = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known)
    names = {each.name for each in known}
    return [
        name for name in inspect.signature(theirs).parameters if name not in names and not any_name
    ]


def looked_at(worker: type, read: tuple[str, ...]) -> dict[str, Any]:
    ours = [each for each in worker.__mro__ if each.__module__.startswith("cosched.")]
    theirs = [each for each in worker.__mro__ if each.__module__.startswith("sglang.")]
    overridden: dict[str, list[str]] = {}
    for each in ours:
        for method, function in vars(each).items():
            stock = next((vars(base)[method] for base in theirs if method in vars(base)), None)
            if inspect.isfunction(function) and inspect.isfunction(stock):
                overridden.setdefault(method, []).extend(refused(function, stock))
    sources = "".join(inspect.getsource(each) for each in theirs)
    unknown = [one for one in read if not re.search(rf"(self\.|def ){one}\b", sources)]
    return {
        "refused": {method: names for method, names in overridden.items() if names},
        "overridden": sorted(overridden),
        "unknown": unknown,
    }


def main() -> None:
    import sglang

    from cosched.engines.sglang import compat
    from cosched.engines.sglang.cpu import compat as cpu
    from cosched.engines.sglang.worker import algorithms

    answer: dict[str, Any] = {
        "version": sglang.__version__,
        "unresolved": {"backend": unresolved(compat), "cpu": unresolved(cpu)},
        "targets": missing_targets(compat) + missing_targets(cpu),
        "workers": {},
    }
    algorithms.register(lambda _parts: NotImplemented)
    for name in algorithms.algorithms():
        algorithm = compat.SpeculativeAlgorithm.from_string(name)
        worker = algorithm.create_worker(SimpleNamespace(disable_overlap_schedule=False))
        answer["workers"][name] = looked_at(worker, READ[name] + READ_BY_ALL)
    from cosched.engines.sglang.worker.pard import PardDraftWorker

    answer["workers"]["draft of PARD"] = looked_at(PardDraftWorker, READ_BY_PARD_DRAFT)
    print()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
