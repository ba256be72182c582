"""A trainer whose process is killed or hangs: another takes over, and nothing is trained on twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosched.build.embedded import build_arm, build_world
from cosched.errors import TrainingError
from cosched.records import IDLE_TICK, Decision
from cosched.settings.load import load_config
from cosched.telemetry.run_folder import NoEvents
from cosched.training.lasting import LastingLearner, LastingScorer, LastingTrainer
from cosched.training.process import LostError, Worker
from tests.helpers.paths import ROOT

WEIGHTS = {"w": torch.zeros(2)}


class Process:
    """A trainer and a scorer, as they are seen of a process that may be lost at any call."""

    def __init__(self) -> None:
        self.worker = self
        self.loaded: list[Any] = []
        self.killed = False
        self.error: Exception | None = None
        self.result: Any = None
        self.busy = False

    def kill(self) -> None:
        self.killed = True

    def _meet(self) -> None:
        if self.error is not None:
            raise self.error

    def update(self, _batch: Any, _decision: Decision) -> None:
        self._meet()
        self.busy = True

    def finished(self) -> Any:
        self._meet()
        return self.result

    def load(self, weights: Any) -> None:
        self._meet()
        self.loaded.append(weights)

    def weights(self) -> Any:
        return WEIGHTS

    def scores(self, _batch: Any, _weights: Any) -> None:
        self._meet()

    def state(self) -> Any:
        self._meet()
        return {"weight.w": torch.ones(2)}


class Starts:
    """Makes processes; while ``held`` the next one is not there yet, and may fail."""

    def __init__(self) -> None:
        self.made: list[Process] = []
        self.held = False
        self.error: Exception | None = None

    def __call__(self) -> Any:
        while self.held:
            time.sleep(0.001)
        if self.error is not None:
            raise self.error
        self.made.append(Process())
        return self.made[-1], self.made[-1]


def lasting(starts: Starts, restarts: int = 2, serving: Any = WEIGHTS) -> LastingTrainer:
    return LastingTrainer(LastingLearner(starts, lambda: serving, restarts))


def until(there: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_another_takes_over_with_what_serves() -> None:
    """It is busy until then, so that nothing is given to it and nothing judged; nobody waits."""
    starts = Starts()
    trainer = lasting(starts)
    starts.held = True
    trainer.update(None, Decision(1))  # type: ignore[arg-type]
    starts.made[0].error = LostError("it has ended, with exit code -9")
    assert trainer.finished() is None
    assert starts.made[0].killed
    assert trainer.busy
    assert trainer.learner.trouble == (
        "it has ended, with exit code -9; it is started again (1 of 2)"
    )
    trainer.load({"w": torch.ones(2)})  # what serves will be loaded
    trainer.reset()
    with pytest.raises(LostError, match="started again"):
        trainer.state()
    starts.held = False
    until(lambda: not trainer.busy)
    assert trainer.learner.trouble is None
    assert starts.made[1].loaded == [WEIGHTS]
    assert trainer.state().keys() == {"weight.w"}


def test_where_the_loaded_draft_serves_there_is_nothing_to_load() -> None:
    starts = Starts()
    trainer = lasting(starts, serving=None)
    starts.made[0].error = LostError("gone")
    trainer.update(None, Decision(1))  # type: ignore[arg-type]
    until(lambda: not trainer.busy)
    assert starts.made[1].loaded == []


def test_it_gives_up_after_so_many_losses_in_a_row() -> None:
    """And not after so many in a month: an update that is done makes them good."""
    starts = Starts()
    trainer = lasting(starts)
    for _ in range(2):
        for _ in range(2):
            starts.made[-1].error = LostError("gone")
            trainer.update(None, Decision(1))  # type: ignore[arg-type]
            until(lambda: not trainer.busy)
        starts.made[-1].result = object()
        assert trainer.finished() is not None
    starts.error = RuntimeError("no such file")
    starts.made[-1].error = LostError("gone")
    with pytest.raises(TrainingError, match="cannot be started: no such file; lost 3 times since"):
        trainer.update(None, Decision(1)), until(lambda: not trainer.busy)  # type: ignore[arg-type]
    assert not trainer.busy
    assert trainer.finished() is None
    assert trainer.learner.trouble is None  # it is a failure now


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")]
)
def test_one_that_has_no_memory_left_is_replaced(error: Exception) -> None:
    starts = Starts()
    trainer = lasting(starts)
    starts.made[0].error = error
    trainer.update(None, Decision(1))  # type: ignore[arg-type]
    assert starts.made[0].killed
    assert "memory" in (trainer.learner.trouble or "")
    until(lambda: not trainer.busy)


def test_a_mistake_is_no_loss() -> None:
    """What the update itself raises would be raised again."""
    starts = Starts()
    trainer = lasting(starts)
    starts.made[0].error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        trainer.finished()
    assert not starts.made[0].killed


def test_a_look_that_is_lost_is_let_go() -> None:
    starts = Starts()
    trainer = lasting(starts)
    scorer = LastingScorer(trainer.learner)
    starts.made[0].error = LostError("gone")
    starts.held = True
    scorer.scores(None, [WEIGHTS])  # type: ignore[arg-type]
    assert not scorer.busy
    assert scorer.finished() is None
    assert trainer.busy
    starts.held = False
    until(lambda: not trainer.busy)


def nothing_to_do() -> Any:
    """For a process that only answers: to be built there."""
    return _Idle(), None


class _Idle:
    def weights(self) -> Any:
        return {"w": torch.zeros(1)}

    def update(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.long
def test_a_process_that_hangs_is_killed_after_its_time() -> None:
    """Stopped, it neither reads nor answers: what is sent, more than a pipe holds, is not waited for."""
    worker = Worker(nothing_to_do, limit_s=1.0)
    worker.ask("update", torch.zeros(10)).result()
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()
    pending = worker.ask("update", torch.zeros(1 << 22))
    assert not pending.done
    assert time.monotonic() - started < 0.9
    with pytest.raises(LostError, match="no answer in 1 s and was killed"):
        pending.result()
    assert time.monotonic() - started < 5
    with pytest.raises(LostError):
        worker.ask("update").result()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


@pytest.mark.slow
@pytest.mark.long
def test_a_process_can_yield_to_what_answers_clients() -> None:
    """By what the system calls its niceness."""
    worker = Worker(nothing_to_do, niceness=3)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(own + 3, 19)
    worker.close()


@pytest.mark.slow
def test_a_process_ends_when_its_engine_was_killed() -> None:
    """In the middle of an update of ten minutes it was left behind until that was done."""
    program = (
        "import time\n"
        "from cosched.training.process import Worker\n"
        "from tests.helpers.busy import build\n"
        "worker = Worker(build)\n"
        "worker.ask('update')\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    engine = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert engine.stdout is not None
    with engine.stdout:
        pid = int(engine.stdout.readline())
        os.kill(pid, 0)
        engine.kill()
        engine.wait()
    until(lambda: _is_dead(pid))


def _is_dead(pid: int) -> bool:
    """Whether it has ended, also where nobody has asked for its exit code."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def arm(tmp_path: Path, *overrides: str) -> Any:
    config = load_config(
        Path(__file__).parents[1] / "configs" / "sampled.yaml",
        [
            "arms=[adapted]", "adapt.trainer.background=true", "adapt.policy.rounds=4",
            "adapt.trainer.restarts=50",
            "adapt.guard={kind: finite}", "adapt.replay.fresh=true", "workload.temperature=0",
            "workload.max_new_tokens=1500", "workload.max_prompts=1", f"run.dir={tmp_path}",
            *overrides,
        ],
    )  # fmt: skip
    world = build_world(config)
    return world, build_arm(world, "adapted", NoEvents())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_decoding_goes_on_while_the_trainer_is_lost_and_found(tmp_path: Path, how: int) -> None:
    """The real one, in the middle of a text: rounds go on with the last good draft, the text is that
    of no accident, another process trains on, and no anchor is given to two updates."""
    limit = 60 if how == signal.SIGKILL else 2  # seconds; with more losses than meant it holds too
    world, one = arm(tmp_path, f"adapt.trainer.limit_seconds={limit}")
    cosched, learner = one.coscheduler, one.coscheduler.trainer.learner
    trained: list[int] = []  # anchors of the text that is decoded
    versions, said, hit = [], set(), []
    update, first = cosched.trainer.update, learner.trainer.worker.pid

    def watched(batch: Any, decision: Decision) -> None:
        drawn = batch.weights_RNK.sum(-1) > 0
        trained.extend((batch.starts_R[:, None] + batch.anchors_RN)[drawn].tolist())
        update(batch, decision)

    def decoded() -> list[int]:
        trained.clear()
        tokens: list[int] = []
        for finished in one.engine.rounds(world.requests):
            if cosched.version >= 2 and not hit:
                os.kill(first, how)
                hit.append(first)
            versions.append(cosched.version)
            said.add((learner.trouble or "").partition(";")[0])
            for done in finished:
                tokens = list(done.tokens)
        while cosched.busy:
            time.sleep(0.01)
            cosched.on_round(IDLE_TICK)
        assert len(trained) == len(set(trained)) > 0, "an anchor was given to two updates"
        return tokens

    cosched.trainer.update = watched
    tokens = decoded()
    while learner.trainer.worker.pid == first:  # it decoded faster than anything was lost
        assert decoded() == tokens
    assert any(ENDS[how] in one for one in said)
    updates, version = cosched.counters.updates, cosched.version
    assert decoded() == tokens
    assert cosched.counters.updates > updates
    assert cosched.version > version >= 2
    assert versions == sorted(versions)
    alone = build_arm(world, "frozen", NoEvents())
    assert [list(done.tokens) for done in alone.engine.generate(world.requests)] == [tokens]
    learner.trainer.worker.close()


ENDS = {
    signal.SIGKILL: "has ended by itself, with exit code -9",
    signal.SIGSTOP: "gave no answer in 2 s and was killed",
}
