"""Decode prompts with an SGLang engine of its own and print what came; run as a module.

Its argument is JSON: ``{"prompts": [[token, ...], ...], "tokens": n, "engine": {...}, "passes": n,
"abort": [request, tokens], "linger": seconds, "sampling": [{...}, ...], "repeat": n, "join": n}``. All prompts are decoded together,
each so many times, with the sampling parameters that stand at its place, if any do; and all as often as there are passes; in the
last one, the request to abort asks for ten times more and is given up after that many tokens. With
``join``, the first has said so many tokens when the others come. The
last line of the output is JSON: of the last pass a list of
``{"tokens": [...], "rounds": n, "cached": n, "retracted": n, "times": [[seconds, tokens], ...]}``,
the times being when there were so many tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def _pass(engine: Any, order: dict[str, Any], abort: list[int] | None) -> list[Any]:
    join, joined = order.get("join") or 0, asyncio.Event()

    async def one(number: int, prompt: list[int]) -> Any:
        if number and join:
            await joined.wait()
        name, aborted = f"request-{number}", bool(abort) and number == abort[0]
        wanted = order["tokens"] * (10 if aborted else 1)
        sampling = {"temperature": 0, "max_new_tokens": wanted, "ignore_eos": True}
        if order.get("sampling"):
            sampling |= order["sampling"][number % len(order["sampling"])]
        answers = await engine.async_generate(
            input_ids=prompt, sampling_params=sampling, rid=name, stream=True
        )
        times = []
        async for answer in answers:
            times.append([time.perf_counter(), len(answer["output_ids"])])
            if not number and len(answer["output_ids"]) >= join:
                joined.set()
            if aborted and len(answer["output_ids"]) >= abort[1]:
                engine.tokenizer_manager.abort_request(name)
        return {**answer, "times": times}

    prompts = order["prompts"] * order.get("repeat", 1)
    return await asyncio.gather(*(one(*each) for each in enumerate(prompts)))


def main() -> None:
    order = json.loads(sys.argv[1])
    import sglang

    settings = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "max_total_tokens": 8192,
        "max_running_requests": 4,
        "mem_fraction_static": 0.3,
        "skip_server_warmup": True,
        "log_level": "error",
        **order["engine"],
    }
    engine = sglang.Engine(**settings)
    passes = order.get("passes", 1)
    try:
        for number in range(passes):
            abort = order.get("abort") if number == passes - 1 else None
            answers = engine.loop.run_until_complete(_pass(engine, order, abort))
        time.sleep(order.get("linger", 0))
    finally:
        engine.shutdown()
    print()
    print(
        json.dumps(
            [
                {
                    "tokens": answer["output_ids"],
                    "rounds": answer["meta_info"].get("spec_verify_ct"),
                    "cached": answer["meta_info"]["cached_tokens"],
                    "retracted": answer["meta_info"].get("num_retractions"),
                    "times": answer["times"],
                }
                for answer in answers
            ]
        )
    )


if __name__ == "__main__":
    main()
