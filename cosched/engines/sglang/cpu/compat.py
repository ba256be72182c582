"""Every SGLang name that the CPU support uses or hooks into; resolved when first used.

What is said of versions in the backend's table (``cosched/engines/sglang/compat.py``) holds here.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from cosched.engines.sglang.compat import resolve

BACKEND = "torch_native"

_PATHS: dict[str, str] = {
    "ATTENTION_BACKENDS": "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "KVWriteLoc": "sglang.srt.mem_cache.memory_pool:KVWriteLoc",
    "TorchNativeAttnBackend": "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend",
    "add_draft_attention_backend_choices": "sglang.srt.arg_groups.choices:add_draft_attention_backend_choices",
    "dflash_utils": "sglang.srt.speculative.dflash_utils",
    "eagle_utils": "sglang.srt.speculative.eagle_utils",
    "sgl_kernel": "sgl_kernel",
    "speculative_hook": "sglang.srt.arg_groups.speculative_hook",
}

# Where versions look for the functions that verify sampled text; each in some of these modules alone.
SAMPLING_MODULES = ("sgl_kernel", "eagle_utils", "dflash_utils")

# Targets of hooks
EAGLE_SAMPLE = "sglang.srt.speculative.eagle_utils.eagle_sample"
CREATE_DRAFT_BACKEND = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
DFLASH_ARGUMENTS = "sglang.srt.arg_groups.speculative_hook._handle_dflash"
DFLASH_ATTENTION = "sglang.srt.models.dflash.DFlashAttention.__init__"
MODEL_ARGUMENTS = "sglang.srt.model_executor.model_runner.ModelRunner._extend_forward_kwargs"


def __getattr__(name: str) -> Any:
    if name not in _PATHS:
        raise AttributeError(name)
    value = resolve(_PATHS[name])
    globals()[name] = value
    return value
