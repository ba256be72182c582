"""The target's answers to the prompts that figures are measured on: recorded once, said by every arm.

What arms say is then the same, so that their speeds and acceptance lengths pair; ``workload.documents``
takes the files.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import torch

from cosched.engines.request import GenerationRequest
from cosched.realworld.answers import sampler
from cosched.realworld.folders import new_file
from cosched.realworld.recorded import compute
from cosched.workload.chat import Chat
from cosched.workload.prompt_files import read_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cosched.engines.embedded.target import Target
    from cosched.realworld.recorded import Recorded


class Wanted(NamedTuple):
    """How many of a file's first prompts are answered, in how many tokens at most, and how freely."""

    prompts: int
    tokens: int
    temperature: float = 0.7
    of: str | None = None  # the prompts' file, where it has not the documents' name


WANTED = {
    "chat": Wanted(16, 384),
    "code": Wanted(16, 640),
    "formats": Wanted(12, 512),
    "languages": Wanted(12, 512),
    "long": Wanted(8, 2048),
    "long-freely": Wanted(12, 2048, 1.0, of="long"),  # at 0.7 the model soon repeats itself
    "summaries": Wanted(12, 384),
}


def record(
    target: Target,
    prompts: Path,
    path: Path,
    wanted: Wanted,
    seed: int,
    advance: Callable[[int, str], None],
) -> None:
    """Answer the first prompts of a file and write both, as OpenAI chat.

    The file appears whole or not at all; what is there stays. ``advance(tokens, message)`` is called
    as they come.

    Raises:
        WorkloadError: the file of prompts cannot be read, or the target has no chat template.
        RealWorldError: the file cannot be written.
    """
    if path.exists():
        return
    chat = Chat(target.tokenizer, target.end_tokens)
    lines = {line.id: line for line in read_lines(prompts, "--prompts", wanted.prompts)}
    requests = [
        GenerationRequest(name, torch.tensor(chat.prompt(line.messages, name)), wanted.tokens)
        for name, line in lines.items()
    ]
    engine = sampler(target, requests, wanted.temperature, seed, lambda tokens: advance(tokens, ""))
    said = {
        finished.request.id: target.tokenizer.decode(finished.tokens, skip_special_tokens=True)
        for finished in engine.generate(requests)
    }
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for name, line in lines.items():
            answer = {"role": "assistant", "content": said[name]}
            chatted = {"id": name, "messages": [*line.messages, answer]}
            file.write(json.dumps(chatted, ensure_ascii=False) + "\n")


def read_documents(target: Target, path: Path, layers: tuple[int, ...]) -> Iterator[Recorded]:
    """Recorded answers with what the target computes of them, as ``recorded.read`` has it."""
    chat = Chat(target.tokenizer, target.end_tokens)
    for line in read_lines(path, "documents"):
        prompt, answer = chat.document(line.messages, line.where)
        yield compute(target, torch.tensor([*prompt, *answer]), len(prompt), layers)
