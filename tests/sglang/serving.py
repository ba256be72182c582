"""The tiny world served by SGLang in a process of its own, and by our engine in this one."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from cosched.engines.embedded.engine import EmbeddedEngine, EngineOptions
from cosched.engines.embedded.rows import LiveRows
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.verifiers import GreedyVerifier
from cosched.engines.request import FinishedRequest, GenerationRequest
from cosched.protocols import DrafterSettings
from cosched.registry import DRAFTERS
from tests.helpers.paths import ROOT
from tests.sglang import preforked

WORLD = ROOT / "tinyworld"
NUM_TOKENS = 96
BATCH = 4  # requests at once, as tests/sglang/decode.py has it

Answers = list[dict[str, Any]]


@functools.cache
def prompts() -> list[list[int]]:
    """Two texts of each domain, tokenised."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "target")
    files = sorted((WORLD / "prompts").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()[:2]]
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]


@dataclass(frozen=True)
class Decode:
    """Decodes prompts with an SGLang engine that takes these arguments; remembers.

    Greedily, or with the ``sampling`` parameters at each one's place, and all of them ``repeat`` times;
    the first alone until it has said ``join`` tokens.
    """

    environment: dict[str, str]
    known: dict[str, Answers] = field(default_factory=dict)

    def __call__(
        self,
        dtype: str,
        algorithm: str | None = None,
        draft: str | None = None,
        *,
        texts: list[list[int]] | None = None,
        passes: int = 1,
        abort: tuple[int, int] | None = None,
        variables: dict[str, str] | None = None,
        engine: dict[str, Any] | None = None,
        num_tokens: int = NUM_TOKENS,
        linger: float = 0,
        sampling: list[dict[str, Any]] | None = None,
        repeat: int = 1,
        join: int = 0,
        **settings: Any,
    ) -> Answers:
        arguments = {"model_path": str(WORLD / "target"), "dtype": dtype, **(engine or {})}
        if algorithm:
            arguments["speculative_algorithm"] = algorithm
            arguments["speculative_draft_model_path"] = str(WORLD / (draft or algorithm.lower()))
            arguments |= {f"speculative_{name}": value for name, value in settings.items()}
        order = json.dumps(
            {
                "prompts": texts or prompts(),
                "tokens": num_tokens,
                "engine": arguments,
                "passes": passes,
                "abort": abort,
                "linger": linger,
                "sampling": sampling,
                "repeat": repeat,
                "join": join,
            }
        )
        key = order + json.dumps(variables)
        if key not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                out, err = Path(folder, "out"), Path(folder, "err")
                process = preforked.start(
                    "tests.sglang.decode",
                    [order],
                    {**self.environment, **(variables or {})},
                    out,
                    err,
                )
                try:
                    code = process.wait(600)  # a busy machine starts an engine slowly
                finally:
                    process.kill()
                assert code == 0, err.read_text()[-8000:]
                self.known[key] = json.loads(out.read_text().splitlines()[-1])
        return self.known[key]


def tokens(answers: Answers) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def rounds(answers: Answers) -> list[int]:
    return [answer["rounds"] for answer in answers]


def accept_length(answers: Answers) -> float:
    """Tokens a verification, the target's own included; the first token is the prefill's."""
    return sum(len(answer["tokens"]) - 1 for answer in answers) / sum(rounds(answers))


def embedded(drafter: str, texts: list[list[int]], num_draft_tokens: int = 3) -> Answers:
    """The same by our own engine: float32, greedy, the draft as it lies on disk."""
    device = torch.device("cpu")
    target = Target.load(str(WORLD / "target"), device, torch.float32)
    settings = DrafterSettings(
        kind=drafter, path=str(WORLD / drafter), num_draft_tokens=num_draft_tokens
    )
    draft = DRAFTERS.get(drafter).load(settings, target)
    requests = [
        GenerationRequest(str(number), torch.tensor(text), NUM_TOKENS)
        for number, text in enumerate(texts)
    ]
    longest = max(request.max_length for request in requests)
    engine = EmbeddedEngine(
        rows=LiveRows(target, BATCH, longest + num_draft_tokens + 1, draft.signal.feature_layers),
        verifier=GreedyVerifier(),
        drafter=draft,
        options=EngineOptions(BATCH, longest, seed=0, stop_tokens=frozenset()),
        device=device,
    )
    done: list[FinishedRequest] = sorted(engine.generate(requests), key=lambda d: int(d.request.id))
    return [{"tokens": list(each.tokens), "rounds": len(each.rounds)} for each in done]
