"""Prompts and documents, as requests.

Letters: P prompt tokens, T tokens of a whole text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosched.engines.request import GenerationRequest
from cosched.errors import WorkloadError
from cosched.loop.per_adapter import check_tenants
from cosched.settings.arms import adapts
from cosched.workload.chat import Chat, last_answer, last_turns
from cosched.workload.prompt_files import read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.loop.per_adapter import Request
    from cosched.settings.schema import Config
    from cosched.settings.sections import WorkloadSettings
    from cosched.workload.prompt_files import Line, Messages

SPARE = 8
"""Of so many tokens of an answer there is one to spare: put back as text it may take more of them."""


def load_requests(
    settings: WorkloadSettings,
    tokenizer: Any,
    max_length: int,
    device: torch.device,
    end_tokens: frozenset[int] = frozenset(),
) -> list[GenerationRequest]:
    """The workload's requests, in the order of the files, as often as they are to be answered.

    ``end_tokens`` are those at which the target stops; a chat document ends with the first.

    Raises:
        WorkloadError: the file is missing, empty or malformed, or a text does not fit the target.
    """
    lines = read_texts(settings)
    again = [
        line._replace(id=f"{line.id}#{n}") for n in range(2, settings.samples + 1) for line in lines
    ]
    chat = Chat(tokenizer, end_tokens)
    make = _forced if settings.documents is not None else _asked
    lines += again
    requests = [make(line, settings, chat, max_length, device) for line in lines]
    taken: set[str] = set()
    for line, request in zip(lines, requests, strict=True):
        for name in _ids(request):
            if name in taken:
                raise WorkloadError(
                    f"{line.where}: {name!r}, an id in the file, is also that of a sample or a later turn "
                    f"of another; choose another id"
                )
            taken.add(name)
    return requests


def _ids(request: GenerationRequest) -> list[str]:
    """Those of a conversation's requests, of later turns too."""
    return [_id(request.id, turn) for turn in range(1, request.num_turns + 1)]


def _id(name: str, turn: int) -> str:
    return name if turn == 1 else f"{name}@{turn}"


def _forced(
    line: Line, settings: WorkloadSettings, chat: Chat, max_length: int, device: torch.device
) -> GenerationRequest:
    """A document: text behind its first tokens, or the last answer of a chat."""
    if line.text is None:
        prompt, answer = chat.document(line.messages, line.where)
    else:
        ids = chat.ids(line.text)
        prompt, answer = ids[: settings.prompt_tokens], ids[settings.prompt_tokens :]
        if len(answer) < 2:
            raise WorkloadError(
                f"{line.where}: {line.id} has {len(ids)} tokens, workload.prompt_tokens = "
                f"{settings.prompt_tokens} leaves nothing to force"
            )
    answer = answer[: settings.max_new_tokens]
    ids_T = torch.tensor([*prompt, *answer], device=device)
    request = GenerationRequest(
        line.id, ids_T[: len(prompt)], len(answer), ids_T, line.tenant, source=line.source
    )
    _check_fits(request, line.where, max_length)
    return request


