"""What every drafter owes: what it says of itself, what its files hold, and three contracts more.

Serving, learning and adapters are stated in modules of their own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from cosched.engines.sglang.worker.algorithms import has_worker
from cosched.protocols import Drafter
from cosched.registry import DRAFTERS
from cosched.testing.adapters import AdapterContract
from cosched.testing.learning import LearningContract
from cosched.testing.lengths import changing_lengths
from cosched.testing.registered import OneThread, registered
from cosched.testing.serving import ServingContract
from cosched.testing.specimen import (
    NUM_DRAFT_TOKENS,
    Feeder,
    MetaTarget,
    Specimen,
    example_keys,
    make_texts,
    specimen,
)

if TYPE_CHECKING:
    from pathlib import Path


CONDITIONING = {"chain": "chain", "block": "block", "parallel": "block", "none": "none"}
"""What a draft of each type is conditioned on."""


class DrafterContract(ServingContract, LearningContract, AdapterContract, OneThread):
    """Every example of every registered drafter, or of those in ``names``.

    The first example of each is quick to test, the others are marked slow. What takes long
    (``takes_long``) is quick for one drafter of each conditioning and marked long for what is not the
    first example; there each meets one of the draft lengths, in turn, and not all of them.
    """

    names: ClassVar[tuple[str, ...] | None] = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        cases: list[Any] = []
        takes_long = getattr(metafunc.function, "takes_long", False)
        lengths = changing_lengths() if "length" in metafunc.fixturenames else []
        tested: set[str | None] = set()  # in what takes long, quickly
        for plugin in registered(DRAFTERS, self.names):
            conditioning = CONDITIONING.get(plugin.cls.draft_type)
            again = takes_long and conditioning in tested
            tested.add(conditioning)
            keys = example_keys(plugin)
            assert keys, f"{plugin.name} has no example to test"
            for number, key in enumerate(keys):
                marks = [pytest.mark.slow] if number or again else []
                if number and takes_long:
                    marks.append(pytest.mark.long)
                name = f"{plugin.name}-{key}".replace(" ", "_")
                example = pytest.param(specimen(plugin, key), id=name, marks=marks)
                met = [lengths[number % len(lengths)]] if number and lengths else lengths
                cases += [_both(example, length) for length in met] or [example]
        metafunc.parametrize("specimen, length" if lengths else "specimen", cases)

    def test_it_is_described(self, specimen: Specimen) -> None:
        """Its first line says what it is; signals and sizes are what its settings asked for."""
        drafter = specimen.make()
        assert specimen.plugin.summary
        assert drafter.num_draft_tokens == 3
        layers = drafter.signal.feature_layers
        assert all(0 <= layer <= specimen.target.num_layers for layer in layers)
        assert (drafter.signal.conditioning == "none") == (drafter.network() is None)
        if drafter.network() is not None:
            owed = ("scopes", "clone", "state_width", "replay_states", "project")
            assert not [name for name in owed if not _gives(drafter, name)], "a network has these"
        if not specimen.is_composed:  # what it is made of says it
            assert CONDITIONING[specimen.plugin.cls.draft_type] == drafter.signal.conditioning
        costs = [drafter.cost(number) for number in range(1, NUM_DRAFT_TOKENS + 1)]
        assert 0 <= costs[0] <= costs[-1]
        assert costs == sorted(costs)
        assert drafter.cache_bytes_per_token >= 0
        assert all(isinstance(reason, str) for reason in drafter.not_for_sglang())
        worker = specimen.plugin.cls.sglang
        assert worker is None or has_worker(worker), "its worker in SGLang is in no module"

    def test_what_it_saves_it_loads(self, specimen: Specimen, tmp_path: Path) -> None:
        """Saved and loaded, it has the same weights and proposals, to the bit."""
        drafter = specimen.trained[0]
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


def _both(one: Any, other: Any) -> Any:
    """Two parameters as one, with the marks of both."""
    return pytest.param(
        *one.values, *other.values, id=f"{one.id}-{other.id}", marks=(*one.marks, *other.marks)
    )


def _gives(drafter: Drafter, name: str) -> bool:
    """Whether a member is the drafter's, and not only what its role says of it."""
    return inspect.getattr_static(type(drafter), name, None) not in {None, vars(Drafter)[name]}


def _shapes(drafter: Drafter) -> dict[str, torch.Size]:
    network = drafter.network()
    assert network is not None
    return {name: parameter.shape for name, parameter in network.named_parameters()}
