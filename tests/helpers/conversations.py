"""Conversations in the layouts that people have them in, and the requests that are read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import torch

from cosched.engines.embedded.target import load_end_tokens
from cosched.engines.request import GenerationRequest
from cosched.settings.sections import WorkloadSettings
from cosched.workload.requests import load_requests
from tests.helpers.paths import TINYWORLD

CPU = torch.device("cpu")
ASKS = [{"role": "user", "content": "NAME\nls - list"}]
CHAT = [
    {"role": "system", "content": "Manuals."},
    {"role": "user", "content": "NAME\nls - list"},
    {"role": "assistant", "content": "ls lists files"},
    {"role": "user", "content": "NAME\ncp - copy"},
    {"role": "assistant", "content": "cp copies files"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in CHAT
]
ENDS = "{% for m in messages %}{{ m['content'] }}<|endoftext|>\n{% endfor %}"  # a turn has an end


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def requests_of(
    path: Path, tokenizer: Any, key: str = "prompts", max_length: int = 4096, **settings: Any
) -> list[GenerationRequest]:
    settings = {key: str(path), "max_new_tokens": 32, **settings}
    ends = load_end_tokens(str(TINYWORLD / "target"))
    return load_requests(
        msgspec.convert(settings, WorkloadSettings), tokenizer, max_length, CPU, ends
    )


def text_of(tokenizer: Any, tokens: Any) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
