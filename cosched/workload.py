"""Prompts and documents from JSON lines, as requests.

Letters: T tokens of a whole text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cosched.arms import adapts
from cosched.engines.embedded.request import GenerationRequest
from cosched.errors import WorkloadError
from cosched.pool import check_tenants

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cosched.config import Config, WorkloadSettings
    from cosched.pool import Request


class Text(NamedTuple):
    """A line of a file of prompts or documents."""

    id: str
    text: str
    tenant: str | None


def load_requests(
    settings: WorkloadSettings, tokenizer: Any, max_length: int, device: torch.device
) -> list[GenerationRequest]:
    """The workload's requests, in the order of the file, as often as it is to be answered.

    Raises:
        WorkloadError: the file is missing, empty or malformed, or a text does not fit the target.
    """
    forced = settings.documents is not None
    ((key, path),) = settings.files.items()
    texts = read_texts(settings)
    again = [
        (f"{name}#{n}", text, tenant)
        for n in range(2, settings.samples + 1)
        for name, text, tenant in texts
    ]
    requests = []
    for name, text, tenant in [*texts, *again]:
        ids_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=device)
        if forced:
            if len(ids_T) <= settings.prompt_tokens + 1:
                raise WorkloadError(
                    f"{key}: {name} in {path} has {len(ids_T)} tokens, workload.prompt_tokens = "
                    f"{settings.prompt_tokens} leaves nothing to force"
                )
            ids_T = ids_T[: settings.prompt_tokens + settings.max_new_tokens]
            prompt_P = ids_T[: settings.prompt_tokens]
            num_new = len(ids_T) - len(prompt_P)
            request = GenerationRequest(name, prompt_P, num_new, ids_T, tenant)
        else:
            request = GenerationRequest(name, ids_T, settings.max_new_tokens, tenant=tenant)
        if request.max_length > max_length:
            raise WorkloadError(
                f"{key}: {name} has {len(request.prompt_P)} prompt tokens and "
                f"{request.max_new_tokens} to come, {request.max_length} in all; the target's "
                f"context is {max_length}. Lower workload.max_new_tokens or shorten the prompt"
            )
        requests.append(request)
    return requests


def check_texts(config: Config) -> None:
    """What the file names is there to be answered or said, and has an owner where it needs one.

    Raises:
        WorkloadError: as ``read_lines`` and ``check_owners``.
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


def read_texts(settings: WorkloadSettings) -> list[Text]:
    """What is to be answered or said, once each; errors as ``read_lines``."""
    ((key, path),) = settings.files.items()
    return read_lines(Path(path), key)[: settings.max_prompts]


def read_lines(path: Path, key: str) -> list[Text]:
    """Every line of a file.

    Raises:
        WorkloadError: no file, no line, a line that is not an object with ``text``, an id twice, a
            tenant that is no name.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise WorkloadError(f"{key}: {path} cannot be read: {error.strerror}") from error
    texts: dict[str, Text] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{key}: line {number} of {path} is not JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise WorkloadError(
                f'{key}: line {number} of {path} has no text; expected {{"id": …, "text": …}}'
            )
        name = str(record.get("id", number))
        if name in texts:
            raise WorkloadError(f"{key}: the id {name!r} stands twice in {path}")
        tenant = record.get("tenant")
        if not isinstance(tenant, str | None):
            raise WorkloadError(
                f"{key}: line {number} of {path} has the tenant {tenant!r}; expected a name"
            )
        texts[name] = Text(name, text, tenant)
    if not texts:
        raise WorkloadError(f"{key}: {path} has no prompt in it")
    return list(texts.values())
