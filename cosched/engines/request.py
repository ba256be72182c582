"""A request on its way in and out of the engine.

Letters: P prompt tokens, T tokens of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cosched.records import RoundRow


class LaterTurns(Protocol):
    """The rest of a conversation: each turn is a request, made of the answer before it."""

    @property
    def num_turns(self) -> int:
        """How many are still to come."""
        ...

    @property
    def max_length(self) -> int:
        """The most tokens that one of them may have, prompt and answer."""
        ...

    def after(self, answer: Sequence[int]) -> GenerationRequest | None:
        """The next turn, with what follows it; None if it would be longer than that."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt, int64 on the target's device; ``forced_T`` is the whole text where it is given.

    ``tenant`` is whose request it is: with state per tenant, whose adapter serves it. ``later`` is
    what its conversation goes on to ask. ``source`` is the file it comes from, where there are several.
    """

    id: str
    prompt_P: Tensor
    max_new_tokens: int
    forced_T: Tensor | None = None
    tenant: str | None = None
    later: LaterTurns | None = None
    source: str | None = None

    @property
    def max_length(self) -> int:
        return len(self.prompt_P) + self.max_new_tokens

    @property
    def num_turns(self) -> int:
        """Requests of this conversation from this one on."""
        return 1 + (self.later.num_turns if self.later else 0)

    @property
    def max_length_of_turns(self) -> int:
        """Of the longest of them."""
        return max(self.max_length, self.later.max_length if self.later else 0)


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What was generated, and how each round of it went; ``following`` is the next turn, if any."""

    request: GenerationRequest
    tokens: tuple[int, ...]
    rounds: tuple[RoundRow, ...]
    stopped: bool  # by a stop token, not by the limit
    following: GenerationRequest | None = None

    def with_next_turn(self) -> FinishedRequest:
        """The same, once what the conversation asks next is made of the answer."""
        later = self.request.later
        return self if later is None else replace(self, following=later.after(self.tokens))

    @property
    def cut(self) -> bool:
        """Whether the conversation ends here because its next turn does not fit."""
        return self.request.later is not None and self.following is None
