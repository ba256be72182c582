"""What cosched costs and brings inside SGLang, arms side by side on the same prompts.

Usage: python benchmarks/bench_sglang.py [-c configs/serve_tiny_cpu.yaml] [--pairs 8]
           [--tokens 256] [--prompts FILE ...] [--batch 1 ...] [--in-turn] [--standalone FOLDER]
           [--arm NAME[/key=value]...]... [--json FILE] [--rows FILE] [key=value ...]

An arm is ``plain`` (no draft), ``stock`` (SGLang's own algorithm), ``never`` (our worker, a policy
that never trains), ``watching`` (rows are taken, never trained on) or ``adapted``, each with
settings of its own behind it: ``adapted/adapt.trainer.background=true``. ``adaptive``, ``standalone`` and
``ngram`` are what else SGLang itself has: as many tokens as pay, an ordinary model as a draft
(``--standalone``), and copies of what was said before. Every arm is an engine in a
process of its own; in each pair all decode the same prompts greedily, in rotating order, so that
the machine's drift hits all. ``--in-turn`` starts them one after the other, where memory holds one
only. Ratios are medians over pairs of seconds against the arm ``stock`` (or the first). Several
files of prompts, and several numbers of requests at once, are decoded one after the other by the same
engines, and each has its table as soon as it is done. Answers go on behind their end, so that all are
of the same length: "repeats" is the share of their tokens that follow four tokens which had occurred
before, and "tau novel" leaves those out.

``--rows`` keeps of each pair its seconds and a digest of each answer, so that arms that were measured one
by one can be compared later (``compare``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEFAULT_ARMS = ["stock", "never", "watching", "adapted"]
WATCHING = ["adapt.policy.kind=every_n_rounds", "adapt.policy.rounds=1000000000"]
POLICY = {"never": ["adapt.policy.kind=never"], "watching": WATCHING}
PEERS: dict[str, dict[str, Any]] = {
    "adaptive": {"speculative_adaptive": True},
    "standalone": {"speculative_algorithm": "STANDALONE", "speculative_eagle_topk": 1},
    "ngram": {"speculative_algorithm": "NGRAM"},
}
"""Arguments of SGLang's, beside those of ``stock``, or of ``plain`` where the algorithm is another."""


# --- an arm, in a process of its own -------------------------------------------------------------


