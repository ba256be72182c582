"""PARD in SGLang, watched."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from cosched.engines.sglang.worker.eagle3 import ChainWorker
from cosched.engines.sglang.worker.pard import PardWorker


class AdaptedPardWorker(ChainWorker, PardWorker):
    """Our PARD worker; its draft sees no features of the target, only what was said."""
