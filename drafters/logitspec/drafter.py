"""LogitSpec (arXiv 2507.01449): the logits that gave the next token also tell of the one after it.

The target's row that decided the newest token has high logits for the tokens that soon follow too: the
one after it is among its best sixty about every second time. Here these logits choose between the places where
the text's end stood before, and guess a token where it stood nowhere, from which lookup goes on: the best path
alone, or with the next best beside it a tree. Public code: smart-lty/LogitSpec.

Letters: B slots, T tokens of a text, V vocabulary, S tokens of a text's end, M places, K drafted tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from msgspec import Meta

from cosched.protocols import Choose, Drafter, DrafterSettings, TargetInfo
from cosched.records import Proposal, Segment, SignalSpec
from cosched.registry import DRAFTERS
from drafters.logitspec.store import Store
from drafters.lookup import TOKEN_BYTES, Branches, Texts, find, follow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from drafters.lookup import Tokens

    Logits = NDArray[np.float32]

LOGIT_BYTES = np.dtype(np.float32).itemsize
UNKNOWN = -np.inf


class LogitSpecSettings(DrafterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``max_ngram`` is how many of the text's last tokens are compared with an earlier place at most.

    ``store_tokens`` is how many tokens of requests that are done are kept and looked at as well, those of
    all tenants alike (0: every request has its own text alone). ``path`` is the folder of a saved
    store to begin with; left out, it is empty. ``window`` is how far back a request's own text is
    looked at.
    ``branches`` above 1 drafts a tree of so many continuations, each with another first token; the n-th
    of them has an n-th of ``num_draft_tokens``, one token at least.
    """

    path: str = ""
    max_ngram: Annotated[int, Meta(ge=1)] = 16
    branches: Annotated[int, Meta(ge=1, le=64)] = 1
    store_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] = 0


class State(NamedTuple):
    """Of each slot what it says, and what the target made of it."""

    texts: Texts
    logits_BV: Logits  # of the row that decided each slot's newest token


