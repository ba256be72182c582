"""The tiny world's drafts learning inside SGLang: what was said, and what its scheduler reported."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from cosched.records import RoundRow
from cosched.settings.load import load_config, to_yaml
from cosched.telemetry.metrics import RequestLog, RoundFigures, round_figures
from tests.sglang.serving import ROOT, WORLD, Answers, Decode

CONFIG = ROOT / "configs" / "serve_tiny_cpu.yaml"
K = 3
SHAPES = {
    "eagle3": {"num_steps": K, "eagle_topk": 1, "num_draft_tokens": K + 1},
    "dflash": {"num_draft_tokens": K + 1},
    "pard": {"num_steps": K, "eagle_topk": 1, "num_draft_tokens": K + 1},
}
OFTEN = ("adapt.policy.rounds=4", "adapt.replay.anchors=32", "adapt.publish.target_check_every=1")
WIDTH = 2
TREE = {"num_steps": K, "eagle_topk": WIDTH, "num_draft_tokens": K * WIDTH + 1}
LENGTH = 128


@functools.cache
def shifted() -> list[list[int]]:
    """Prompts of a domain that no draft was trained on, of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "target")
    lines = (WORLD / "prompts" / "translated.jsonl").read_text().splitlines()[:8]
    texts = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    return [text[: 24 + 7 * number] for number, text in enumerate(texts)]


def plainly(decode: Decode) -> Answers:
    """What the target says without a draft."""
    return decode("float32", texts=shifted(), num_tokens=LENGTH)


def names(texts: list[list[int]]) -> list[str]:
    return [f"request-{number}" for number in range(len(texts))]


@dataclass(frozen=True)
class Served:
    """Answers of one engine and what its scheduler reported."""

    answers: Answers
    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def rows(self) -> list[RoundRow]:
        """Of every request in every round, in the order of rounds."""
        return [msgspec.convert(event["row"], RoundRow) for event in self.of("round")]

    def figures(self, texts: list[list[int]]) -> RoundFigures:
        rows = self.rows()
        logs = [
            RequestLog(name, text, answer["tokens"], [r for r in rows if r.request_id == name])
            for name, text, answer in zip(names(texts), texts, self.answers, strict=True)
        ]
        return round_figures(logs)


@dataclass(frozen=True)
class Serve:
    """Decodes with one of our algorithms, with settings changed by ``key=value``; remembers.

    ``more`` is for ``Decode``, what is left over for SGLang's engine.
    """

    decode: Decode
    folders: pytest.TempPathFactory
    faults: Path  # with the entry point of tests.sglang.faults
    known: dict[str, Served] = field(default_factory=dict)

    def __call__(
        self,
        kind: str,
        *overrides: str,
        fault: str | None = None,
        more: dict[str, Any] | None = None,
        retract: bool = False,
        trees: bool = False,
        **engine: Any,
    ) -> Served:
        key = repr((kind, overrides, fault, more, retract, trees, engine))
        if key in self.known:
            return self.known[key]
        folder = self.folders.mktemp(kind)
        width = [f"drafter.top_k={WIDTH}"] if trees else []
        config = load_config(CONFIG, [f"drafter.kind={kind}", *width, *overrides])
        (folder / "config.yaml").write_text(to_yaml(config))
        events = folder / "events.jsonl"
        variables = {
            "COSCHED_CONFIG": str(folder / "config.yaml"),
            "COSCHED_EVENTS": str(events),
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",  # of two ranks, where there are two
        }
        if retract:
            variables |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
        if fault:
            paths = f"{self.decode.environment['PYTHONPATH']}:{self.faults}"
            variables |= {"COSCHED_TEST_FAULT": fault, "PYTHONPATH": paths}
        answers = self.decode(
            "float32",
            f"COSCHED_{kind.upper()}",
            kind,
            **{"texts": shifted(), "num_tokens": LENGTH, **(more or {})},
            variables=variables,
            engine=engine,
            **(TREE if trees else SHAPES[kind]),
        )
        lines = events.read_text().splitlines()
        self.known[key] = Served(answers, [json.loads(line) for line in lines])
        return self.known[key]
