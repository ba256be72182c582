"""A running request in the embedded engine: its text so far, and its rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cosched.engines.request import FinishedRequest, GenerationRequest

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.engines.embedded.verification import RandomStream
    from cosched.records import RoundRow


@dataclass(slots=True)
class Slot:
    """``text`` has room for all that the request may become; ``length`` of it is there."""

    request: GenerationRequest
    text: Tensor
    length: int
    random: RandomStream
    rounds: list[RoundRow] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or self.length >= self.request.max_length

    def finished(self) -> FinishedRequest:
        generated = self.text[len(self.request.prompt_P) : self.length]
        return FinishedRequest(
            self.request, tuple(generated.tolist()), tuple(self.rounds), self.stopped
        )

    def path(self, num_tokens: int) -> Tensor:
        """The next tokens of a forced text, zeros past its end and for a free request."""
        path = self.text.new_zeros(num_tokens)
        if self.request.forced_T is not None:
            ahead = self.request.forced_T[self.length : self.length + num_tokens]
            path[: len(ahead)] = ahead
        return path

    def commit(self, tokens_R: Tensor, stop_tokens: frozenset[int]) -> int:
        """Append tokens up to the first stop token and the request's limit; returns how many."""
        tokens_R = tokens_R[: self.request.max_length - self.length]
        for place, token in enumerate(tokens_R.tolist()):
            if token in stop_tokens:
                tokens_R = tokens_R[: place + 1]
                self.stopped = True
                break
        self.text[self.length : self.length + len(tokens_R)] = tokens_R
        self.length += len(tokens_R)
        return len(tokens_R)


def uniforms_for(drawn_BU: Tensor, num_drafted: int) -> Tensor:
    """Of ``2M + 1`` numbers a request those that K tokens need, ``2K + 1``.

    To choose each token, to accept each, and to draw the one behind them: a number's part and place do
    not depend on K, so that two arms which draft unequally at one position meet the same luck there.
    """
    most = drawn_BU.shape[1] // 2
    chosen, accepted = drawn_BU[:, :num_drafted], drawn_BU[:, most : most + num_drafted]
    return torch.cat((chosen, accepted, drawn_BU[:, -1:]), 1)
