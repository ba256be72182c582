"""Teaching a draft on recorded answers: the target's rows are read, not computed again.

Letters: R answers, C rows of a context, T tokens of an answer with its question, N anchors,
K drafted tokens, F fused feature width, H hidden width, V target vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosched.protocols import LossSettings
from cosched.realworld.folders import new_file
from cosched.realworld.recipes import NUM_FREQUENT, NUM_OTHERS, Classroom
from cosched.tinyworld.distill import batch_of_texts
from cosched.tinyworld.optimize import BETAS, rate_share, take_step
from cosched.training.micro_step import BatchLoss
from losses.acceptance import NegativeLogAcceptance
from losses.divergence import ForwardKL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from cosched.engines.embedded.target import Target
    from cosched.realworld.recipes import AnyDrafter, Recipe
    from cosched.realworld.recorded import Recorded
    from cosched.records import SignalBatch

LEARNING_RATE = 2e-3
WARMUP_STEPS = 40
DECAY_SHARE = 0.6  # of the steps, at the end
EVERY = 3  # which places of an answer acceptance is measured at
STEPS_KEPT = 50  # what a killed process loses at most


def batch_of(answers: Sequence[Recorded], anchors_RN: Sequence[Tensor], path: int) -> SignalBatch:
    """Whole answers as contexts, with the text itself as the path behind every anchor.

    Answers may have fewer anchors than others; what is missing counts nothing.
    """
    tokens_RC1 = pad_sequence([answer.tokens_T for answer in answers], batch_first=True)
    features_RCF = pad_sequence([answer.features_TF for answer in answers], batch_first=True)
    hidden_RCH = pad_sequence([answer.hidden_TH for answer in answers], batch_first=True)
    places_RN = pad_sequence(list(anchors_RN), batch_first=True, padding_value=1)
    counts_RN = pad_sequence(
        [torch.ones(len(places_N)) for places_N in anchors_RN], batch_first=True
    )
    batch = batch_of_texts(tokens_RC1, features_RCF.float(), hidden_RCH.float(), places_RN, path)
    return replace(
        batch,
        lengths_R=torch.tensor([len(answer.tokens_T) - 1 for answer in answers]),
        weights_RNK=batch.weights_RNK * counts_RN[..., None],
    )


def places(answer: Recorded, path: int) -> Tensor:
    """Where a path of that many tokens fits: from the last token of the question on."""
    first = answer.num_prompt - 1
    return torch.arange(first, max(first, len(answer.tokens_T) - path))


def teach(
    target: Target,
    answers: Sequence[Recorded],
    words_V: Tensor,
    recipe: Recipe,
    seed: int,
    kept: Path,
    advance: Callable[[int, str], None],
) -> tuple[AnyDrafter, float]:
    """A draft, trained as its recipe says, and the seconds it took.

    What ``kept`` has of an earlier attempt is gone on from, its seconds included. The loss is forward
    KL while the learning rate is whole, and the negative log of the acceptance while it falls: what
    counts in the end, and of no use to a beginner (``losses/acceptance.py``). From the same draft, 80
    steps of it brought the acceptance length on chat to 1.71, of KL to 1.68.
    ``advance(steps, message)`` is called after every step. Answers and anchors of a step depend on
    its number and the seed alone.

    Raises:
        RealWorldError: ``kept`` cannot be written.
    """
    torch.manual_seed(seed)
    classroom = Classroom(target, words_V, NUM_FREQUENT, NUM_OTHERS)
    student = recipe.begin(target, classroom, words_V)
    head = classroom.head if recipe.borrows_head else target.head
    kinds = {"forward_kl": ForwardKL, "negative_log_acceptance": NegativeLogAcceptance}
    whole, falling = (
        BatchLoss(
            student,
            make(LossSettings(kind=kind, position_decay=recipe.position_decay)),
            head,
            "hidden",
            precision="auto",
        )
        for kind, make in kinds.items()
    )
    network = whole.network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=BETAS, weight_decay=0.01, fused=True)
    done, steps, spent = 0, recipe.steps, 0.0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        done, spent = state["steps"], state["seconds"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        advance(done, "gone on from where it was left")
    for step in range(done, steps):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed((seed << 32) + step)
        classroom.call(generator)
        chosen = [answers[i] for i in _turn(len(answers), recipe.batch, step, seed)]
        anchors = [
            _some(places(a, recipe.num_draft_tokens), recipe.anchors, generator) for a in chosen
        ]
        batch_loss = falling if step / steps > 1 - DECAY_SHARE else whole
        loss = batch_loss(batch_of(chosen, anchors, recipe.num_draft_tokens))
        rate = LEARNING_RATE * rate_share(step, step / steps, WARMUP_STEPS, DECAY_SHARE)
        take_step(loss, trained, (optimizer,), rate)
        seconds = time.perf_counter() - started
        spent += seconds
        advance(1, f"loss {loss.item():.3f}, {seconds:.1f} s a step")
        if (step + 1) % STEPS_KEPT == 0 and step + 1 < steps:
            _keep(kept, step + 1, spent, network, optimizer)
    kept.unlink(missing_ok=True)
    network.eval()
    return recipe.finish(student, target), spent


def _turn(number: int, batch: int, step: int, seed: int) -> list[int]:
    """Which answers teach in a step: all of them once, in another order each time through."""
    wanted = range(step * batch, (step + 1) * batch)
    orders = {
        turn: torch.randperm(number, generator=torch.Generator().manual_seed(seed + turn)).tolist()
        for turn in {place // number for place in wanted}
    }
    return [orders[place // number][place % number] for place in wanted]


def _some(places_N: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return places_N[torch.randperm(len(places_N), generator=generator)[:number]]


def _keep(
    path: Path,
    steps: int,
    seconds: float,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    weights, moments = network.state_dict(), optimizer.state_dict()
    kept = {"steps": steps, "seconds": seconds, "network": weights, "optimizer": moments}
    with new_file(path) as partial:
        torch.save(kept, partial)


@torch.no_grad()
def acceptance(
    target: Target,
    drafter: AnyDrafter,
    answers: Iterable[Recorded],
    num_drafted: int,
    temperature: float,
) -> Tensor:
    """Expected acceptance ``sum_v min(p, q)`` of each drafted token ``[N, K]``.

    At every third place of the answers, which are the path; p is the target's distribution over all
    of its words at that temperature, q the draft's.
    """
    overlaps: list[Tensor] = []
    for answer in answers:
        anchors_N = places(answer, num_drafted)[::EVERY]
        if not len(anchors_N):
            continue
        batch = batch_of([answer], [anchors_N], num_drafted)
        student = (drafter.replay(batch)[0] / temperature).softmax(-1)
        teacher = (target.head(batch.teacher_RNKX[0]) / temperature).softmax(-1)
        ids = drafter.target_ids()
        if ids is not None:
            teacher = teacher.index_select(-1, ids)
        overlaps.append(torch.minimum(student, teacher).sum(-1))
    return torch.cat(overlaps)
