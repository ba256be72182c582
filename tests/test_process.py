"""Training in a process of its own: it trains the same, and no end of either side is a hang."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosched.build.embedded import build_world, load_drafter
from cosched.build.trainer import build_learner, build_scorer, build_trainer, rehearse
from cosched.errors import ConfigError, TrainingError
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.records import Decision, SignalBatch
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.testing.harness import collected, make_requests, serve
from cosched.training.beside import ProcessScorer, ProcessTrainer
from cosched.training.lasting import LastingTrainer

pytestmark = pytest.mark.slow  # a process takes seconds to begin

WORLD = Path(__file__).parent.parent / "tinyworld"
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # the process has fewer threads: sums in another order


@pytest.fixture(scope="module")
def world() -> Any:
    return build_world(load_config(WORLD.parent / "configs" / "sampled.yaml", ["arms=[adapted]"]))


@pytest.fixture(scope="module")
def batch(world: Any) -> SignalBatch:
    drafter, requests = load_drafter(world), make_requests(world.target, 2, 9, 60)
    found = collected(
        world.target, drafter, "delayed", None, serve(world.target, drafter, requests, 2)
    )
    assert found is not None
    return found


def learner(world: Any, background: bool, **adapt: Any) -> tuple[Any, Any]:
    overrides = [f"adapt.trainer.background={background}".lower(), "arms=[adapted]"]
    overrides += [f"adapt.{key}={value}" for key, value in adapt.items()]
    config: Config = load_config(WORLD.parent / "configs" / "sampled.yaml", overrides)
    trainer, scorer = build_learner(config, world.target, load_drafter(world), "sampled")
    if isinstance(trainer, LastingTrainer):  # what is behind it when one is lost: test_lasting.py
        return trainer.learner.trainer, trainer.learner.scorer
    return trainer, scorer


@pytest.fixture(scope="module")
def shared(world: Any) -> Iterator[tuple[ProcessTrainer, ProcessScorer]]:
    trainer, scorer = learner(world, background=True)
    yield trainer, scorer
    trainer.worker.close()


@pytest.fixture
def beside(shared: tuple[ProcessTrainer, ProcessScorer]) -> tuple[ProcessTrainer, ProcessScorer]:
    shared[0].reset()
    return shared


def result_of(job: ProcessTrainer | ProcessScorer) -> Any:
    while (result := job.finished()) is None:
        time.sleep(0.005)
    return result


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def test_it_trains_and_scores_the_same(world: Any, batch: SignalBatch, beside: Any) -> None:
    """From weights that no rehearsal has moved; what serves and what was loaded are scored as given,
    the candidate where it lies."""
    (trainer, scorer), (inline, inline_scorer) = beside, learner(world, background=False)
    first = copied(trainer.weights())
    for name, weight in inline.weights().items():
        assert torch.equal(weight, first[name])
    expected = inline.update(batch, Decision(3))
    assert trainer.update(batch, Decision(3)) is None
    assert trainer.busy
    found = result_of(trainer)
    assert not trainer.busy
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    for name, weight in trainer.weights().items():
        torch.testing.assert_close(weight, inline.weights()[name], **CLOSE)
    asked = [inline.weights(), trainer.weights(), first]
    assert scorer.scores(batch, asked) is None
    assert scorer.busy
    scores = result_of(scorer)
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    assert scores[1] != scores[2]
    for one, other in zip(scores, inline_scorer.scores(batch, asked), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_a_rehearsal_leaves_nothing_but_memory(kind: str, max_batch: int) -> None:
    """SGLang measures what memory is left after it; weights, moments and losses are as without it."""
    config: Config = load_config(
        WORLD.parent / "configs" / "sampled.yaml",
        ["arms=[adapted]", f"drafter.kind={kind}", f"drafter.path=tinyworld/{kind}",
         f"engine.max_batch={max_batch}", "adapt.guard={kind: shadow}"],
    )  # fmt: skip
    world = build_world(config)
    drafter, requests = load_drafter(world), make_requests(world.target, 2, 9, 60)
    batch = collected(
        world.target, drafter, "delayed", None, serve(world.target, drafter, requests, 2)
    )
    assert batch is not None
    losses = []
    for rehearsed in (False, True):
        copy = drafter.clone(torch.float32)
        trainer = build_trainer(config, world.target, copy)
        scorer = build_scorer(config, world.target, copy, "sampled")
        before = copied(trainer.weights())
        if rehearsed:
            rehearse(config, world.target, copy, trainer, scorer)
        assert all(torch.equal(w, before[n]) for n, w in trainer.weights().items())
        losses.append(trainer.update(batch, Decision(3)).losses)
    assert losses[0] == losses[1]


def test_state_goes_there_and_back_to_the_bit(batch: SignalBatch, beside: Any) -> None:
    """What is asked for while an update is under way waits for it, and lets it go."""
    trainer, _ = beside
    first = copied(trainer.weights())
    trainer.update(batch, Decision(2))
    state = trainer.state()
    assert not trainer.busy
    after = copied(trainer.weights())
    trainer.update(batch, Decision(1))
    next_losses = result_of(trainer).losses
    trainer.load(first)
    assert all(torch.equal(w, first[n]) for n, w in trainer.weights().items())
    trainer.restore(state)
    assert all(torch.equal(w, after[n]) for n, w in trainer.weights().items())
    trainer.update(batch, Decision(1))
    assert result_of(trainer).losses == next_losses


def test_weights_that_are_there_already_are_scored_as_they_are(
    world: Any, batch: SignalBatch, beside: Any
) -> None:
    """A look costs the engine no copy of what the process has. The publisher writes a new version into
    the storage of an old one, which is then another."""
    (trainer, scorer), (_, inline) = beside, learner(world, background=False)
    loaded, second, third = (copied(trainer.weights()) for _ in range(3))

    def write(weights: dict[str, Tensor], more: float) -> None:
        for weight in weights.values():
            weight += more

    def check(*asked: Mapping[str, Tensor]) -> None:
        scorer.scores(batch, asked)
        found, expected = result_of(scorer), inline.scores(batch, asked)
        assert len(found) == len(asked)
        for ours, plain in zip(found, expected, strict=True):
            assert ours == pytest.approx(plain, rel=1e-3)

    write(second, 0.01)
    write(third, 0.02)
    check(loaded)
    check(second, loaded)
    check(loaded, third, trainer.weights())
    check(third)
    check(second, third)
    write(third, 0.03)
    check(loaded, third)


def test_a_look_that_nobody_wants_leaves_no_answer_behind(batch: SignalBatch, beside: Any) -> None:
    """Its request has ended: the next answer is that of the next question."""
    trainer, scorer = beside
    scorer.scores(batch, [trainer.weights()])
    scorer.forget()
    assert not scorer.busy
    trainer.reset()
    trainer.update(batch, Decision(1))
    assert len(result_of(trainer).losses) == 1


def test_what_an_update_raises_is_raised_here_once(batch: SignalBatch, beside: Any) -> None:
    trainer, _ = beside
    trainer.update(replace(batch, features_RCF=None), Decision(1))
    with pytest.raises(AssertionError, match="features"):
        result_of(trainer)
    assert not trainer.busy
    trainer.update(batch, Decision(1))
    assert result_of(trainer).num_steps == 1


@pytest.mark.long
def test_threads_are_shared_while_it_works(batch: SignalBatch, world: Any) -> None:
    """With all of them on both sides every kernel waits for the other side."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        trainer, _ = learner(world, background=True)
        trainer.update(batch, Decision(1))
        assert torch.get_num_threads() == 1
        result_of(trainer)
        assert torch.get_num_threads() == 2
        trainer.worker.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_a_process_that_was_killed_is_an_error(world: Any) -> None:
    """The out-of-memory killer takes the trainer: the server must hear of it, not wait for ever, and
    goes on with all of its threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        trainer, _ = learner(world, background=True)
        os.kill(trainer.worker.pid, signal.SIGKILL)
        trainer.load(trainer.weights())
        with pytest.raises(TrainingError, match=r"has ended by itself, with exit code -9"):
            trainer.weights()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_it_ends_with_the_trainer(world: Any) -> None:
    """A sweep makes hundreds of them in one process."""
    trainer, scorer = learner(world, background=True)
    pid = trainer.worker.pid
    os.kill(pid, 0)
    del trainer, scorer
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what it takes")
@pytest.mark.skipif(torch.version.cuda is not None, reason="its libraries are larger")
def test_it_takes_the_memory_that_check_says(shared: Any) -> None:
    config = load_config(WORLD.parent / "configs" / "sampled.yaml", ["engine.device=cpu"])
    beside = load_config(
        WORLD.parent / "configs" / "sampled.yaml",
        ["engine.device=cpu", "adapt.trainer.background=true"],
    )
    without, found = (footprint(one, *sketch(one)) for one in (config, beside))
    assert without.process == 0
    assert found.added - without.added == found.process
    status = Path(f"/proc/{shared[0].worker.pid}/status").read_text()
    (taken,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert 0.7 * found.process < taken * 1024 < 1.4 * found.process


@pytest.mark.long
def test_what_cannot_be_built_there_is_said_here(world: Any) -> None:
    config = load_config(
        WORLD.parent / "configs" / "sampled.yaml",
        ["adapt.trainer.background=true", "adapt.scope.kind=nowhere", "arms=[adapted]"],
    )
    with pytest.raises(ConfigError, match=r"adapt\.scope\.kind"):
        build_learner(config, world.target, load_drafter(world), "sampled")
