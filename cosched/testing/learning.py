"""What every drafter owes to the co-scheduler that trains it.

Letters: R requests, N anchors, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cosched.loop.publish import InPlacePublisher
from cosched.records import Decision
from cosched.testing.counting import Counting
from cosched.testing.harness import make_target, make_trainer
from cosched.testing.specimen import (
    NUM_DRAFT_TOKENS,
    SERVINGS,
    Feeder,
    Specimen,
    as_batch,
    close,
    make_texts,
    needs_chains,
    needs_network,
    needs_own_drafts,
)

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-4  # of a row's spread: two tokens as near as that may change places in float32


class LearningContract:
    """Part of ``DrafterContract``: replay, gradients, resets and scopes."""

    @SERVINGS
    def test_replay_gives_the_served_tokens(
        self, specimen: Specimen, max_batch: int, window: int | None
    ) -> None:
        """The best token of every replayed row is the one that was served, accepted or not.

        Where a tree was served, one of the best: as many as its levels have tokens on an average.
        """
        needs_own_drafts(specimen)
        drafter, batch = specimen.make(), specimen.batch("all", max_batch, window)
        rank = drafter.num_verified // drafter.num_draft_tokens
        logits = drafter.replay(batch).detach()
        ids, path_RNK = drafter.target_ids(), batch.paths_RNK
        if ids is not None:
            to_draft = torch.full((specimen.target.vocab_size,), -1)
            to_draft[ids] = torch.arange(len(ids))
            path_RNK = to_draft[path_RNK]
        rows = batch.weights_RNK > 0
        assert int(rows.sum()) > 100
        assert not (path_RNK[rows] < 0).any(), "it served a token that it cannot say"
        assert float(_behind(logits, path_RNK, rank)[rows].max()) < ROUNDING
        other = path_RNK.roll(1, dims=1)
        assert float(_behind(logits, other, rank)[rows].max()) > 0.1  # the comparison can tell

    @pytest.mark.parametrize("window", [None, 16, 1])
    def test_replay_gives_the_served_logits(self, specimen: Specimen, window: int | None) -> None:
        """Behind every anchor of a text, replayed rows are what serving computed, number by number."""
        needs_own_drafts(specimen)
        needs_chains(specimen)
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
        needs_network(specimen)
        drafter = specimen.trained[0].clone(torch.float32)
        network = drafter.network()
        assert network is not None
        network.requires_grad_(True)
        logits = drafter.replay(specimen.batch("delayed"))
        (logits.logsumexp(-1) ** 2).mean().backward()
        without = [name for name, p in network.named_parameters() if p.grad is None]
        assert not without, "no gradient reaches them"
        assert all(p.grad is None for p in specimen.target.model.parameters())

    def test_a_replay_goes_by_shapes_alone(self, specimen: Specimen) -> None:
        """Where it is ``capturable``: other rows of one shape take the same operations, without a wait."""
        needs_network(specimen)
        drafter, batch = specimen.make(), specimen.batch("delayed")
        if not drafter.capturable:
            pytest.skip("no CUDA graph repeats it")
        features = batch.features_RCF
        other = replace(
            batch,
            lengths_R=batch.lengths_R.flip(0),
            tokens_RC1=batch.tokens_RC1.flip(0),
            features_RCF=None if features is None else features.flip(0),
            anchors_RN=batch.anchors_RN.flip(0, 1),
            paths_RNK=batch.paths_RNK.flip(0),
        )
        drafter.replay(batch)  # tables are made
        counted: list[Counting] = []
        for one in (batch, other):
            with Counting() as counting:
                drafter.replay(one)
            counted.append(counting)
        assert counted[0].launches == counted[1].launches
        assert not any(counting.waits for counting in counted)

    def test_a_float32_copy_learns_over_a_bfloat16_target(self, specimen: Specimen) -> None:
        """A draft that serves in 16 bits is trained in 32, whatever it borrows of the target."""
        needs_network(specimen)
        needs_chains(specimen)
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
        needs_network(specimen)
        drafter = specimen.trained[0]
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
        needs_network(specimen)
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
        needs_network(specimen)
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
        needs_network(specimen)
        scopes = specimen.make().scopes()
        widest = max(scopes, key=lambda name: len(scopes[name].parameters))
        for name, scope in scopes.items():
            if scope.keeps_cache:
                assert _cache_stays_exact(specimen, scope.parameters), name
            elif name == widest:
                assert not _cache_stays_exact(specimen, scope.parameters), name


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


def _behind(logits: Tensor, tokens: Tensor, rank: int) -> Tensor:
    """How far a token's logit lies behind that of this rank, as a share of the row's spread."""
    gap = logits.topk(rank).values[..., -1] - logits.gather(-1, tokens[..., None]).squeeze(-1)
    return gap / logits.std(-1)
