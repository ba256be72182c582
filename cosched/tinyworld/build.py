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
from cosched.tinyworld.card import CardFacts, write_card
from cosched.tinyworld.corpus import DOMAINS, read_corpus
from cosched.tinyworld.distill import DistillPlan
from cosched.tinyworld.drafts import DRAFTS, teach
from cosched.tinyworld.pretrain import STAGES, Stage, loss_by_position, pretrain
from cosched.tinyworld.prompts import write_texts
from cosched.tinyworld.tokens import load_tokens, tokenize_corpus, train_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress, TaskID

EDGES = (0, 256, 512, 1024, 2048, 4000)


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
    _prepare_texts(directory, tokens)
    stages = tuple(_shortened(stage, share) for stage in STAGES)
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
    for name in DRAFTS:
        task = progress.add_task(f"teaching {name}", total=plan.tokens)

        def advance(tokens: int, text: str, task: TaskID = task, name: str = name) -> None:
            progress.update(task, advance=tokens, description=f"{name}: {text}")

        facts.drafts[name] = teach(
            name, target, directory, seed, plan, num_crops, EDGES[:5], advance
        )
    write_card(directory, facts)


def _shortened(stage: Stage, share: float) -> Stage:
    """Fewer steps; where one has more tokens than the share, one of fewer crops, but of their length."""
    tokens = int(stage.tokens * share)
    batch = max(1, min(stage.batch, tokens // stage.length))
    return replace(stage, batch=batch, tokens=max(batch * stage.length, tokens))


def _prepare_texts(directory: Path, tokens: Path) -> None:
    """The tokenizer, the corpus in tokens, prompts and documents, from one reading of all files."""
    corpus = read_corpus()
    if not (directory / "target" / "tokenizer.json").exists():
        train_tokenizer(corpus, directory / "target")
    if not tokens.exists():
        tokenizer = AutoTokenizer.from_pretrained(directory / "target")
        tokenize_corpus(corpus, tokenizer, tokens)
    write_texts(corpus, directory / "prompts", directory / "documents")
