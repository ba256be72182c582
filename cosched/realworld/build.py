"""``cosched realworld build``: the target's answers, the drafts taught on them, and their cards."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cosched.engines.embedded.target import Target
from cosched.errors import RealWorldError
from cosched.packing import pack as pack_weights
from cosched.realworld.answers import AnswerPlan, generate, read
from cosched.realworld.card import Facts, write_card
from cosched.realworld.documents import TEMPERATURE, WANTED, read_documents, record
from cosched.realworld.folders import is_whole
from cosched.realworld.pins import NAME
from cosched.realworld.questions import training_questions
from cosched.realworld.recipes import RECIPES, words_by_frequency
from cosched.realworld.storage import expand, pack
from cosched.realworld.teach import acceptance, teach
from drafters.dflash import DFlashDrafter
from drafters.eagle3 import Eagle3Drafter
from drafters.pard import PardDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.progress import Progress

    from cosched.realworld.recipes import AnyDrafter, Recipe

SHARDS = 6  # of 192 answers each: some 300,000 tokens
FAMILIES: dict[str, Any] = {"eagle3": Eagle3Drafter, "dflash": DFlashDrafter, "pard": PardDrafter}


def build(
    models: Path,
    prompts: Path,
    documents: Path,
    work: Path,
    to: Path,
    names: Sequence[str],
    seed: int,
    threads: int,
    share: float,
    progress: Progress,
) -> None:
    """Teach the drafts of those names and write them under ``to`` in compact storage.

    ``models`` is what ``fetch`` filled; acceptance is measured on answers to ``prompts``, recorded in
    ``documents``. Answers to learn from, and drafts that are half taught, lie in ``work``; what is
    there is not made again.
    ``share`` of the training is done: 1 makes the drafts, less tries the machinery.

    Raises:
        RealWorldError: no model, a draft of no such name, or a folder cannot be written.
        CheckpointError: a folder is damaged.
    """
    torch.set_num_threads(threads)
    for name in names:
        if name not in RECIPES:
            raise RealWorldError(f"--only: no draft {name!r}; there are {', '.join(RECIPES)}")
    if not is_whole(models / NAME):
        raise RealWorldError(f"no model in {models / NAME}; get it with cosched realworld fetch")
    target = Target.load(str(models / NAME), torch.device("cpu"), torch.float32)
    pack_weights(target.model)  # answers are most of the work
    plan = AnswerPlan(shards=max(1, round(SHARDS * share)))
    if share < 1:
        plan = replace(plan, max_new_tokens=max(16, round(plan.max_new_tokens * share)))
    answers = work / "answers"
    most = plan.shards * plan.questions * plan.max_new_tokens
    task = progress.add_task("answers: tokens", total=most)
    generate(target, training_questions(), answers, seed, plan, _teller(progress, task, "answers"))
    progress.update(task, completed=most)
    for domain, wanted in WANTED.items():
        path = (
            models / "human-eval" / "code.jsonl"
            if domain == "code"
            else prompts / f"{domain}.jsonl"
        )
        task = progress.add_task(f"{domain}: tokens", total=wanted.prompts * wanted.tokens)
        record(
            target,
            path,
            documents / path.with_stem(domain).name,
            seed,
            _teller(progress, task, domain),
        )
    for name in names:
        recipe = RECIPES[name]
        recipe = replace(recipe, steps=max(1, round(recipe.steps * share)))
        facts = _taught(name, recipe, target, answers, work, seed, threads, progress)
        draft = work / "drafts" / name
        compact = to / name
        pack(draft, compact, models / NAME)
        expand(compact, work / "expanded" / name, models / NAME)
        drafter = _load(name, work / "expanded" / name, target, recipe.num_draft_tokens)
        facts.acceptance = {
            domain: acceptance(
                target,
                drafter,
                read_documents(target, documents / f"{domain}.jsonl", recipe.layers),
                recipe.num_draft_tokens,
                TEMPERATURE,
            )
            for domain in WANTED
        }
        write_card(compact, name, facts)


def _taught(
    name: str,
    recipe: Recipe,
    target: Target,
    answers: Path,
    work: Path,
    seed: int,
    threads: int,
    progress: Progress,
) -> Facts:
    """Teach a draft and save it under ``work``, if it is not there; what its card says of that."""
    known, kept = work / f"{name}.json", work / f"{name}.kept"
    if known.exists():
        return Facts(**json.loads(known.read_text(encoding="utf-8")))
    data = list(read(answers, recipe.layers))
    words_V = words_by_frequency(data, target.vocab_size)
    task = progress.add_task(f"{name}: steps", total=recipe.steps)
    started = time.perf_counter()
    tell = _teller(progress, task, name)
    drafter = teach(target, data, words_V, recipe, recipe.steps, seed, kept, tell)
    network = drafter.network()
    facts = Facts(
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        answers=len(data),
        tokens=sum(len(answer.tokens_T) - answer.num_prompt for answer in data),
        steps=recipe.steps,
        minutes=(time.perf_counter() - started) / 60,
        threads=threads,
    )
    network.to(torch.bfloat16)
    drafter.save(work / "drafts" / name)
    known.write_text(json.dumps(facts.taught()), encoding="utf-8")
    return facts


def _load(name: str, folder: Path, target: Target, num_draft_tokens: int) -> AnyDrafter:
    family = FAMILIES[name]
    settings = family.Settings(kind=name, path=str(folder), num_draft_tokens=num_draft_tokens)
    return family.load(settings, target)


def _teller(progress: Progress, task: Any, what: str) -> Callable[[int, str], None]:
    def tell(number: int, message: str) -> None:
        progress.update(task, advance=number, description=f"{what}: {message}")

    return tell
