"""``cosched tinyworld build``: text, tokenizer, target, draft, prompts and model card, in one go."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from cosched.engines.embedded.target import Target
from cosched.errors import TinyWorldError
from cosched.protocols import LossSettings
from cosched.publish import checksum
from cosched.tinyworld.card import CardFacts, write_card
from cosched.tinyworld.corpus import DOMAINS
from cosched.tinyworld.distill import DistillPlan, acceptance_by_step, distill
from cosched.tinyworld.pretrain import STAGES, loss_by_position, pretrain
from cosched.tinyworld.prompts import write_texts
from cosched.tinyworld.tokens import load_tokens, tokenize_corpus, train_tokenizer
from cosched.training.micro_step import BatchLoss
from drafters.eagle3 import Eagle3Config, Eagle3Drafter
from losses.divergence import ForwardKL

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

EDGES = (0, 256, 512, 1024, 2048, 4000)
NUM_DRAFT_TOKENS = 3


def build(directory: Path, seed: int, threads: int, share: float, progress: Progress) -> None:
    """Train everything and write it under ``directory``; finished steps are not repeated.

    ``share`` of the tokens are trained on: 1 makes the tiny world, less tries the machinery.

    Raises:
        TinyWorldError: the folder cannot be made, or this machine lacks a domain's text.
    """
    torch.set_num_threads(threads)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TinyWorldError(f"{directory} cannot be made: {error.strerror}") from error
    started = time.perf_counter()
    tokens = directory / "tokens"
    if not (directory / "target" / "tokenizer.json").exists():
        train_tokenizer(directory / "target")
    tokenizer = AutoTokenizer.from_pretrained(directory / "target")
    if not tokens.exists():
        tokenize_corpus(tokenizer, tokens)
    write_texts(directory / "prompts", directory / "documents")
    stages = tuple(
        replace(stage, tokens=max(stage.batch * stage.length, int(stage.tokens * share)))
        for stage in STAGES
    )
    spent = directory / "target.json"
    if not spent.exists():
        task = progress.add_task("training the target", total=sum(s.tokens for s in stages))
        model = pretrain(
            tokens,
            seed,
            lambda n, text: progress.update(task, advance=n, description=f"target: {text}"),
            stages,
        )
        model.bfloat16().save_pretrained(directory / "target")
        seconds = time.perf_counter() - started
        spent.write_text(json.dumps({"seconds": seconds, "threads": threads}))
    training = json.loads(spent.read_text())
    num_crops = max(1, round(8 * share))
    target = Target.load(str(directory / "target"), torch.device("cpu"), torch.float32)
    facts = CardFacts(
        seconds_target=training["seconds"],
        threads=training["threads"],
        stages=stages,
        machine=f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        losses={
            d: loss_by_position(target.model, load_tokens(tokens, d, "heldout"), EDGES, num_crops)
            for d in DOMAINS
        },
        edges=EDGES,
        checksum=target.checksum(),
    )
    plan = DistillPlan()
    plan = replace(plan, tokens=max(plan.batch * plan.length, int(plan.tokens * share)))
    teach_eagle3(target, directory, seed, plan, num_crops, progress, facts)
    write_card(directory, facts)


def teach_eagle3(
    target: Target,
    directory: Path,
    seed: int,
    plan: DistillPlan,
    num_crops: int,
    progress: Progress,
    facts: CardFacts,
) -> None:
    """The EAGLE-3 draft: short crops of code only, so that length and domain can shift."""
    tokens = directory / "tokens"
    started = time.perf_counter()
    torch.manual_seed(seed)
    config = target.model.config
    drafter = Eagle3Drafter.initialise(
        Eagle3Config(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.vocab_size,
            rope_theta=10000.0,
            max_position_embeddings=config.max_position_embeddings,
        ),
        target,
        NUM_DRAFT_TOKENS,
    )
    settings = LossSettings(kind="forward_kl", position_decay=0.9)
    batch_loss = BatchLoss(drafter, ForwardKL(settings), target.head, "hidden")
    task = progress.add_task("teaching eagle3", total=plan.tokens)
    distill(
        target,
        drafter,
        batch_loss,
        load_tokens(tokens, "code", "train"),
        plan,
        seed,
        lambda n, text: progress.update(task, advance=n, description=f"eagle3: {text}"),
    )
    drafter.network().to(torch.bfloat16)
    drafter.save(directory / "eagle3")
    drafter.network().to(torch.float32)
    facts.drafts["eagle3"] = {
        "seconds": time.perf_counter() - started,
        "tokens": plan.tokens,
        "parameters": sum(p.numel() for p in drafter.network().parameters()),
        "checksum": checksum(dict(drafter.network().state_dict())),
        "acceptance": {
            domain: acceptance_by_step(
                target,
                drafter,
                batch_loss,
                load_tokens(tokens, domain, "heldout"),
                2048,
                EDGES[:5],
                NUM_DRAFT_TOKENS,
                num_crops,
            )
            for domain in DOMAINS
        },
    }
