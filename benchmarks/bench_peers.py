"""The real model beside what people use instead: ``transformers``' own assisted generation and prompt lookup.

Usage: python benchmarks/bench_peers.py [--config configs/best_of.yaml] [--prompts FILE ...] [--max-prompts 6]
           [--tokens 256] [--arms plain eagle3.frozen+window ...] [--lookup 4] [--assistant FOLDER [--assisted 4]]
           [--json FILE] [key.sub=value ...]

Greedy, the same weights in the same type, one request at a time: every arm answers a prompt before the
next one comes, in an order that goes round, prefill included. ``transformers`` decodes with its ``sdpa`` attention:
``generate`` as it is, with ``prompt_lookup_num_tokens``, and with an ``assistant_model`` where ``--assistant``
names one: an ordinary language model with the target's tokens, which none of our drafts is. Arms of
cosched are those of the file, at temperature 0. Ratios are of the totals of a file, with jackknife intervals
over its prompts; answers that differ from ``generate``'s are counted: two tokens may be as good as one
another. "repeats" is the share of ``generate``'s tokens that follow four tokens which had occurred before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cosched.bench.figures import Figure, Row, write_figures
from cosched.bench.tables import shown
from cosched.build.embedded import Arm, build_arm, build_world
from cosched.engines.embedded.target import Target
from cosched.engines.request import GenerationRequest
from cosched.report.intervals import MIN_PARTS, paired_ratio
from cosched.runs.keeping import settle
from cosched.settings.load import load_config
from cosched.telemetry.metrics import Part, novel_positions
from cosched.telemetry.run_folder import NoEvents

ROOT = Path(__file__).parent.parent
ARMS = ["plain", "eagle3.frozen+window", "eagle3.adapted+window", "both.adapted+window"]
PROMPTS = [
    "realworld/prompts/chat.jsonl",
    "models/human-eval/code.jsonl",
    "realworld/prompts/languages.jsonl",
    "realworld/prompts/summaries.jsonl",
]
GENERATE = "transformers"
Answer = Callable[[GenerationRequest], list[int]]
"""What an arm says to a request: the new tokens."""


@dataclass
class Measured:
    """Of each arm tokens and seconds by request, and how many of its answers are not ``generate``'s."""

    parts: dict[str, list[Part]]
    differing: dict[str, int]
    repeats: float


def theirs(model: Any, ends: frozenset[int], **how: Any) -> Answer:
    @torch.no_grad()
    def answer(request: GenerationRequest) -> list[int]:
        ids_1P = request.prompt_P[None]
        said = model.generate(
            ids_1P,
            attention_mask=torch.ones_like(ids_1P),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=0,
            **how,
        )
        return said[0, ids_1P.shape[1] :].tolist()

    return answer


def load_assistant(folder: str, tokens: int, dtype: torch.dtype) -> Any:
    assistant = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assistant.generation_config.num_assistant_tokens = tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return assistant


def ours(arm: Arm) -> Answer:
    def answer(request: GenerationRequest) -> list[int]:
        (done,) = arm.engine.generate([request])
        return list(done.tokens)

    return answer


def measure(
    answers: dict[str, Answer], requests: list[GenerationRequest], arms: list[Arm]
) -> Measured:
    """Every arm on every request, in turns."""
    parts: dict[str, list[Part]] = {name: [] for name in answers}
    differing = dict.fromkeys(answers, 0)
    names, repeated, generated = list(answers), 0, 0
    learners = [arm.coscheduler for arm in arms if arm.coscheduler is not None]

    def end_turn() -> None:  # an update that is under way would go on in the time of the next arm
        for learner in learners:
            settle(learner)

    for name in names:  # warms up
        answers[name](requests[-1])
        end_turn()
    for number, request in enumerate(requests):
        turn, said = number % len(names), {}
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            said[name] = answers[name](request)
            parts[name].append(Part(len(said[name]), time.perf_counter() - started))
            end_turn()
        for name in names:
            differing[name] += said[name] != said[GENERATE]
        novel = novel_positions([*request.prompt_P.tolist(), *said[GENERATE]])
        repeated += novel[len(request.prompt_P) :].count(False)
        generated += len(said[GENERATE])
        print(f"{number + 1} of {len(requests)} prompts", flush=True)
    return Measured(parts, differing, repeated / generated)


def as_rows(text: str, measured: Measured) -> list[Row]:
    found: list[Row] = []
    for name, own in measured.parts.items():
        speed = sum(part.tokens for part in own) / sum(part.seconds for part in own)
        figures = {
            "tokens_per_s": Figure(value=speed, unit="tokens/s"),
            "repeats": Figure(value=measured.repeats, unit="share"),
            "other_text": Figure(value=measured.differing[name], unit="count"),
        }
        if name != GENERATE and len(own) >= MIN_PARTS:
            ratio = paired_ratio(own, measured.parts[GENERATE])
            figures["of_transformers"] = Figure(
                value=ratio.value, unit="times", low=ratio.low, high=ratio.high
            )
        found.append(Row({"text": text, "arm": name}, figures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/best_of.yaml")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--max-prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--lookup", type=int, default=4, help="tokens that prompt lookup proposes")
    parser.add_argument("--assistant", help="an ordinary language model with the target's tokens")
    parser.add_argument(
        "--assisted", type=int, default=4, help="tokens that the assistant proposes"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    rows: list[Row] = []
    for prompts in options.prompts:
        overrides = [
            f"workload.prompts={prompts}",
            "workload.documents=null",
            "workload.temperature=0",
            f"workload.max_prompts={options.max_prompts}",
            f"workload.max_new_tokens={options.tokens}",
            f"arms=[{','.join(options.arms)}]",
        ]
        config = load_config(ROOT / options.config, [*overrides, *options.overrides])
        world = build_world(config)
        arms = {name: build_arm(world, name, NoEvents()) for name in options.arms}
        peer = Target.load(config.target.folder, world.target.device, world.target.dtype).model
        peer.set_attn_implementation("sdpa")
        ends = world.target.end_tokens
        answers: dict[str, Answer] = {
            GENERATE: theirs(peer, ends),
            "prompt lookup": theirs(peer, ends, prompt_lookup_num_tokens=options.lookup),
            **{f"cosched {name}": ours(arm) for name, arm in arms.items()},
        }
        if options.assistant:
            assistant = load_assistant(options.assistant, options.assisted, world.target.dtype)
            answers["assisted"] = theirs(peer, ends, assistant_model=assistant)
        own = as_rows(Path(prompts).stem, measure(answers, world.requests, list(arms.values())))
        for row in own:
            said = ", ".join(f"{name} {shown(figure)}" for name, figure in row.figures.items())
            print(f"{row.at['text']:<12}{row.at['arm']:<32}{said}", flush=True)
        rows += own
        write_figures(options.json, rows)


if __name__ == "__main__":
    main()
