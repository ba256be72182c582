"""What every drafter owes: to the co-scheduler that trains it, and to the text it must not change.

Letters: B slots, R requests, N anchors, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from cosched.engines.embedded.judges import SamplingJudge
from cosched.engines.embedded.verification import SamplingParams
from cosched.loop.publish import InPlacePublisher
from cosched.protocols import ServesAdapters
from cosched.records import Decision
from cosched.registry import DRAFTERS
from cosched.testing.harness import make_coscheduler, make_target, make_trainer
from cosched.testing.registered import OneThread, registered
from cosched.testing.sampling import FALSE_ALARM, p_values, sampling_target
from cosched.testing.specimen import (
    NUM_DRAFT_TOKENS,
    Feeder,
    MetaTarget,
    Specimen,
    as_batch,
    close,
    contract_target,
    make_texts,
    specimen,
)
from cosched.training.lora import find_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from cosched.engines.embedded.target import Target
    from cosched.protocols import Drafter
    from cosched.records import ServedBlock, VerifyRound

WINDOW = 24
ROUNDING = 1e-4  # of a row's spread: two tokens as near as that may change places in float32


SERVINGS = pytest.mark.parametrize(
    ("max_batch", "window"),
    [
        (1, None),
        (3, WINDOW),
        pytest.param(3, None, marks=pytest.mark.slow),
        pytest.param(1, WINDOW, marks=pytest.mark.slow),
    ],
)


class DrafterContract(OneThread):
    """Every example of every registered drafter, or of those in ``names``.

    The first example of each is quick to test, the others are marked slow.
    """

    names: ClassVar[tuple[str, ...] | None] = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases: list[Any] = []
        for plugin in registered(DRAFTERS, self.names):
            keys = list(plugin.cls.examples(contract_target(), NUM_DRAFT_TOKENS))
            assert keys, f"{plugin.name} has no example to test"
            cases += [
                pytest.param(
                    specimen(plugin, key),
                    id=f"{plugin.name}-{key}".replace(" ", "_"),
                    marks=(pytest.mark.slow,) if number else (),
                )
                for number, key in enumerate(keys)
            ]
        metafunc.parametrize("specimen", cases)

    # --- what it says of itself ------------------------------------------------------------

    def test_it_is_described(self, specimen: Specimen) -> None:
        """Its first line says what it is; signals and sizes are what its settings asked for."""
        drafter = specimen.make()
        assert specimen.plugin.summary
        assert drafter.num_draft_tokens == 3
        layers = drafter.signal.feature_layers
        assert all(0 <= layer <= specimen.target.num_layers for layer in layers)
        assert (drafter.signal.conditioning == "none") == (drafter.network() is None)
        knows = {"chain": "chain", "block": "block", "parallel": "block", "none": "none"}
        assert knows[specimen.plugin.cls.draft_type] == drafter.signal.conditioning
        assert drafter.cache_bytes_per_token >= 0
        assert all(isinstance(reason, str) for reason in drafter.not_for_sglang())

    # --- serving ---------------------------------------------------------------------------

    def test_row_k_judges_draft_k(self, specimen: Specimen) -> None:
        """Teacher row k is what the target says behind the anchor and drafts 0..k - 1.

        The verdict follows: drafts agree with their rows up to the first refusal and not there.
        Rows that are off by one place agree almost nowhere, so the statement can fail.
        """
        rounds = specimen.taught[1].rounds
        blocks = [block for round_ in rounds for block in round_.blocks]
        assert sum(block.num_accepted for block in blocks) >= 20, "too little was accepted to tell"
        text = _text_of(rounds, "r0")
        for block in [block for block in blocks if block.request_id == "r0"][::7]:
            prefix = torch.cat((text[: block.anchor + 1], block.path_K))
            logits = specimen.target.model(input_ids=prefix[None]).logits[0, block.anchor : -1]
            assert torch.allclose(specimen.target.head(block.teacher_KX), logits, atol=1e-3)
        accepted = [block for block in blocks if block.num_accepted]
        assert all(_agrees(specimen.target, block, 0) for block in accepted)
        shifted = sum(_agrees(specimen.target, block, 1) for block in accepted)
        assert shifted < 0.5 * len(accepted)

    @SERVINGS
    def test_greedy_text_is_the_targets(
        self, specimen: Specimen, max_batch: int, window: int | None
    ) -> None:
        """Served frozen, greedy text is plain decoding's, token for token."""
        assert specimen.served(max_batch, window).texts == specimen.plain

    def test_greedy_text_is_the_targets_while_it_learns(self, specimen: Specimen) -> None:
        """The same in a batch of three, across many publications."""
        drafter, served, teacher = specimen.taught
        assert served.texts == specimen.plain
        if drafter.network() is not None:
            assert teacher.version >= 20

    @pytest.mark.slow
    def test_windowed_greedy_text_is_the_targets_while_it_learns(self, specimen: Specimen) -> None:
        """The same with a window, one request at a time."""
        drafter = specimen.make()
        teacher = make_coscheduler(specimen.target, drafter, every=4, lr=3e-3, window=WINDOW)
        assert specimen.decode(drafter, 1, WINDOW, teacher).texts == specimen.plain

    @pytest.mark.parametrize(
        ("taught", "num_draws"), [(True, 600), pytest.param(False, 2000, marks=pytest.mark.slow)]
    )
    def test_sampled_text_follows_the_target(
        self, specimen: Specimen, taught: bool, num_draws: int
    ) -> None:
        """Sampled text has the target's exact distribution, frozen and while the draft changes."""
        target = sampling_target()
        drafter = specimen.make(target, num_draft_tokens=2)
        observer = make_coscheduler(target, drafter, every=2, lr=3e-3) if taught else None
        sampling = SamplingParams(1.0)
        found = p_values(target, drafter, SamplingJudge(sampling), sampling, observer, num_draws)
        assert min(found) > FALSE_ALARM

    def test_a_batch_drafts_what_each_would_alone(self, specimen: Specimen) -> None:
        """A request's proposals do not depend on what else is in the batch."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        together = Feeder(drafter, texts).run(12)
        for place, text in enumerate(texts):
            alone = Feeder(drafter, [text], first=place).run(12)
            assert close(together[:, place : place + 1], alone)

    def test_a_slot_that_moves_goes_on(self, specimen: Specimen) -> None:
        """After ``move_slot`` the request drafts on in its new slot, and its old one is empty."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        feeder = Feeder(drafter, texts)
        feeder.run(5)
        feeder.move(2, 0)  # text 0 is done, text 2 takes its place
        feeder.admit(texts[0])
        lengths = [feeder.lengths[0] + 2, feeder.lengths[1] + 1, 9]
        feeder.observe(lengths)
        fresh = Feeder(drafter, [texts[2], texts[1], texts[0]])
        fresh.observe(lengths)
        assert close(feeder.propose(), fresh.propose())

    def test_a_window_wider_than_the_text_changes_nothing(self, specimen: Specimen) -> None:
        """A draft that may look 1000 tokens back at a text of 64 drafts what it drafts without."""
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=2, length=64)
        assert close(Feeder(drafter, texts, 1000).run(12), Feeder(drafter, texts).run(12))

    # --- its files -------------------------------------------------------------------------

    def test_what_it_saves_it_loads(self, specimen: Specimen, tmp_path: Path) -> None:
        """Saved and loaded, it has the same weights and proposals, to the bit."""
        drafter = specimen.taught[0]
        drafter.save(tmp_path / "draft")
        loaded = specimen.plugin.cls.load(
            specimen.settings(str(tmp_path / "draft")), specimen.target
        )
        if (network := drafter.network()) is not None:
            ours, theirs = network.state_dict(), loaded.network().state_dict()
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert [p.dtype for p in ours.values()] == [p.dtype for p in theirs.values()]
        assert loaded.signal == drafter.signal
        texts = make_texts(specimen.target, drafter, count=2, length=64)
        assert torch.equal(Feeder(drafter, texts).run(8), Feeder(loaded, texts).run(8))

    def test_a_sketch_has_the_shape_of_what_is_loaded(
        self, specimen: Specimen, tmp_path: Path
    ) -> None:
        """From ``config.json`` alone: the same parameters, none of them held in memory."""
        drafter = specimen.make()
        drafter.save(tmp_path / "draft")
        settings, cls = specimen.settings(str(tmp_path / "draft")), specimen.plugin.cls
        loaded = cls.load(settings, specimen.target)
        sketch = cls.sketch(settings, MetaTarget(specimen.target))
        assert sketch.signal == loaded.signal
        assert sketch.num_draft_tokens == loaded.num_draft_tokens
        assert sketch.cache_bytes_per_token == loaded.cache_bytes_per_token
        assert list(sketch.not_for_sglang()) == list(loaded.not_for_sglang())
        assert (sketch.network() is None) == (loaded.network() is None)
        if loaded.network() is not None:
            assert _shapes(sketch) == _shapes(loaded)
            assert all(p.is_meta for p in sketch.network().parameters())
            assert {n: s.parameters for n, s in sketch.scopes().items()} == {
                n: s.parameters for n, s in loaded.scopes().items()
            }

    # --- learning --------------------------------------------------------------------------

    @SERVINGS
    def test_replay_gives_the_served_tokens(
        self, specimen: Specimen, max_batch: int, window: int | None
    ) -> None:
        """The best token of every replayed row is the one that was served, accepted or not."""
        _needs_network(specimen)
        drafter, batch = specimen.make(), specimen.batch("all", max_batch, window)
        logits = drafter.replay(batch).detach()
        ids, path_RNK = drafter.target_ids(), batch.paths_RNK
        if ids is not None:
            to_draft = torch.full((specimen.target.vocab_size,), -1)
            to_draft[ids] = torch.arange(len(ids))
            path_RNK = to_draft[path_RNK]
        rows = batch.weights_RNK > 0
        assert int(rows.sum()) > 100
        assert not (path_RNK[rows] < 0).any(), "it served a token that it cannot say"
        assert float(_behind(logits, path_RNK)[rows].max()) < ROUNDING
        other = path_RNK.roll(1, dims=1)
        assert float(_behind(logits, other)[rows].max()) > 0.1  # the comparison can tell

    @pytest.mark.parametrize("window", [None, 16, 1])
    def test_replay_gives_the_served_logits(self, specimen: Specimen, window: int | None) -> None:
        """Behind every anchor of a text, replayed rows are what serving computed, number by number."""
        _needs_network(specimen)
        drafter = specimen.make()
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        feeder = Feeder(drafter, texts, window)
        served, anchors = [], []
        for _ in range(12):
            served.append(feeder.step())
            anchors.append(feeder.lengths)
        batch = as_batch(texts, torch.tensor(anchors).T, NUM_DRAFT_TOKENS, window)
        served_RNKV = torch.stack(served, 1)
        if (ids := drafter.target_ids()) is not None:
            served_RNKV = served_RNKV.index_select(-1, ids)
        assert close(drafter.replay(batch).detach(), served_RNKV)

    def test_replay_passes_a_gradient(self, specimen: Specimen) -> None:
        """To every parameter of the widest scope, and to none of the target's."""
        _needs_network(specimen)
        drafter = specimen.taught[0].clone(torch.float32)
        network = drafter.network()
        assert network is not None
        network.requires_grad_(True)
        logits = drafter.replay(specimen.batch("delayed"))
        (logits.logsumexp(-1) ** 2).mean().backward()
        without = [name for name, p in network.named_parameters() if p.grad is None]
        assert not without, "no gradient reaches them"
        assert all(p.grad is None for p in specimen.target.model.parameters())

    def test_a_float32_copy_learns_over_a_bfloat16_target(self, specimen: Specimen) -> None:
        """A draft that serves in 16 bits is trained in 32, whatever it borrows of the target."""
        _needs_network(specimen)
        target = make_target(dtype=torch.bfloat16)
        drafter = specimen.make(target)
        texts = make_texts(target, drafter, count=2, length=32)
        feeder = Feeder(drafter, texts, None)
        served_RKV, anchors = feeder.step(), feeder.lengths
        batch = as_batch(texts, torch.tensor([anchors]).T, NUM_DRAFT_TOKENS, None)
        copy = drafter.clone(torch.float32)
        copy.network().requires_grad_(True)
        logits = copy.replay(batch)
        logits.float().square().mean().backward()
        gradients = [p.grad for p in copy.network().parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        if (ids := drafter.target_ids()) is not None:
            served_RKV = served_RKV.index_select(-1, ids)
        # 16-bit products of small networks: a few per cent of the largest logit.
        error = (logits[:, 0].detach() - served_RKV).abs().max() / served_RKV.abs().max()
        assert float(error) < 0.1

    def test_a_clone_is_its_own(self, specimen: Specimen) -> None:
        """A clone replays the same and shares no parameter with what serves."""
        _needs_network(specimen)
        drafter = specimen.taught[0]
        clone, batch = drafter.clone(torch.float32), specimen.batch("delayed")
        assert torch.equal(drafter.replay(batch), clone.replay(batch))
        ours, theirs = drafter.network(), clone.network()
        assert ours is not None
        assert theirs is not None
        assert not {p.data_ptr() for p in ours.parameters()} & {
            p.data_ptr() for p in theirs.parameters()
        }

    def test_reset_gives_the_first_draft_back(self, specimen: Specimen) -> None:
        """Trained, published, reset and published again: first weights and proposals, to the bit."""
        _needs_network(specimen)
        target, drafter = specimen.target, specimen.make()
        network = drafter.network()
        texts = make_texts(target, drafter, count=2, length=48)
        weights = {name: p.clone() for name, p in network.state_dict().items()}
        proposals = Feeder(drafter, texts).run(6)
        trainer = make_trainer(target, drafter, lr=3e-3)
        publisher = InPlacePublisher.of_modules(network, target.model)
        trainer.update(specimen.batch("delayed"), Decision(3))
        publisher.publish(trainer.weights())
        assert not close(Feeder(drafter, texts).run(6), proposals)
        trainer.reset()
        publisher.publish(trainer.weights())
        assert all(torch.equal(weights[n], p) for n, p in network.state_dict().items())
        assert torch.equal(Feeder(drafter, texts).run(6), proposals)

    def test_scopes_name_parameters(self, specimen: Specimen) -> None:
        """Every scope names parameters that there are, each once, and there is a ``full`` one."""
        _needs_network(specimen)
        drafter = specimen.make()
        known = {name for name, _ in drafter.network().named_parameters()}
        scopes = drafter.scopes()
        assert "full" in scopes
        for name, scope in scopes.items():
            assert scope.parameters, name
            assert len(set(scope.parameters)) == len(scope.parameters), name
            assert set(scope.parameters) <= known, name

    def test_scopes_say_what_they_leave_exact(self, specimen: Specimen) -> None:
        """Training a scope that keeps the cache leaves what was cached before as good as new.

        The widest scope does not, so the comparison can tell.
        """
        _needs_network(specimen)
        scopes = specimen.make().scopes()
        widest = max(scopes, key=lambda name: len(scopes[name].parameters))
        for name, scope in scopes.items():
            if scope.keeps_cache:
                assert _cache_stays_exact(specimen, scope.parameters), name
            elif name == widest:
                assert not _cache_stays_exact(specimen, scope.parameters), name

    def test_new_adapters_leave_the_draft_as_it_is(self, specimen: Specimen) -> None:
        """B is zero: the same logits to the bit, and the checkpoint has nothing more in it."""
        drafter, served = _adapted(specimen)
        texts = make_texts(specimen.target, drafter, count=3, length=64)
        feeder = Feeder(drafter, texts)
        drafter.use_adapter(feeder.state, 1, 1)
        for down, up in served[1].values():
            down.normal_()
            assert not up.any()
        plain = specimen.make()
        assert torch.equal(feeder.run(6), Feeder(plain, texts).run(6))
        assert drafter.network().state_dict().keys() == plain.network().state_dict().keys()

    def test_adapters_in_a_batch_draft_as_each_alone(self, specimen: Specimen) -> None:
        """Each request as if its adapter were merged into a draft of its own.

        In prompts and rounds of unequal length, and after it has moved to another slot.
        """
        drafter, served = _adapted(specimen)
        generator = torch.Generator().manual_seed(7)
        for tensors in served:
            for tensor in (tensor for pair in tensors.values() for tensor in pair):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        texts, users = make_texts(specimen.target, drafter, count=3, length=64), [2, 0, 2]
        together = Feeder(drafter, texts)
        for slot, adapter in enumerate(users):
            drafter.use_adapter(together.state, slot, adapter)
        found = together.run(6)
        for slot, adapter in enumerate(users):
            alone = Feeder(drafter.alone(adapter), texts[slot : slot + 1], first=slot)
            assert close(found[:, slot : slot + 1], alone.run(6))
        other = Feeder(drafter.alone(1), texts[:1])
        assert not close(found[:, :1], other.run(6))  # they do differ
        together.move(2, 1)
        together.observe([length + 2 for length in together.lengths])
        again = Feeder(drafter.alone(2), texts[2:])
        again.observe(together.lengths[1:])
        assert close(together.propose()[1:], again.propose())


def _adapted(specimen: Specimen) -> tuple[Any, Sequence[Mapping[str, tuple[Tensor, Tensor]]]]:
    """A drafter with three adapters on all of its linear layers."""
    _needs_network(specimen)
    drafter = specimen.make()
    layers = find_layers(drafter.network(), None)
    if not isinstance(drafter, ServesAdapters):
        pytest.skip(f"{specimen.plugin.name} serves one draft to all")
    return drafter, drafter.adapt(layers, count=3, rank=4, scale=2.0)


def _needs_network(specimen: Specimen) -> None:
    if specimen.make().network() is None:
        pytest.skip(f"{specimen.plugin.name} has no network: it learns by itself")


def _cache_stays_exact(specimen: Specimen, names: tuple[str, ...]) -> bool:
    """Whether a state from before a change of those parameters drafts as a fresh one does."""
    drafter = specimen.make()
    texts = make_texts(specimen.target, drafter, count=2, length=64)
    old = Feeder(drafter, texts)
    old.run(8)
    generator = torch.Generator().manual_seed(2)
    parameters = dict(drafter.network().named_parameters())
    for name in names:
        parameter = parameters[name]
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * parameter.detach().abs().mean() * noise
    drafted = old.step()
    fresh = Feeder(drafter, texts)
    fresh.observe(old.lengths)
    return close(drafted, fresh.propose())


def _behind(logits: Tensor, tokens: Tensor) -> Tensor:
    """How far a token's logit lies behind the best, as a share of the row's spread."""
    gap = logits.amax(-1) - logits.gather(-1, tokens[..., None]).squeeze(-1)
    return gap / logits.std(-1)


def _text_of(rounds: list[VerifyRound], request_id: str) -> Tensor:
    """Tokens of a request from its segments."""
    parts = [s for round_ in rounds for s in round_.segments if s.request_id == request_id]
    return torch.cat([parts[0].tokens_R1, *(part.tokens_R1[1:] for part in parts[1:])])


def _agrees(target: Target, block: ServedBlock, shift: int) -> bool:
    says_K = target.head(block.teacher_KX).argmax(-1).roll(shift)
    stands_K = says_K == block.path_K
    # Drafts past the end of a request's text were not asked for.
    accepted = min(block.num_accepted, len(stands_K))
    ended = block.num_committed <= accepted
    refused = accepted == len(stands_K) or ended or not stands_K[accepted]
    return bool(stands_K[:accepted].all()) and bool(refused)


def _shapes(drafter: Drafter) -> dict[str, torch.Size]:
    network = drafter.network()
    assert network is not None
    return {name: parameter.shape for name, parameter in network.named_parameters()}
