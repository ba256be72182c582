"""The target's answers to the prompts that figures are measured on: recorded once, said by every arm.

What arms say is then the same, so that their speeds and acceptance lengths pair; ``workload.documents``
takes the files.

Letters: T tokens of a prompt with its answer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import torch

from cosched.chat import Chat
from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.judges import SamplingJudge
from cosched.engines.embedded.request import GenerationRequest
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.verification import SamplingParams
from cosched.prompt_files import read_lines
from cosched.realworld.recorded import LAST_HIDDEN, Recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cosched.engines.embedded.target import Target

TEMPERATURE = 0.7


class Wanted(NamedTuple):
    """How many of a file's first prompts are answered, and in how many tokens at most."""

    prompts: int
    tokens: int


WANTED = {
    "chat": Wanted(16, 384),
    "code": Wanted(16, 640),
    "formats": Wanted(12, 512),
    "languages": Wanted(12, 512),
    "long": Wanted(8, 2048),
}


def record(
    target: Target,
    prompts: Path,
    path: Path,
    number: int,
    max_new_tokens: int,
    seed: int,
    advance: Callable[[int, str], None],
) -> None:
    """Answer the first prompts of a file at temperature 0.7 and write both, as OpenAI chat.

    The file appears whole or not at all; what is there stays. ``advance(tokens, message)`` is called
    as they come.

    Raises:
        WorkloadError: the file of prompts cannot be read, or the target has no chat template.
    """
    if path.exists():
        return
    chat = Chat(target.tokenizer, target.end_tokens)
    lines = {line.id: line for line in read_lines(prompts, "--prompts", number)}
    requests = [
        GenerationRequest(name, torch.tensor(chat.prompt(line.messages, name)), max_new_tokens)
        for name, line in lines.items()
    ]
    max_length = max(request.max_length for request in requests)
    engine = EmbeddedEngine(
        rows=LiveRows(target, len(requests), max_length, ()),
        judge=SamplingJudge(SamplingParams(TEMPERATURE)),
        drafter=None,
        options=EngineOptions(len(requests), max_length, seed, target.end_tokens),
        device=target.device,
        on_tokens=lambda number: advance(number, ""),
    )
    said = {
        finished.request.id: target.tokenizer.decode(finished.tokens, skip_special_tokens=True)
        for finished in engine.generate(requests)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for name, line in lines.items():
            answer = {"role": "assistant", "content": said[name]}
            record = {"id": name, "messages": [*line.messages, answer]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_documents(target: Target, path: Path, layers: tuple[int, ...]) -> Iterator[Recorded]:
    """Recorded answers with what the target computes of them, as ``recorded.read`` has it."""
    chat = Chat(target.tokenizer, target.end_tokens)
    captured = tuple(target.num_layers if layer == LAST_HIDDEN else layer for layer in layers)
    for line in read_lines(path, "documents"):
        prompt, answer = chat.document(line.messages, line.where)
        tokens_T = torch.tensor([*prompt, *answer])
        ids, length = tokens_T[None, :-1], len(tokens_T) - 1
        cache, at = target.new_cache(1, length), torch.arange(length)[None]
        rows = target.forward(ids, at, cache, captured, num_logits=1)
        assert rows.features_BTF is not None
        yield Recorded(tokens_T, len(prompt), rows.features_BTF[0], rows.hidden_BTH[0])