def _asked(
    line: Line, settings: WorkloadSettings, chat: Chat, max_length: int, device: torch.device
) -> GenerationRequest:
    """A prompt to answer, and what its conversation goes on to ask."""
    new = settings.max_new_tokens
    if line.text is not None:
        ids_P = torch.tensor(chat.ids(line.text), device=device)
        request = GenerationRequest(line.id, ids_P, new, tenant=line.tenant, source=line.source)
        _check_fits(request, line.where, max_length)
        return request
    asked, *ahead = _turns(line, settings.turns)
    conversation = Conversation(chat, line, asked, tuple(ahead), new, max_length, device)
    longest, turn = 0, conversation
    for answers in range(1 + len(ahead)):
        turn = turn.answered("") if answers else turn
        request = turn.request()
        _check_fits(request, line.where, max_length, answers)
        longest = max(longest, request.max_length + answers * (new + new // SPARE))
    return replace(conversation, max_length=min(longest, max_length)).request()


def _turns(line: Line, number: int) -> list[Messages]:
    """What so many questions add to a conversation: the last ones, or the first where none is answered.

    Raises:
        WorkloadError: as ``last_turns``.
    """
    if line.unanswered:
        return [(question,) for question in line.messages[:number]]
    return last_turns(line.messages, number, line.where)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Where a conversation stands: with what it asks now, and what it will ask (``LaterTurns``)."""

    chat: Chat
    line: Line
    asked: Messages  # what was said, up to the question of this turn
    ahead: tuple[Messages, ...]  # what each later turn adds, beside the answer before it
    max_new_tokens: int
    max_length: int
    device: torch.device
    turn: int = 1

    @property
    def num_turns(self) -> int:
        return len(self.ahead)

    def request(self) -> GenerationRequest:
        """What it asks now."""
        ids_P = torch.tensor(self.chat.prompt(self.asked, self.line.where), device=self.device)
        return GenerationRequest(
            _id(self.line.id, self.turn),
            ids_P,
            self.max_new_tokens,
            tenant=self.line.tenant,
            later=self if self.ahead else None,
            source=self.line.source,
        )

    def answered(self, text: str) -> Conversation:
        """Where it stands with that answer, and with the next question."""
        answer = {"role": "assistant", "content": text}
        asked = (*self.asked, answer, *self.ahead[0])
        return replace(self, asked=asked, ahead=self.ahead[1:], turn=self.turn + 1)

    def after(self, answer: Sequence[int]) -> GenerationRequest | None:
        request = self.answered(self.chat.answer(answer)).request()
        return request if request.max_length <= self.max_length else None


def _check_fits(
    request: GenerationRequest, where: str, max_length: int, num_answers: int = 0
) -> None:
    """``num_answers`` will come into the prompt and are empty in it as yet."""
    if not len(request.prompt_P):
        raise WorkloadError(f"{where}: {request.id} has no tokens in its prompt")
    if request.max_length > max_length:
        beside = f" beside the {num_answers} answers before it" if num_answers else ""
        raise WorkloadError(
            f"{where}: {request.id} has {len(request.prompt_P)} prompt tokens{beside} and "
            f"{request.max_new_tokens} to come, {request.max_length} in all; the target's "
            f"context is {max_length}. Lower workload.max_new_tokens or shorten the prompt"
        )


def check_texts(config: Config) -> None:
    """What the file names is there to be answered or said, and has an owner where it needs one.

    Raises:
        WorkloadError: as ``read_texts`` and ``check_owners``.
    """
    if config.engine.kind != "trace" and config.workload.files:
        check_owners(config, read_texts(config.workload))


def check_owners(config: Config, texts: Sequence[Request]) -> None:
    """Where an arm learns for each tenant, every text names one that has an adapter.

    Raises:
        WorkloadError: one does not.
    """
    for arm in filter(adapts, config.arms):
        own = config.for_arm(arm)
        if own.adapt.scope.state == "per_tenant":
            check_tenants(texts, own.adapt.scope.tenants, own.adapt_key)


def read_texts(settings: WorkloadSettings) -> list[Line]:
    """What is to be answered or said, once each.

    Raises:
        WorkloadError: as ``read_lines``, or a chat has nothing to be answered or said.
    """
    lines: list[Line] = []
    files = settings.files
    for (key, path), source in zip(files.items(), sources(list(files.values())), strict=True):
        for line in read_lines(Path(path), key, settings.max_prompts):
            named = line._replace(id=f"{source}:{line.id}", source=source)
            lines.append(line if source is None else named)
    for line in lines:
        if line.messages and settings.documents is not None:
            last_answer(line.messages, line.where)
        elif line.messages:
            _turns(line, settings.turns)
    return lines


def sources(paths: Sequence[str]) -> list[str | None]:
    """What each of several files is called: its name, or its path where others have that name."""
    if len(paths) == 1:
        return [None]
    stems = [Path(path).stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True)
    ]


def first_of_each(
    requests: Sequence[GenerationRequest], most: int | None
) -> list[GenerationRequest]:
    """The first ``most`` requests of each file; all without a limit."""
    seen = Counter[str | None]()
    kept: list[GenerationRequest] = []
    for request in requests:
        seen[request.source] += 1
        if most is None or seen[request.source] <= most:
            kept.append(request)
    return kept
