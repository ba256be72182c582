"""One example of one drafter, and what several statements about it need.

Letters: T tokens of a text, F feature width, B slots, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosched.engines.embedded.choosing import Led
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.trees import Forest
from cosched.protocols import ComposedSettings
from cosched.records import Segment, SignalBatch
from cosched.testing.harness import (
    Watcher,
    collected,
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    make_target,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cosched.coscheduler import Coscheduler
    from cosched.engines.embedded.target import Target
    from cosched.loop.lengths import DraftLengths
    from cosched.protocols import Drafter, TargetInfo
    from cosched.records import Proposal, Rows, VerifyRound
    from cosched.registry import Plugin

NUM_DRAFT_TOKENS = 3
NUM_REQUESTS = 4
PROMPT = 9
NEW_TOKENS = 72
WINDOW = 24

SERVINGS = pytest.mark.parametrize(
    ("max_batch", "window"),
    [
        (1, None),
        (3, WINDOW),
        pytest.param(3, None, marks=pytest.mark.slow),
        pytest.param(1, WINDOW, marks=pytest.mark.slow),
    ],
)


Statement = TypeVar("Statement", bound="Callable[..., None]")


def takes_long(statement: Statement) -> Statement:
    """Of a contract: what is quick to test for one drafter of each conditioning, and long for most."""
    statement.__dict__["takes_long"] = True
    return statement


@dataclass(frozen=True, slots=True)
class Served:
    """Tokens of each request, and the rounds that they came from."""

    texts: dict[str, list[int]]
    rounds: list[VerifyRound]


class Specimen:
    """The example ``key`` of a registered drafter, made anew or trained, over one target."""

    def __init__(self, plugin: Plugin, key: str, target: Target) -> None:
        self.plugin = plugin
        self.key = key
        self.target = target
        self._served: dict[tuple[int, int | None], Served] = {}

    @property
    def is_composed(self) -> bool:
        """Whether it is made of other drafters."""
        return issubclass(self.plugin.cls.Settings, ComposedSettings)

    def make(self, target: Target | None = None, num_draft_tokens: int = NUM_DRAFT_TOKENS) -> Any:
        """A new drafter, ready to serve; the same bits every time."""
        target = target or self.target
        torch.manual_seed(1)
        drafter = self.plugin.cls.examples(target, num_draft_tokens)[self.key]
        network = drafter.network()
        if network is not None:
            network.to(target.device, target.dtype).requires_grad_(False)
        return drafter

    @cached_property
    def requests(self) -> list[Any]:
        return make_requests(self.target, NUM_REQUESTS, PROMPT, NEW_TOKENS)

    @cached_property
    def plain(self) -> dict[str, list[int]]:
        """What the target says by itself."""
        return _plain(self.target)

    def decode(
        self,
        drafter: Drafter,
        max_batch: int,
        window: int | None,
        teacher: Coscheduler | None,
        lengths: DraftLengths | None = None,
    ) -> Served:
        """Greedy text of all requests; with three slots the fourth waits and one is moved.

        One that learns alone says the first two of them: the second meets what was learnt of the first.
        """
        few = max_batch == 1 and teacher is not None
        requests = self.requests[:2] if few else self.requests
        observer = Watcher(teacher)
        engine = make_engine(
            self.target,
            drafter,
            requests,
            max_batch,
            observer=observer,
            window=window,
            lengths=lengths,
        )
        return Served(decode(engine, requests), observer.rounds)

    def served(self, max_batch: int, window: int | None) -> Served:
        """What a new drafter serves."""
        key = (max_batch, window)
        if key not in self._served:
            self._served[key] = self.decode(self.make(), max_batch, window, None)
        return self._served[key]

    @cached_property
    def trained(self) -> tuple[Drafter, Served, Coscheduler]:
        """A drafter that learns while it serves, what it serves, and who teaches it.

        It sees the same few words again and again, so that many of its drafts are accepted and
        many are not.
        """
        drafter = self.make()
        teacher = make_coscheduler(self.target, drafter, every=2, lr=3e-3)
        return drafter, self.decode(drafter, 3, None, teacher), teacher

    def batch(self, rows: Rows, max_batch: int = 3, window: int | None = None) -> SignalBatch:
        """Everything that a new drafter served before the first request ended."""
        rounds = self.served(max_batch, window).rounds
        batch = collected(self.target, self.make(), rows, window, rounds)
        assert batch is not None
        return batch

    def settings(self, path: str, num_draft_tokens: int = NUM_DRAFT_TOKENS) -> Any:
        """The plugin's settings for a checkpoint folder.

        Of one that is made of others the folder has one for each; settings of its own it has as attributes.
        """
        cls, name = self.plugin.cls.Settings, self.plugin.name
        if not self.is_composed:
            own = self.make().own_settings
            return cls(kind=name, path=path, num_draft_tokens=num_draft_tokens, **own)
        folders = sorted(Path(path).iterdir())
        drafters = tuple({"kind": f.name.partition("-")[2], "path": str(f)} for f in folders)
        more = set(cls.__struct_fields__) - set(ComposedSettings.__struct_fields__)
        own = {key: getattr(self.make(), key) for key in more}
        return cls(kind=name, drafters=drafters, num_draft_tokens=num_draft_tokens, **own)


@cache
def contract_target() -> Target:
    """The target that all specimens are made for: it uses a dozen words a text."""
    return make_target(std=0.15)


@cache
def example_keys(plugin: Plugin) -> tuple[str, ...]:
    """The names of its examples, for which they are all made: once, and not for each statement."""
    return tuple(plugin.cls.examples(contract_target(), NUM_DRAFT_TOKENS))


@cache
def specimen(plugin: Plugin, key: str) -> Specimen:
    """That example of that drafter; what was found out about it is kept."""
    return Specimen(plugin, key, contract_target())


@cache
def _plain(target: Target) -> dict[str, list[int]]:
    requests = make_requests(target, NUM_REQUESTS, PROMPT, NEW_TOKENS)
    return decode(make_engine(target, None, requests), requests)


@dataclass(frozen=True, slots=True)
class Text:
    """Given tokens, and the target's features and logits at each where the drafter sees them."""

    target: Target
    tokens_T: Tensor
    features_TF: Tensor | None
    logits_TV: Tensor | None