async def decode(engine: Any, order: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once; times of every piece of text that arrived."""
    sampling = {"temperature": order["temperature"], "max_new_tokens": order["tokens"]}
    sampling["ignore_eos"] = True

    async def one(prompt: list[int]) -> dict[str, Any]:
        arrivals: list[float] = []
        lengths: list[int] = []
        answer: dict[str, Any] = {}
        stream = await engine.async_generate(
            input_ids=prompt, sampling_params=sampling, stream=True
        )
        async for piece in stream:
            arrivals.append(time.perf_counter())
            lengths.append(len(piece["output_ids"]))
            answer = piece
        return {
            "tokens": answer["output_ids"],
            "lengths": lengths,
            "rounds": answer["meta_info"].get("spec_verify_ct"),
            "gaps": [b - a for a, b in itertools.pairwise(arrivals)],
        }

    started = time.perf_counter()
    answers = await asyncio.gather(*(one(prompt) for prompt in order["prompts"]))
    return {"seconds": time.perf_counter() - started, "answers": answers}


def speculation_of(name: str) -> Any:
    """Whose worker drafts."""
    if name in PEERS:
        return "plain" if "speculative_algorithm" in PEERS[name] else "stock"
    return name if name in {"plain", "stock"} else "adapted"


def arguments_of(name: str, config: Any, standalone: str | None) -> dict[str, Any]:
    """What SGLang is told beside the file's settings."""
    arguments = {"log_level": "error", "sleep_on_idle": True, **PEERS.get(name, {})}
    number = config.drafter_settings.num_draft_tokens
    if "speculative_algorithm" in arguments:
        arguments["speculative_num_draft_tokens"] = number + 1
    if name == "standalone":
        arguments |= {"speculative_num_steps": number, "speculative_draft_model_path": standalone}
    return arguments


def serve_arm(name: str, config_file: str, overrides: list[str], standalone: str | None) -> None:
    """Decode every order on standard input; one line of JSON each."""
    from cosched.engines.sglang.launcher.launch import start_engine
    from cosched.settings.load import load_config

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints is not an answer
    config = load_config(Path(config_file), [*overrides, *POLICY.get(name, [])])
    engine = start_engine(config, speculation_of(name), arguments_of(name, config, standalone))
    try:
        capacity = engine.get_server_info()["max_total_num_tokens"]
        print(json.dumps({"capacity": capacity}), file=answers, flush=True)
        for line in sys.stdin:
            result = engine.loop.run_until_complete(decode(engine, json.loads(line)))
            client = getattr(engine, "cosched", None)
            if client is not None:
                import msgspec

                result["status"] = msgspec.to_builtins(client.status())
            print(json.dumps(result), file=answers, flush=True)
    finally:
        engine.shutdown()


# --- all of them ---------------------------------------------------------------------------------


class Arm:
    """A running engine that takes orders."""

    def __init__(self, spec: str, options: argparse.Namespace) -> None:
        name, *own = spec.split("/")
        self.spec = spec
        command = [sys.executable, __file__, "--serve-arm", name, "-c", options.config]
        if options.standalone:
            command += ["--standalone", options.standalone]
        self.process = subprocess.Popen(
            [*command, *options.overrides, *own],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.capacity = self._answer()["capacity"]
        self.results: list[dict[str, Any]] = []  # of the current text and number of requests

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the arm {self.spec} ended: see what it printed above")
        return json.loads(line)

    def decode(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.results.append({**self._answer(), "prompts": order["prompts"]})

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)


@dataclass(frozen=True)
class Work:
    """What is decoded for one table: a text, so many requests at once, an order for each pair and one before."""

    text: str
    requests: int
    orders: list[dict[str, Any]]


def all_work(config: Any, options: argparse.Namespace) -> list[Work]:
    """Different prompts in each order, so that no answer comes from a cache."""
    import torch

    from cosched.engines.embedded.target import load_tokenizer
    from cosched.settings.sections import WorkloadSettings
    from cosched.workload.requests import load_requests

    tokenizer, work, number = load_tokenizer(config.target.folder), list[Work](), 0
    for file, size in itertools.product(options.prompts, options.batch):
        asked = WorkloadSettings(prompts=str(file), max_new_tokens=options.tokens)
        requests = load_requests(asked, tokenizer, 8192, torch.device("cpu"))
        ids = [request.prompt_P.tolist() for request in requests]
        orders = list[dict[str, Any]]()
        for pair in range(options.pairs + 1):
            batch = [ids[(pair * size + i) % len(ids)] for i in range(size)]
            number += 1
            # Another first token each time: nothing of the prompt is in the prefix cache.
            prompts = [[number, *prompt] for prompt in batch]
            orders.append(
                {"prompts": prompts, "tokens": options.tokens, "temperature": options.temperature}
            )
        work.append(Work(Path(file).stem, size, orders))
    return work


def run(
    arms: list[str], options: argparse.Namespace, work: list[Work]
) -> Iterator[list[dict[str, Any]]]:
    """Every arm on every order: the rows of each piece of work, as it is done."""
    if options.in_turn:
        by_arm: list[list[dict[str, Any]]] = []
        for spec in arms:
            arm = Arm(spec, options)
            with contextlib.closing(arm):
                by_arm.append([decode_all([arm], part)[0] for part in work])
        yield from map(list, zip(*by_arm, strict=True))
        return
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(contextlib.closing(Arm(spec, options))) for spec in arms]
        for part in work:
            yield decode_all(running, part)


def decode_all(arms: list[Arm], part: Work) -> list[dict[str, Any]]:
    """A row of each arm, which decode in rotating order."""
    for arm in arms:
        arm.results = []
    for number, order in enumerate(part.orders):
        turn = number % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            arm.decode(order)
    return [figures(arm, part) for arm in arms]


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures(arm: Arm, part: Work) -> dict[str, Any]:
    """What an arm did with this work; its first order warmed up and does not count."""
    from cosched.telemetry.metrics import novel_positions

    before, *results = arm.results
    answers = [answer for result in results for answer in result["answers"]]
    gaps = [gap for answer in answers for gap in answer["gaps"]]
    tokens = sum(len(answer["tokens"]) for answer in answers)
    rounds = sum(answer["rounds"] or len(answer["tokens"]) - 1 for answer in answers)
    repeated, novel = 0, list[int]()
    for result in results:
        for prompt, answer in zip(result["prompts"], result["answers"], strict=True):
            is_novel = novel_positions([*prompt, *answer["tokens"]])[len(prompt) :]
            repeated += is_novel.count(False)
            steps = itertools.pairwise(answer["lengths"])
            novel += [end - start for start, end in steps if is_novel[start]]
    seconds = [result["seconds"] for result in results]
    status = results[-1].get("status") or {}
    spent = {
        part: status.get(f"{part}_seconds", 0.0)
        - (before.get("status") or {}).get(f"{part}_seconds", 0.0)
        for part in ("update", "background", "publish")
    }
    updating = spent["update"] + spent["background"]
    return {
        "arm": arm.spec,
        "text": part.text,
        "requests": part.requests,
        "tokens/s": tokens / sum(seconds),
        "tau": (tokens - len(answers)) / rounds,
        "tau novel": statistics.mean(novel),
        "repeats": repeated / tokens,
        "ms a round": 1e3 * sum(seconds) / rounds,
        "gap p50 ms": 1e3 * statistics.median(gaps),
        "gap p99 ms": 1e3 * quantile(gaps, 0.99),
        "versions": status.get("draft_version", 0),
        "learning": (updating + spent["publish"]) / sum(seconds),
        "hidden": spent["background"] / updating if updating else 0.0,
        "KV tokens": arm.capacity,
        "pairs": [
            {
                "seconds": result["seconds"],
                "texts": [digest(answer["tokens"]) for answer in result["answers"]],
            }
            for result in results
        ],
    }


def digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]


