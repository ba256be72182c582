"""What an engine gives a drafter: the target, how tokens are picked, and layers to draft with.

Plugins take them from ``cosched.protocols``, where their role is. Shapes: B requests, R rows with logits,
W tokens of a level of a tree, T rows of a request, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


class Choose(Protocol):
    """How drafted tokens are picked from the draft's logits: ``choose(k, logits_BV)``, token by token."""

    @abstractmethod
    def __call__(self, k: int, logits_BV: Tensor, /) -> Tensor | None:
        """Token k of each request's chain ``[B]``.

        None, never of the first one: neither that token nor more are wanted.
        """
        ...

    @abstractmethod
    def siblings(self, first: int, logits_BRV: Tensor, rows_BW: Tensor) -> Tensor:
        """Tokens ``first .. first + W - 1`` of each request's tree ``[B, W]``.

        Token w is picked from the logits ``rows_BW[:, w]``, and several from the same are siblings. How many
        each row has may follow from all logits and all tokens before these, and from nothing else.
        """
        ...


LayersForward = Callable[["Tensor", "Tensor", Sequence[int], "Sequence[int] | None"], "Tensor"]
"""``forward(ids_BT, positions_BT, layers, counts) -> logits_BTV``: the target with those of its layers alone.

For slots ``0..B - 1``, of each its first ``counts[b]`` rows (None: all; zeros for the others), over the
keys and values of the text that is committed. It writes at ``positions_BT``: from the newest token on.
"""

MOST_UNDRAFTED = 128
"""In how many rounds in a row, at most, an engine drafts nothing."""


class TargetInfo(Protocol):
    """What a drafter may know of the target when it is loaded; ``model_type`` is transformers' name."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_length: int
    model_type: str
    embedding: nn.Embedding
    head: nn.Module

    def token_ids(self) -> Mapping[str, int] | None:
        """The tokenizer's vocabulary; None where the target came without a tokenizer."""
        ...
