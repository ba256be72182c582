"""The SGLang plugin ``cosched_cpu``: what stock SGLang lacks to speculate on a CPU.

SGLang finds it by its entry point and calls ``register`` in every process. A plugin that raises is
only logged there, so what depends on it must look whether it took hold: without it, a server with
``torch_native`` attention and EAGLE3 or DFLASH does not start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.engines.sglang.cpu.environment import requested
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


def register() -> None:
    """Teach ``torch_native`` to speculate and to verify sampled text, and let DFLASH start on a CPU.

    Does nothing, and imports nothing, unless ``SGLANG_USE_CPU_ENGINE=1``; nothing either where
    there is a CUDA device.
    """
    if not requested():
        return
    import torch

    if torch.cuda.is_available():
        return
    from cosched.engines.sglang.cpu import compat
    from cosched.engines.sglang.cpu.attention import NativeBackend

    compat.ATTENTION_BACKENDS[compat.BACKEND] = NativeBackend
    around = compat.HookType.AROUND
    compat.HookRegistry.register(compat.CREATE_DRAFT_BACKEND, _create_draft_backend, around)
    _bring_sampling()
    compat.HookRegistry.register(compat.EAGLE_SAMPLE, _sample, around)
    compat.add_draft_attention_backend_choices([compat.BACKEND])
    compat.HookRegistry.register(compat.DFLASH_ARGUMENTS, _accept_cpu, around)
    compat.HookRegistry.register(compat.DFLASH_ATTENTION, _without_triton, around)
    after = compat.HookType.AFTER
    compat.HookRegistry.register(compat.MODEL_ARGUMENTS, _embeddings_as_they_came, after)
    # DFLASH's worker notes which stream uses a tensor. A CPU has no streams, and torch refuses
    # its stand-in for one (torch.cpu.Stream); there is nothing to note.
    torch.Tensor.record_stream = _nothing_to_record


def _create_draft_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Add ``torch_native`` to the backends that a draft may have."""
    from cosched.engines.sglang.cpu import compat
    from cosched.engines.sglang.cpu.attention import DraftStepsBackend, NativeBackend

    def create() -> tuple[str, Any]:
        runner = factory.draft_model_runner
        if backend_name == "decode_attention_backend":
            steps = factory.speculative_num_steps
            return compat.BACKEND, DraftStepsBackend(runner, factory.topk, steps)
        return compat.BACKEND, NativeBackend(runner)

    backends = {**backend_map, compat.BACKEND: create}
    return original(factory, backend_name, backends, *args, **kwargs)


def _bring_sampling() -> None:
    """Put what verifies sampled text where SGLang looks for it, and tell DFLASH that it is there."""
    from cosched.engines.sglang.cpu import compat, sampling

    for module in (getattr(compat, name) for name in compat.SAMPLING_MODULES):
        for function in (
            sampling.tree_speculative_sampling_target_only,
            sampling.top_k_renorm_prob,
            sampling.top_p_renorm_prob,
        ):
            setattr(module, function.__name__, function)
    compat.dflash_utils._DFLASH_SAMPLING_VERIFY_AVAILABLE = True


def _sample(
    original: Callable[..., Any], verify_input: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Verify a batch in which somebody samples as a GPU does; SGLang takes the best tokens on a CPU.

    It asks the module for the device at this one place where nobody is greedy.
    """
    from cosched.engines.sglang import compat as engine
    from cosched.engines.sglang.cpu import compat

    if batch.forward_mode.is_idle() or batch.sampling_info.is_all_greedy:
        return original(verify_input, batch, *args, **kwargs)
    if engine.get_spec().speculative_use_rejection_sampling:
        raise ConfigError("--speculative-use-rejection-sampling: not on a CPU; leave it out")
    compat.eagle_utils._is_cpu = False
    try:
        return original(verify_input, batch, *args, **kwargs)
    finally:
        compat.eagle_utils._is_cpu = True


def _accept_cpu(original: Callable[..., Any], server_args: Any) -> None:
    """Check DFLASH's arguments as for an XPU, whose worker takes the same PyTorch paths.

    Only the check asks for the device: the arguments themselves keep ``cpu``.
    """
    from cosched.engines.sglang.cpu import compat

    class AsXpu:
        def __init__(self, view: Any) -> None:
            self._view = view

        def __getattr__(self, name: str) -> Any:
            return "xpu" if name == "device" else getattr(self._view, name)

    hook = compat.speculative_hook
    view_of = hook.resolving_view
    hook.resolving_view = lambda args: AsXpu(view_of(args))
    try:
        original(server_args)
    finally:
        hook.resolving_view = view_of
    hook._disable_overlap_schedule_for_cpu(server_args)


def _without_triton(
    original: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any
) -> None:
    """Turn off a Triton shortcut of DFLASH's attention; its PyTorch code stands beside it."""
    original(attention, *args, **kwargs)
    attention.use_table_qk_norm_rope = False


def _embeddings_as_they_came(
    arguments: dict[str, Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> None:
    """Undo a cast to bfloat16 of the embeddings that DFLASH gives its draft.

    They came in the model's own type; with another one every type but bfloat16 fails.
    """
    del runner, args, kwargs
    if forward_batch.input_embeds is not None and forward_batch.replace_embeds is None:
        arguments["input_embeds"] = forward_batch.input_embeds


def _nothing_to_record(self: Any, s: Any) -> None:
    pass
