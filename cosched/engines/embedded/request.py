"""A request on its way in and out of the engine.

Letters: P prompt tokens, T tokens of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.records import RoundRow


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt, int64 on the target's device; ``forced_T`` is the whole text where it is given.

    ``tenant`` is whose request it is: with state per tenant, whose adapter serves it.
    """

    id: str
    prompt_P: Tensor
    max_new_tokens: int
    forced_T: Tensor | None = None
    tenant: str | None = None

    @property
    def max_length(self) -> int:
        return len(self.prompt_P) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What was generated, and how each round of it went."""

    request: GenerationRequest
    tokens: tuple[int, ...]
    rounds: tuple[RoundRow, ...]
    stopped: bool  # by a stop token, not by the limit
