"""Asking a served tiny world through the OpenAI client."""

from __future__ import annotations

import json

import openai

from tests.sglang.serving import ROOT


def prompt(number: int) -> str:
    """A text of a domain that the draft does not know."""
    lines = (ROOT / "tinyworld/prompts/translated.jsonl").read_text().splitlines()
    return json.loads(lines[number])["text"]


def complete(client: openai.OpenAI, number: int, tokens: int = 96) -> str:
    """What the server says to it, greedily, in just as many tokens."""
    answer = client.completions.create(
        model="tiny",
        prompt=prompt(number),
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens
    return answer.choices[0].text
