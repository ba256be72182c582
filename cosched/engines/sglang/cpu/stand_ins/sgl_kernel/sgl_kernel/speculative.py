"""What NGRAM imports."""

from cosched.engines.sglang.cpu.kernels import reconstruct_indices_from_tree_mask

__all__ = ["reconstruct_indices_from_tree_mask"]