@DRAFTERS.register("logitspec")
class LogitSpecDrafter(Drafter):
    """LogitSpec: copies what followed the text's end before, as the target's last logits choose."""

    Settings: ClassVar = LogitSpecSettings
    draft_type: ClassVar = "none"  # no network: what it knows is text

    def __init__(
        self,
        target: TargetInfo,
        num_draft_tokens: int,
        max_ngram: int,
        store: Store,
        branches: int = 1,
    ) -> None:
        self._device = target.embedding.weight.device
        self._vocab_size = target.vocab_size
        self._max_ngram = max_ngram
        self._store = store
        self._lengths = [max(1, num_draft_tokens // nth) for nth in range(1, branches + 1)]
        self.num_draft_tokens = num_draft_tokens
        self.num_tree_tokens = sum(self._lengths) if branches > 1 else 0
        self.slot_bytes = LOGIT_BYTES * target.vocab_size
        self.shared_bytes = TOKEN_BYTES * store.num_tokens
        self.signal = SignalSpec((), conditioning="none", last_logits=True)

    @classmethod
    def sketch(cls, settings: LogitSpecSettings, target: TargetInfo) -> LogitSpecDrafter:
        """Ready to serve, too: what ``save`` wrote is no weights. Errors as ``Store.read``."""
        store = Store(settings.store_tokens)
        if settings.path:
            store.read(Path(settings.path), target.vocab_size)
        return cls(target, settings.num_draft_tokens, settings.max_ngram, store, settings.branches)

    @classmethod
    def load(cls, settings: LogitSpecSettings, target: TargetInfo) -> LogitSpecDrafter:
        return cls.sketch(settings, target)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._store.save(directory)

    @classmethod
    def examples(cls, target: TargetInfo, num_draft_tokens: int) -> Mapping[str, LogitSpecDrafter]:
        return {
            "suffix": cls(target, num_draft_tokens, 16, Store(0)),
            "tree": cls(target, num_draft_tokens, 16, Store(0), branches=3),
            "one token": cls(target, num_draft_tokens, 1, Store(0)),
        }

    @property
    def own_settings(self) -> Mapping[str, Any]:
        return {"max_ngram": self._max_ngram, "branches": len(self._lengths)}

    def not_for_sglang(self) -> list[str]:
        return ["it has no network that a worker of SGLang could run"]

    @property
    def cache_bytes_per_token(self) -> int:
        return TOKEN_BYTES

    def new_state(self, max_batch: int, max_length: int, window: int | None) -> State:
        logits_BV = np.full((max_batch, self._vocab_size), UNKNOWN, np.float32)
        return State(Texts.empty(max_batch, max_length, window), logits_BV)

    def observe(self, state: State, slot: int, segment: Segment) -> None:
        state.texts.extend(slot, segment)
        assert segment.logits_V is not None
        state.logits_BV[slot] = segment.logits_V.float().cpu().numpy()  # host waits for the device
        state.logits_BV[slot, segment.tokens_R1[-1]] = UNKNOWN  # said already

    def propose(
        self, state: State, num_slots: int, choose: Choose, num_draft_tokens: int
    ) -> Proposal:
        del choose  # it has no distribution to choose from
        lengths = [min(length, num_draft_tokens) for length in self._lengths]
        tree = Branches.of(lengths)
        drafts: list[list[int]] = []
        for slot in range(num_slots):
            branches = self._draft(state.texts.of(slot), state.logits_BV[slot], lengths)
            drafts.append([branches[branch][place] for branch, place in tree.places])
        tokens_BK = torch.tensor(drafts, device=self._device)
        if len(lengths) == 1:
            return Proposal(tokens_BK)
        parents_BK = torch.tensor(tree.parents, device=self._device).expand_as(tokens_BK)
        return Proposal(tokens_BK, parents_BK=parents_BK)

    def _draft(self, text_T: Tokens, logits_V: Logits, lengths: list[int]) -> list[list[int]]:
        """Continuations of one text, the best first."""
        known_T = np.concatenate((self._store.tokens_T, text_T))
        end = text_T[-self._max_ngram :].tolist()
        places_N = self._best_places(known_T, end, logits_V, len(lengths))
        begun = [
            follow(known_T, place, length).tolist()
            for place, length in zip(places_N.tolist(), lengths, strict=False)
        ]
        if len(begun) < len(lengths):
            others_V = logits_V.copy()
            others_V[known_T[places_N]] = UNKNOWN
            while len(begun) < len(lengths):
                begun.append([int(others_V.argmax())])
                others_V[begun[-1]] = UNKNOWN
        return [
            self._go_on(known_T, end, branch, length)
            for branch, length in zip(begun, lengths, strict=True)
        ]

    def _best_places(
        self, known_T: Tokens, end: list[int], logits_V: Logits, number: int
    ) -> NDArray[np.int64]:
        """Where to copy from, a place for each next token: those that are the likeliest of the longest.

        Of several with the same token the latest.
        """
        longest_M = self._longest(known_T, end)
        likeliest_M = longest_M[np.lexsort((longest_M, logits_V[known_T[longest_M]]))[::-1]]
        _, first_of_each = np.unique(known_T[likeliest_M], return_index=True)
        return likeliest_M[np.sort(first_of_each)[:number]]

    def _go_on(self, known_T: Tokens, end: list[int], branch: list[int], number: int) -> list[int]:
        """A continuation that has begun, up to so many tokens."""
        while len(branch) < number:
            missing = number - len(branch)
            longest_M = self._longest(known_T, end + branch)
            if len(longest_M):
                branch = branch + follow(known_T, int(longest_M[-1]), missing).tolist()
            else:
                branch = branch + branch[-1:] * missing
        return branch

    def _longest(self, known_T: Tokens, end: list[int]) -> NDArray[np.int64]:
        """What followed where most tokens agree, in the order of the text.

        A match in the store counts one token less: what another text went on with is worth less.
        """
        follows_M, lengths_M = find(known_T, np.array(end, np.int32), self._max_ngram)
        lengths_M = lengths_M - (follows_M < len(self._store.tokens_T))
        return follows_M[lengths_M == lengths_M.max(initial=0)]

    def move_slot(self, state: State, source: int, destination: int) -> None:
        self._store.add(state.texts.whole(destination))  # its request is done
        state.texts.move(source, destination)
        state.logits_BV[destination] = state.logits_BV[source]
