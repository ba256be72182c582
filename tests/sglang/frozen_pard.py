"""An SGLang plugin for tests: COSCHED_PARD with a draft that does not learn."""

from __future__ import annotations

from typing import Any


def register() -> None:
    from cosched.engines.sglang import compat
    from cosched.engines.sglang.worker import pard_algorithm

    def worker(_server_args: Any) -> type:
        from cosched.engines.sglang.worker.pard import PardWorker

        return PardWorker

    compat.SpeculativeAlgorithm.register(
        pard_algorithm.NAME, supports_overlap=True, spec_class=pard_algorithm.algorithm()
    )(worker)
