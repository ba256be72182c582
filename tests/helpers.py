"""Engines over given parts, without a configuration file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cosched.coscheduler import Coscheduler
from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.judges import GreedyJudge, Judge
from cosched.engines.embedded.request import GenerationRequest
from cosched.engines.embedded.rows import LiveRows
from cosched.guard import FiniteGuard
from cosched.protocols import Drafter, LossSettings
from cosched.publish import InPlacePublisher
from cosched.records import Decision, Rows, Snapshot, VerifyRound
from cosched.replay import ReplayBuffer, ReplayLimits
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.scope import parameters_of
from losses.divergence import ForwardKL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.engines.embedded.target import Target


class Watcher:
    """An observer that keeps every round."""

    def __init__(self) -> None:
        self.rounds: list[VerifyRound] = []

    def on_round(self, round_: VerifyRound) -> None:
        self.rounds.append(round_)


class NoEvents:
    """A sink for tests that do not look at events."""

    def emit(self, kind: str, **fields: Any) -> None:
        pass


class Every:
    """Trains after every n-th round."""

    def __init__(self, rounds: int, num_steps: int = 1) -> None:
        self.rounds = rounds
        self.num_steps = num_steps

    def decide(self, snapshot: Snapshot) -> Decision:
        due = snapshot.rounds_since_update >= self.rounds
        return Decision(self.num_steps if due else 0)


def make_requests(
    target: Target, count: int, prompt: int, new: int, seed: int = 3
) -> list[GenerationRequest]:
    """Random prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        GenerationRequest(
            f"r{i}",
            torch.randint(1, target.vocab_size, (prompt + 2 * i,), generator=generator),
            new,
        )
        for i in range(count)
    ]


def make_engine(
    target: Target,
    drafter: Drafter | None,
    requests: Sequence[GenerationRequest],
    max_batch: int = 1,
    judge: Judge | None = None,
    observer: Any = None,
    window: int | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    recorder: Any = None,
    seed: int = 0,
) -> EmbeddedEngine:
    longest = max(request.max_length for request in requests)
    layers = drafter.signal.feature_layers if drafter else ()
    extra = drafter.num_draft_tokens if drafter else 0
    return EmbeddedEngine(
        rows=LiveRows(target, max_batch, longest + extra + 1, layers),
        judge=judge or GreedyJudge(),
        drafter=drafter,
        options=EngineOptions(max_batch, longest, seed, stop_tokens, window),
        device=target.device,
        observer=observer,
        recorder=recorder,
    )


def decode(engine: EmbeddedEngine, requests: Sequence[GenerationRequest]) -> dict[str, list[int]]:
    return {done.request.id: list(done.tokens) for done in engine.generate(requests)}


def make_trainer(
    target: Target, drafter: Drafter, zero_stage: int = 1, lr: float = 1e-3, max_norm: float = 1.0
) -> DeepSpeedTrainer:
    copy = drafter.clone(torch.float32)
    settings = LossSettings(kind="forward_kl")
    batch_loss = BatchLoss(copy, ForwardKL(settings), target.head, "hidden")
    return DeepSpeedTrainer(batch_loss, parameters_of(copy, "full"), zero_stage, lr, max_norm)


def make_coscheduler(
    target: Target,
    drafter: Drafter,
    every: int,
    rows: Rows = "delayed",
    lr: float = 1e-3,
    reset: bool = False,
    window: int | None = None,
) -> Coscheduler:
    limits = ReplayLimits(
        window=64,
        anchors=32,
        path=drafter.num_draft_tokens,
        max_tokens=100_000,
        max_bytes=1 << 28,
        feature_row_bytes=len(drafter.signal.feature_layers) * target.hidden_size * 4,
        teacher_row_bytes=target.hidden_size * 4,
    )
    network = drafter.network()
    assert network is not None
    return Coscheduler(
        buffer=ReplayBuffer(limits, rows, window),
        policy=Every(every),
        trainer=make_trainer(target, drafter, lr=lr),
        guard=FiniteGuard(),
        publisher=InPlacePublisher(network, target.model, target_check_every=1),
        sink=NoEvents(),
        reset_when_finished=reset,
    )
