"""An SGLang plugin for tests: COSCHED_PARD with a draft that does not learn.

Where ``COSCHED_TEST_GRAPHS`` names a file, its pass goes through the runner of CUDA graphs.
"""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    from cosched.engines.sglang import compat
    from cosched.engines.sglang.worker import pard_algorithm

    def worker(_server_args: Any) -> type:
        from cosched.engines.sglang.worker.pard import PardWorker

        return PardWorker

    if os.environ.get("COSCHED_TEST_GRAPHS"):
        from tests.sglang import graphs

        graphs.install()
    compat.SpeculativeAlgorithm.register(
        pard_algorithm.NAME, supports_overlap=True, spec_class=pard_algorithm.algorithm()
    )(worker)
