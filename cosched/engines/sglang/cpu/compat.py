"""All that the CPU support takes from SGLang 0.5.20 and hooks into; importing it imports SGLang."""

# pyright: reportMissingImports=false

from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

BACKEND = "torch_native"

# Targets of hooks
CREATE_DRAFT_BACKEND = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
DFLASH_ARGUMENTS = "sglang.srt.arg_groups.speculative_hook._handle_dflash"
DFLASH_ATTENTION = "sglang.srt.models.dflash.DFlashAttention.__init__"
MODEL_ARGUMENTS = "sglang.srt.model_executor.model_runner.ModelRunner._extend_forward_kwargs"

__all__ = [
    "ATTENTION_BACKENDS",
    "BACKEND",
    "CREATE_DRAFT_BACKEND",
    "DFLASH_ARGUMENTS",
    "DFLASH_ATTENTION",
    "MODEL_ARGUMENTS",
    "HookRegistry",
    "HookType",
    "KVWriteLoc",
    "TorchNativeAttnBackend",
    "add_draft_attention_backend_choices",
    "speculative_hook",
]
