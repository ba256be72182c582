"""Whether an engine can run a target, from the files of its folder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FLOATS = ("F64", "F32", "BF16", "F16")
ATTENTION = frozenset({"full_attention", "sliding_attention", "attention"})


def check_embedded(directory: Path, raw: Mapping[str, Any]) -> None:
    """Refuse what the embedded engine cannot run, of a target's ``config.json``.

    Whether what is left runs exactly is proven when it is loaded (``cosched.engines.embedded.proof``).

    Raises:
        CheckpointError: it is quantised, of several parts, or of layers that are no plain attention.
    """
    serve = "serve it with SGLang (engine.kind: sglang)"
    if raw.get("quantization_config") is not None:
        method = dict(raw["quantization_config"]).get("quant_method", "of some kind")
        raise CheckpointError(
            f"target.path: {directory} is quantised ({method}), and the embedded engine runs weights "
            f"in a floating-point type; {serve}"
        )
    if "text_config" in raw:
        raise CheckpointError(
            f"target.path: {directory} is a model of several parts ({raw.get('model_type')}), and the "
            f"embedded engine runs language models alone; {serve}"
        )
    kinds = layer_kinds(_whole_config(directory))
    if other := sorted(kinds - ATTENTION):
        raise CheckpointError(
            f"target.path: {directory} ({raw.get('model_type')}) has layers of type "
            f"{', '.join(other)}, and the embedded engine runs full_attention; {serve}"
        )
    if len(kinds) > 1:
        raise CheckpointError(
            f"target.path: {directory} ({raw.get('model_type')}) has {' and '.join(sorted(kinds))} "
            f"layers, and the embedded engine masks all layers alike; {serve}"
        )


def layer_kinds(config: Any) -> frozenset[str]:
    """Kinds of layers that a model of transformers says it has; none where it says nothing of them."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return frozenset(map(str, kinds or ()))


def window_of(config: Any) -> int | None:
    """How many positions each row of a model sees, itself included, the same in every layer.

    Models that say nothing of their layers' types and have a ``sliding_window`` have it in all.
    """
    kinds, window = layer_kinds(config), getattr(config, "sliding_window", None)
    return window if not kinds or kinds == frozenset({"sliding_attention"}) else None


def check_head(directory: Path, types: Mapping[str, str]) -> None:
    """Refuse a target whose head SGLang would keep quantised: its logits are what teaches.

    ``types`` are those of the folder's tensors, by name, as safetensors calls them.

    Raises:
        CheckpointError: its head is not in a floating-point type.
    """
    for name, dtype in types.items():
        of_head = name.rpartition(".")[0].endswith("lm_head")
        whole = name.endswith((".weight", ".bias"))
        if of_head and (dtype not in FLOATS or not whole):
            raise CheckpointError(
                f"target.path: the head of {directory} is quantised ({name}, {dtype}); cosched needs "
                f"it in a floating-point type, to say what the target said. Quantise the target with "
                f"its lm_head left out, as most are"
            )


def _whole_config(directory: Path) -> Any:
    """A model's configuration with what transformers derives for the keys that it leaves out."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of mistake has one of its own
        raise CheckpointError(
            f"target.path: transformers, which the embedded engine runs, cannot read "
            f"{directory / 'config.json'}: {error}"
        ) from error