def compare(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """A row beside another one of as many requests on the same prompts; without its pairs."""
    pairs = list(zip(row["pairs"], reference["pairs"], strict=True))
    texts = [
        (a, b) for mine, other in pairs for a, b in zip(mine["texts"], other["texts"], strict=True)
    ]
    beside = {
        "time / stock": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "p99 / stock": row["gap p99 ms"] / reference["gap p99 ms"],
        "other text": f"{sum(a != b for a, b in texts)} of {len(texts)}",
    }
    return {**{name: value for name, value in row.items() if name != "pairs"}, **beside}


def as_row(row: dict[str, Any], reference: dict[str, Any]) -> Any:
    """What ``--json`` has: units, and intervals of what is paired."""
    from cosched.bench.figures import Figure, Row, median_of

    pairs = zip(row["pairs"], reference["pairs"], strict=True)
    at = {"text": row["text"], "requests": str(row["requests"]), "arm": row["arm"]}
    found = {
        "tokens_per_s": Figure(value=row["tokens/s"], unit="tokens/s"),
        "of_stock": median_of([b["seconds"] / a["seconds"] for a, b in pairs], "times"),
        "tau": Figure(value=row["tau"], unit="tokens a round"),
        "tau_novel": Figure(value=row["tau novel"], unit="tokens a round"),
        "repeats": Figure(value=row["repeats"], unit="share"),
        "ms_a_round": Figure(value=row["ms a round"], unit="ms"),
        "p99_ms": Figure(value=row["gap p99 ms"], unit="ms"),
        "p99_of_stock": Figure(value=compare(row, reference)["p99 / stock"], unit="times"),
        "versions": Figure(value=row["versions"], unit="count"),
    }
    return Row(at, found)


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    cells = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" for _ in names) + " |")
    for line in cells:
        print("| " + " | ".join(line) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", default="configs/serve_tiny_cpu.yaml")
    parser.add_argument("--arm", action="append", dest="arms")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--in-turn", action="store_true")
    parser.add_argument(
        "--prompts", nargs="+", default=[str(ROOT / "tinyworld/prompts/translated.jsonl")]
    )
    parser.add_argument("--standalone", help="an ordinary model that drafts: the arm needs it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--rows", type=Path, help="write each arm's pairs here")
    parser.add_argument("--serve-arm", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    if options.serve_arm:
        serve_arm(options.serve_arm, options.config, options.overrides, options.standalone)
        return
    if "standalone" in (options.arms or []) and not options.standalone:
        parser.error(
            "the arm standalone needs --standalone FOLDER, a smaller model with the target's tokens"
        )
    from cosched.bench.figures import write_figures
    from cosched.settings.load import load_config

    config = load_config(ROOT / options.config, options.overrides)
    rows, found = list[dict[str, Any]](), list[Any]()
    for done in run(options.arms or DEFAULT_ARMS, options, all_work(config, options)):
        reference = next((row for row in done if row["arm"] == "stock"), done[0])
        show([compare(row, reference) for row in done])
        found += [as_row(row, reference) for row in done]
        rows += done
        write_figures(options.json, found)
        if options.rows:
            options.rows.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