def make_texts(target: Target, drafter: Drafter, count: int, length: int) -> list[Text]:
    """Random texts of one length, with what the drafter asks to see of them."""
    generator = torch.Generator().manual_seed(11)
    texts: list[Text] = []
    for _ in range(count):
        tokens_T = torch.randint(1, target.vocab_size, (length,), generator=generator)
        cache_ = target.new_cache(1, length)
        positions_1T = torch.arange(length)[None]
        rows = target.forward(tokens_T[None], positions_1T, cache_, drafter.signal.feature_layers)
        features_TF = None if rows.features_BTF is None else rows.features_BTF[0]
        logits_TV = rows.logits_BTV[0] if drafter.signal.last_logits else None
        texts.append(Text(target, tokens_T, features_TF, logits_TV))
    return texts


class Feeder:
    """Leads a drafter along given texts, as an engine would: some rows, a proposal, some rows.

    Drafted tokens are the text's own, so that proposals of two drafters can be compared number by
    number, whichever token each would have chosen. Trees have their own, the draft's best.
    """

    def __init__(
        self, drafter: Drafter, texts: Sequence[Text], window: int | None = None, first: int = 0
    ) -> None:
        self.drafter = drafter
        self.texts = list(texts)
        self.lengths = [0] * len(texts)
        self._first = first  # the place of its first text among all of them: steps depend on it
        self._step = 0
        longest = max(len(text.tokens_T) for text in texts)
        self.state = drafter.new_state(len(texts), longest, window)
        self._rows = None
        if drafter.needs_target:
            room = longest + drafter.num_draft_tokens + 1
            self._rows = LiveRows(texts[0].target, len(texts), room, ())
            drafter.lend(self.state, self._rows.layers)

    def observe(self, lengths: Sequence[int]) -> None:
        """Commit rows up to those lengths."""
        for slot, (text, start, end) in enumerate(
            zip(self.texts, self.lengths, lengths, strict=True)
        ):
            features = None if text.features_TF is None else text.features_TF[start:end]
            logits_V = None if text.logits_TV is None else text.logits_TV[end - 1]
            tokens_R1 = text.tokens_T[start : end + 1]
            if self._rows is not None:
                self._rows.commit(slot, tokens_R1[:-1], start)
            segment = Segment("text", start, tokens_R1, features, None, logits_V=logits_V)
            self.drafter.observe(self.state, slot, segment)
        self.lengths = list(lengths)

    def move(self, source: int, destination: int) -> None:
        """The text in the last slot goes on in another, whose own is done."""
        self.drafter.move_slot(self.state, source, destination)
        if self._rows is not None:
            self._rows.move_slot(source, destination, self.lengths[source])
        self.texts[destination] = self.texts.pop(source)
        self.lengths[destination] = self.lengths.pop(source)

    def admit(self, text: Text) -> None:
        """A new text in the next free slot."""
        self.texts.append(text)
        self.lengths.append(0)

    def propose(self, number: int | None = None) -> Tensor:
        """Logits ``[B, K, V]`` of ``number`` drafts (None: all); tokens without any are certain.

        Of trees all that there is of each level, ``[B, number, …]``.
        """
        number = number or self.drafter.num_draft_tokens
        path_BK = torch.stack(
            [
                text.tokens_T[at + 1 : at + 1 + number]
                for text, at in zip(self.texts, self.lengths, strict=True)
            ]
        )
        proposal = self.drafter.propose(self.state, len(self.texts), Led(path_BK), number)
        if proposal.parents_BK is not None:
            return _levels(proposal, proposal.parents_BK, number, self.drafter.num_tree_tokens)
        if proposal.logits_BKV is None:
            size = self.texts[0].target.vocab_size
            return F.one_hot(proposal.tokens_BK, size).log()
        assert torch.equal(proposal.tokens_BK, path_BK), "drafted tokens are those that were chosen"
        return proposal.logits_BKV

    def step(self, number: int | None = None) -> Tensor:
        """Commit a prompt or a round, of another length for every text, and propose."""
        for_each = range(self._first, self._first + len(self.texts))
        if self._step == 0:
            new = [5 + 2 * place for place in for_each]
        else:
            new = [
                1 + (self._step + place) % (self.drafter.num_draft_tokens + 1) for place in for_each
            ]
        self._step += 1
        self.observe([length + count for length, count in zip(self.lengths, new, strict=True)])
        return self.propose(number)

    def run(self, steps: int) -> Tensor:
        """Logits of several steps ``[steps, B, K, V]``."""
        return torch.stack([self.step() for _ in range(steps)])


