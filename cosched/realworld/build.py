"""``cosched realworld build``: the target's answers, the drafts trained on them, and their cards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import torch

from cosched.engines.embedded.packing import pack as pack_weights
from cosched.engines.embedded.target import Target
from cosched.errors import RealWorldError
from cosched.realworld.answers import AnswerPlan, generate
from cosched.realworld.card import Facts, write_card
from cosched.realworld.documents import WANTED, read_documents, record
from cosched.realworld.folders import is_whole, new_file
from cosched.realworld.pins import NAME
from cosched.realworld.questions import training_questions
from cosched.realworld.recipes import RECIPES, words_by_frequency
from cosched.realworld.recorded import read
from cosched.realworld.storage import expand, pack
from cosched.realworld.teach import acceptance, teach
from cosched.realworld.texts import LENGTH, NUM_TEXTS, record_texts
from cosched.registry import DRAFTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.progress import Progress
    from torch import Tensor

    from cosched.realworld.recipes import Recipe

SHARDS = 6  # of 192 answers each: some 325,000 tokens
TEXT_SHARDS = 6  # of 192 texts: some 440,000 tokens


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things lie.

    ``models`` is what ``fetch`` filled, ``prompts`` what the target is asked to be measured on,
    ``documents`` its answers to that; ``work`` has the answers that teach, and drafts that are half
    trained, ``to`` the drafts in compact storage.
    """

    models: Path
    prompts: Path
    documents: Path
    work: Path
    to: Path


def build(
    folders: Folders,
    names: Sequence[str],
    seed: int,
    threads: int,
    share: float,
    progress: Progress,
) -> None:
    """Teach the drafts of those names; answers, documents and drafts that are there are not made again.

    ``share`` of everything is done: 1 makes the drafts, less tries the machinery.

    Raises:
        RealWorldError: no model, a draft of no such name, or a folder cannot be written.
        CheckpointError: a folder is damaged.
    """
    for name in names:
        if name not in RECIPES:
            raise RealWorldError(f"--only: no draft {name!r}; there are {', '.join(RECIPES)}")
    model = folders.models / NAME
    if not is_whole(model):
        raise RealWorldError(f"no model in {model}; get it with cosched realworld fetch")
    torch.set_num_threads(threads)
    target = Target.load(str(model), torch.device("cpu"), torch.float32)
    pack_weights(target.model)
    _answer(folders, target, seed, share, progress)
    for name in names:
        recipe = RECIPES[name]
        recipe = replace(recipe, steps=_part(share, recipe.steps))
        facts = _taught(name, recipe, folders.work, target, seed, threads, progress)
        pack(folders.work / "drafts" / name, folders.to / name, model)
        expanded = folders.work / "expanded" / name
        expand(folders.to / name, expanded, model)
        family, num_drafted = DRAFTERS.get(name), recipe.num_draft_tokens
        settings = family.Settings(kind=name, path=str(expanded), num_draft_tokens=num_drafted)
        drafter = family.load(settings, target)
        reached: dict[str, Tensor] = {}
        for domain, wanted in WANTED.items():
            documents = read_documents(target, folders.documents / f"{domain}.jsonl", recipe.layers)
            reached[domain] = acceptance(
                target, drafter, documents, num_drafted, wanted.temperature
            )
        write_card(folders.to / name, name, facts, reached)


def _answer(folders: Folders, target: Target, seed: int, share: float, progress: Progress) -> None:
    """Everything that the target says: what teaches, and what is measured on."""
    plan = AnswerPlan(shards=_part(share, SHARDS))
    if share < 1:
        questions, tokens = _part(share, plan.questions), _part(share, plan.max_new_tokens, 16)
        plan = replace(plan, questions=questions, max_new_tokens=tokens)
    most = plan.shards * plan.questions * plan.max_new_tokens
    tell = _task(progress, "answers: tokens", most)
    generate(target, training_questions(), folders.work / "answers", seed, plan, tell)
    shards, texts = _part(share, TEXT_SHARDS), _part(share, NUM_TEXTS)
    tell = _task(progress, "texts: tokens", shards * texts * LENGTH)
    record_texts(target, folders.work / "texts", shards, texts, seed, tell)
    for domain, wanted in WANTED.items():
        code = folders.models / "human-eval" / "code.jsonl"
        prompts = code if domain == "code" else folders.prompts / f"{wanted.of or domain}.jsonl"
        number, tokens = _part(share, wanted.prompts), _part(share, wanted.tokens, 16)
        tell = _task(progress, f"{domain}: tokens", number * tokens)
        wanted = wanted._replace(prompts=number, tokens=tokens)
        record(target, prompts, folders.documents / f"{domain}.jsonl", wanted, seed, tell)


def _taught(
    name: str,
    recipe: Recipe,
    work: Path,
    target: Target,
    seed: int,
    threads: int,
    progress: Progress,
) -> Facts:
    """Teach a draft and save it under ``work``, if it is not there; what its card says of that."""
    known = work / f"{name}.json"
    if known.exists():
        return msgspec.json.decode(known.read_bytes(), type=Facts)
    answers, texts = (list(read(work / what, recipe.layers)) for what in ("answers", "texts"))
    words_V = words_by_frequency(answers, target.vocab_size)
    tell = _task(progress, f"{name}: steps", recipe.steps)
    kept = work / f"{name}.kept"
    drafter, seconds = teach(target, [*answers, *texts], words_V, recipe, seed, kept, tell)
    network = drafter.network()
    facts = Facts(
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        answers=len(answers),
        tokens=sum(len(answer.tokens_T) - answer.num_prompt for answer in answers),
        text_tokens=sum(len(text.tokens_T) for text in texts),
        steps=recipe.steps,
        minutes=seconds / 60,
        threads=threads,
    )
    network.to(torch.bfloat16)
    drafter.save(work / "drafts" / name)
    with new_file(known) as partial:
        partial.write_bytes(msgspec.json.encode(facts))
    return facts


def _part(share: float, whole: int, least: int = 1) -> int:
    return whole if share == 1 else max(least, round(share * whole))


def _task(progress: Progress, what: str, total: int) -> Callable[[int, str], None]:
    """A line of the progress; it is told how much has been done, and what to say of it."""
    task = progress.add_task(what, total=total)

    def tell(number: int, message: str) -> None:
        progress.update(task, advance=number, description=f"{what} {message}")

    return tell
