"""Who captures updates: what an experiment's settings make of it, and what is captured before it begins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cosched.build import trainer as building
from cosched.build.embedded import build_world, load_drafter
from cosched.errors import ConfigError
from cosched.loop.replay import ReplayBuffer
from cosched.memory.capturing import frames_of
from cosched.memory.footprint import losses_of
from cosched.memory.full_size import replay_limits
from cosched.memory.sketch import sketch
from cosched.records import Decision
from cosched.settings.load import load_config
from cosched.testing.captured import by_doing
from cosched.testing.harness import make_requests, serve
from cosched.training.captured import Captured
from tests.helpers.cli import run_cli
from tests.helpers.experiments import write
from tests.helpers.guarded_runs import SAMPLED

AUTO = "adapt.trainer.cuda_graph=auto"
ALWAYS = "adapt.trainer.cuda_graph=always"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["eagle3", *(pytest.param(k, marks=pytest.mark.long) for k in ("dflash", "pard"))]
)
@pytest.mark.parametrize(
    "own",
    [
        (),
        ("adapt.loss.kind=negative_log_target_only",),
        ("adapt.loss.rows=accepted",),
        ("adapt.guard.kind=shadow",
         "adapt.objective={kind: hedge, experts: [{}, {loss: {kind: reverse_kl}}]}"),
    ],
    ids=["plain", "at a temperature", "served rows", "experts"],
)  # fmt: skip
def test_all_that_comes_has_been_captured_at_the_start(
    kind: str, own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rehearsal has every frame with every objective, of the types that the buffer's batches are of:
    what is captured later takes memory that SGLang has given away by then, and a second's standstill."""
    monkeypatch.setattr(
        building, "frames_of", lambda *given: frames_of(*given[:4], "cuda", *given[5:])
    )
    monkeypatch.setattr(building, "Captured", partial(Captured, record=by_doing))
    config = load_config(
        SAMPLED,
        ["arms=[adapted]", AUTO, f"drafter.kind={kind}", f"drafter.path=tinyworld/{kind}",
         "engine.max_batch=3", "adapt.replay.window=100", *own],
    )  # fmt: skip
    world = build_world(config)
    drafter = load_drafter(world)
    copy = drafter.clone(building.torch.float32)
    trainer: Any = building.build_trainer(config, world.target, copy)
    scorer = building.build_scorer(config, world.target, copy, "sampled")
    building.rehearse(config, world.target, copy, trainer, scorer)
    captured = set(trainer._captured._passes)
    objectives = range(len(losses_of(config)))
    assert len(captured) == 3 * len(objectives)
    limits = replay_limits(config, world.target, drafter)
    for count in (1, 2, 3):
        buffer = ReplayBuffer(limits, config.loss_settings.rows, config.drafter_settings.window)
        requests = make_requests(world.target, count=count, prompt=9, new=40)
        for round_ in serve(world.target, drafter, requests, max_batch=count):
            if round_.finished:
                break
            buffer.collect(round_)
        batch = buffer.sample()
        assert batch is not None
        for objective in objectives:
            trainer.update(batch, Decision(1, objective=objective))
    assert set(trainer._captured._passes) == captured


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ((), None),
        (("adapt.trainer.cuda_graph=never",), None),
        (("adapt.trainer.zero_stage=1",), "adapt.trainer.zero_stage = 1"),
        (("adapt.trainer.gradient_accumulation_steps=2",), "gradient_accumulation_steps"),
        (("engine.max_batch=2", "adapt.scope={kind: lora, state: per_request}"), "per_request"),
        (("adapt.loss.vocab_top_k=8",), "adapt.loss.vocab_top_k"),
    ],
)
def test_what_stands_against_it_is_named(own: tuple[str, ...], says: str | None) -> None:
    """``auto`` does without then, and ``always`` says why."""
    arms = "arms=[adapted]"
    auto = load_config(SAMPLED, [arms, AUTO, *own])
    target, drafter = sketch(auto)
    found = frames_of(auto, target, drafter, losses_of(auto), "cuda")
    assert (found is None) == bool(own)
    assert frames_of(auto, target, drafter, losses_of(auto), "cpu") is None
    if says is not None:
        always = load_config(SAMPLED, [arms, *own, ALWAYS])
        with pytest.raises(ConfigError, match=f"cuda_graph: always, but .*{says}.*; use auto"):
            frames_of(always, target, drafter, losses_of(always), "cuda")


def test_several_ranks_and_strange_drafters_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(SAMPLED, ["arms=[adapted]", AUTO])
    target, drafter = sketch(config)
    losses = losses_of(config)
    assert frames_of(config, target, drafter, losses, "cuda", 2) is None
    monkeypatch.setattr(type(drafter), "capturable", False)
    assert frames_of(config, target, drafter, losses, "cuda") is None


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_cpu_captures_nothing(tmp_path: Path, settings: dict, verb: str) -> None:
    """Who asks for it there is told in one line, before anything is loaded."""
    code, _, err = run_cli(verb, "-c", write(tmp_path, settings), ALWAYS, "engine.device=cpu")
    assert (code, "Traceback" in err) == (2, False)
    assert "adapt.trainer.cuda_graph: always, but engine.device = cpu is no GPU" in err
    assert not (tmp_path / "runs").exists()
