"""Texts of requests that are done, for those that come: the newest tokens, so many at most.

Letters: T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cosched.errors import CheckpointError
from drafters.lookup import END

if TYPE_CHECKING:
    from pathlib import Path

    from drafters.lookup import Tokens

FILE = "store.safetensors"


class Store:
    """One text behind the other, the newest last, each ended by ``END``."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.tokens_T: Tokens = np.empty(0, np.int32)

    def add(self, text_T: Tokens) -> None:
        """Keep a text; as many of the oldest tokens go as there are too many."""
        if self.num_tokens and len(text_T):
            whole_T = np.concatenate((self.tokens_T, text_T, np.array([END], np.int32)))
            self.tokens_T = whole_T[-self.num_tokens :]

    def save(self, directory: Path) -> None:
        """Write ``store.safetensors``."""
        save_file({"tokens": torch.from_numpy(self.tokens_T.copy())}, directory / FILE)

    def read(self, directory: Path, vocab_size: int) -> None:
        """Begin with what was saved, or the newest part of it that fits.

        Raises:
            CheckpointError: there is none, there is no room for it, or its tokens are not the target's.
        """
        path = directory / FILE
        try:
            tokens_T = load_file(path)["tokens"].to(torch.int32).numpy()
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"drafter.path: no store of texts in {path}: {error}") from error
        if len(tokens_T) and not END <= tokens_T.min() <= tokens_T.max() < vocab_size:
            raise CheckpointError(
                f"drafter.path: {path} has tokens from {tokens_T.min()} to {tokens_T.max()}, and the "
                f"target knows {vocab_size}; it was saved with another target"
            )
        if len(tokens_T) and not self.num_tokens:
            raise CheckpointError(
                f"drafter.path: {path} has {len(tokens_T)} tokens, and drafter.store_tokens = 0 keeps "
                f"none; give it room, or leave path out"
            )
        self.tokens_T = tokens_T[-self.num_tokens :]