def _levels(proposal: Proposal, parents_BK: Tensor, number: int, most: int) -> Tensor:
    """Tokens and parents of each level, and the logits that they were chosen from; zeros behind them."""
    requests: list[Tensor] = []
    for b, tree in enumerate(Forest.of(proposal).trees):
        depths_S, levels = torch.tensor(tree.depths), list[Tensor]()
        assert tree.depth == number, "one path at least is as long as it was asked to be"
        for depth in range(number):
            at = (depths_S[1:] == depth + 1).nonzero().flatten()
            parts = [proposal.tokens_BK[b, at].float(), parents_BK[b, at].float()]
            level = torch.cat([F.pad(part, (0, most - len(at))) for part in parts])
            if proposal.logits_BKV is not None:
                rows_V = proposal.logits_BKV[b, depths_S[: proposal.logits_BKV.shape[1]] == depth]
                logits = rows_V.flatten()
                level = torch.cat((level, F.pad(logits, (0, most * rows_V.shape[1] - len(logits)))))
            levels.append(level)
        requests.append(torch.stack(levels))
    return torch.stack(requests)


class MetaTarget:
    """What a ``sketch`` may know of a target: its sizes, with weights on the meta device."""

    def __init__(self, target: TargetInfo) -> None:
        self.vocab_size = target.vocab_size
        self.hidden_size = target.hidden_size
        self.num_layers = target.num_layers
        self.max_length = target.max_length
        self.model_type = target.model_type
        self._target = target
        with torch.device("meta"):
            self.embedding = nn.Embedding(target.vocab_size, target.hidden_size)
            self.head: nn.Module = nn.Linear(target.hidden_size, target.vocab_size, bias=False)
        self.embedding.requires_grad_(False)
        self.head.requires_grad_(False)

    def token_ids(self) -> Any:
        return copy(self._target.token_ids())


def as_batch(
    texts: Sequence[Text], anchors_RN: Tensor, num_draft_tokens: int, window: int | None
) -> SignalBatch:
    """The same texts for ``replay``, with the text itself behind every anchor."""
    tokens_RC1 = torch.stack([text.tokens_T for text in texts])
    features = [text.features_TF[:-1] for text in texts if text.features_TF is not None]
    ahead_RNK = anchors_RN[..., None] + 1 + torch.arange(num_draft_tokens)
    paths_RNK = tokens_RC1.gather(1, ahead_RNK.flatten(1)).view(ahead_RNK.shape)
    return SignalBatch(
        starts_R=torch.zeros(len(texts), dtype=torch.int64),
        lengths_R=torch.full((len(texts),), tokens_RC1.shape[1] - 1),
        tokens_RC1=tokens_RC1,
        features_RCF=torch.stack(features) if features else None,
        anchors_RN=anchors_RN,
        paths_RNK=paths_RNK,
        teacher_RNKX=torch.zeros(*paths_RNK.shape, 1),
        weights_RNK=torch.ones(paths_RNK.shape),
        window=window,
    )


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: float32 sums in another order, at logits of about ten."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def needs_chains(specimen: Specimen) -> None:
    """Skip the test where the drafter drafts trees, which are not led along a text."""
    if specimen.make().num_tree_tokens:
        pytest.skip(f"{specimen.plugin.name}-{specimen.key} drafts trees")


def needs_network(specimen: Specimen) -> None:
    """Skip the test where the drafter has no weights to train."""
    if specimen.make().network() is None:
        pytest.skip(f"{specimen.plugin.name} has no network: it learns by itself")


def needs_own_drafts(specimen: Specimen) -> None:
    """Skip the test where not all that is drafted comes from weights of its own."""
    needs_network(specimen)
    if specimen.is_composed:
        pytest.skip(f"{specimen.plugin.name} also serves what drafters without weights propose")
