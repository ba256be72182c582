"""The draft that serves, inside SGLang's model: views of its fused and sharded parameters.

SGLang stacks q, k and v, and gate and up, into one parameter each, and gives every tensor-parallel
rank a part. All these parts are slices, so each tensor of a checkpoint has a view that can be
written and read in place; no update call of SGLang's is involved.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import compat
from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
RENAMED = {"midlayer.": "layers.0."}  # EAGLE-3 files have one name for the layer, SGLang the other


@dataclass(frozen=True, slots=True)
class _Slice:
    """Places ``start .. start + length`` of a dimension; None for all of it."""

    dim: int = 0
    start: int = 0
    length: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.length is None else tensor.narrow(self.dim, self.start, self.length)


class ServedDraft:
    """The tensors of a drafter's network as SGLang's draft model holds them on this rank."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self._shares: dict[str, _Slice] = {}
        tensors: dict[str, Tensor] = {}
        for name in names:
            path, _, kind = name.rpartition(".")
            module, part = _find(modules, path)
            parameter = getattr(module, kind, None) if module is not None else None
            if module is None or parameter is None:
                raise CheckpointError(
                    f"SGLang's {type(model).__name__} has no {name}; this draft cannot adapt there"
                )
            inside, self._shares[name] = _slices(module, part, kind)
            tensors[name] = inside.of(parameter.data)
        self.tensors: Mapping[str, Tensor] = tensors

    def share(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        return self._shares[name].of(whole)


def _find(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module | None, Any]:
    """SGLang's module for a module path of the checkpoint, and which part of it where fused."""
    for ours, theirs in RENAMED.items():
        if path.startswith(ours):
            path = theirs + path.removeprefix(ours)
    parent, _, leaf = path.rpartition(".")
    fused, part = FUSED.get(leaf, (leaf, None))
    candidates = [(f"{parent}.{fused}".lstrip("."), part), (path, None)]
    for prefix in ("", "model."):
        for candidate, its_part in candidates:
            if prefix + candidate in modules:
                return modules[prefix + candidate], its_part
    return None, None


def _slices(module: Any, part: Any, kind: str) -> tuple[_Slice, _Slice]:
    """Where a tensor lies in its parameter, and which part of the whole tensor that is."""
    group = compat.get_tp_group()
    rank = group.rank_in_group
    if isinstance(module, compat.QKVParallelLinear):
        queries, keys = module.q_proj_shard_size, module.kv_proj_shard_size
        length = queries if part == "q" else keys
        start = {"q": 0, "k": queries, "v": queries + keys}[part]
        if part != "q":
            rank //= module.num_kv_head_replicas
        return _Slice(0, start, length), _Slice(0, rank * length, length)
    if isinstance(module, compat.MergedColumnParallelLinear):
        sizes = [size // group.world_size for size in module.output_sizes]
        length = sizes[part]
        return _Slice(0, sum(sizes[:part]), length), _Slice(0, rank * length, length)
    if isinstance(module, compat.RowParallelLinear):
        if kind == "bias":
            return _Slice(), _Slice()
        length = module.input_size_per_partition
        return _Slice(), _Slice(1, rank * length, length)
    if isinstance(module, compat.VocabParallelEmbedding):
        shard = module.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        return _Slice(0, 0, end - start), _Slice(0, start, end - start)
    return _Slice(), _Slice()
