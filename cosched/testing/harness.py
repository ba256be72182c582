"""Small worlds to test in: a random target, and engines over given parts without a file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cosched.coscheduler import Coscheduler
from cosched.engines.embedded import attention
from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verifiers import GreedyVerifier, Verifier
from cosched.engines.request import GenerationRequest
from cosched.guard.guard import FiniteGuard
from cosched.loop.publish import InPlacePublisher
from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.protocols import Drafter, Loss, LossSettings
from cosched.records import Decision, Rows, Snapshot, VerifyRound
from cosched.registry import LOSSES
from cosched.telemetry.run_folder import NoEvents
from cosched.training.deepspeed_trainer import DeepSpeedTrainer
from cosched.training.micro_step import BatchLoss
from cosched.training.scope import parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.engines.embedded.engine import Admit
    from cosched.loop.lengths import DraftLengths
    from cosched.loop.roles import RoundObserver
    from cosched.records import SignalBatch


def make_target(
    vocab_size: int = 64, seed: int = 0, std: float = 0.25, dtype: torch.dtype = torch.float32
) -> Target:
    """A random Qwen3 whose next-token distributions are far from uniform and from one another."""
    torch.manual_seed(seed)
    model: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
    model.set_attn_implementation(attention.NAME)
    return Target(model.to(dtype))


class Watcher:
    """An observer that keeps every round, and passes it on to another."""

    def __init__(self, behind: Coscheduler | None = None) -> None:
        self.rounds: list[VerifyRound] = []
        self._behind = behind

    @property
    def version(self) -> int:
        return self._behind.version if self._behind else 0

    def on_round(self, round_: VerifyRound) -> None:
        self.rounds.append(round_)
        if self._behind is not None:
            self._behind.on_round(round_)


class MadeUpClock:
    """Seconds that differ from one look to the next, by a rule: now this length is cheap, now that."""

    def __init__(self) -> None:
        self._now = self._looks = 0

    def __call__(self) -> float:
        self._looks += 1
        self._now += 1 + self._looks * self._looks // 7 % 11
        return self._now


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
    verifier: Verifier | None = None,
    observer: RoundObserver | None = None,
    window: int | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    recorder: Any = None,
    seed: int = 0,
    admit: Admit | None = None,
    rows: type[LiveRows] = LiveRows,
    lengths: DraftLengths | None = None,
) -> EmbeddedEngine:
    """An embedded engine that has room for these requests; greedy unless a verifier is given.

    With ``lengths`` time is made up, so that what is seen of it repeats.
    """
    longest = max(request.max_length for request in requests)
    layers = drafter.signal.feature_layers if drafter else ()
    extra = drafter.num_verified if drafter else 0
    return EmbeddedEngine(
        rows=rows(target, max_batch, longest + extra + 1, layers),
        verifier=verifier or GreedyVerifier(),
        drafter=drafter,
        options=EngineOptions(max_batch, longest, seed, stop_tokens, window),
        device=target.device,
        observer=observer,
        recorder=recorder,
        admit=admit,
        lengths=lengths,
        clock=MadeUpClock() if lengths else time.perf_counter,
    )


def decode(engine: EmbeddedEngine, requests: Sequence[GenerationRequest]) -> dict[str, list[int]]:
    """The tokens of every request, by its id."""
    return {done.request.id: list(done.tokens) for done in engine.generate(requests)}


def serve(
    target: Target,
    drafter: Drafter,
    requests: Sequence[GenerationRequest],
    max_batch: int = 1,
    window: int | None = None,
) -> list[VerifyRound]:
    """The rounds of decoding these requests with a draft that stays as it is."""
    watcher = Watcher()
    decode(
        make_engine(target, drafter, requests, max_batch, observer=watcher, window=window), requests
    )
    return watcher.rounds


def make_trainer(
    target: Target,
    drafter: Drafter,
    zero_stage: int = 1,
    lr: float = 1e-3,
    max_norm: float = 1.0,
    scope: str = "full",
    loss: Loss | None = None,
    chunk_rows: int | None = None,
) -> DeepSpeedTrainer:
    """A DeepSpeed trainer of a draft, with the forward KL unless a loss is given."""
    copy = drafter.clone(torch.float32)
    chosen: Loss = loss or LOSSES.get("forward_kl")(LossSettings(kind="forward_kl"))
    batch_loss = BatchLoss(copy, chosen, target.head, "hidden", chunk_rows=chunk_rows)
    return DeepSpeedTrainer(batch_loss, parameters_of(copy, scope), zero_stage, lr, max_norm)


def make_buffer(
    target: Target,
    drafter: Drafter,
    rows: Rows,
    draft_window: int | None,
    window: int = 64,
    anchors: int = 32,
) -> ReplayBuffer:
    """A replay buffer for what that drafter asks for."""
    limits = ReplayLimits(
        window=window,
        anchors=anchors,
        path=drafter.num_draft_tokens,
        max_tokens=1 << 20,
        max_bytes=1 << 28,
        feature_row_bytes=len(drafter.signal.feature_layers) * target.hidden_size * 4,
        teacher_row_bytes=target.hidden_size * 4,
    )
    return ReplayBuffer(limits, rows, draft_window)


def collected(
    target: Target,
    drafter: Drafter,
    rows: Rows,
    draft_window: int | None,
    rounds: Sequence[VerifyRound],
) -> SignalBatch | None:
    """What a buffer that forgets nothing makes of rounds, up to the first request that ends."""
    buffer = make_buffer(target, drafter, rows, draft_window, window=400, anchors=10_000)
    for round_ in rounds:
        if round_.finished:
            break  # a finished request leaves the buffer
        buffer.collect(round_)
    return buffer.sample()


def make_coscheduler(
    target: Target,
    drafter: Drafter,
    every: int,
    rows: Rows = "delayed",
    lr: float = 1e-3,
    reset: bool = False,
    window: int | None = None,
) -> Coscheduler:
    """A co-scheduler that trains and publishes every few rounds; without a network it counts."""
    network = drafter.network()
    trains = network is not None
    return Coscheduler(
        buffer=make_buffer(target, drafter, rows, window),
        policy=Every(every),
        trainer=make_trainer(target, drafter, lr=lr) if trains else None,
        guard=FiniteGuard(),
        publisher=(InPlacePublisher.of_modules(network, target.model) if trains else None),
        sink=NoEvents(),
        reset_when_finished=reset,
    )
