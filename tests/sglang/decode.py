"""Decode prompts with an SGLang engine of its own and print what came; run as a module.

Its argument is JSON: ``{"prompts": [[token, ...], ...], "tokens": n, "engine": {...}}``. The last
line of the output is JSON: a list of ``{"tokens": [...], "rounds": n}``.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    order = json.loads(sys.argv[1])
    import sglang

    engine = sglang.Engine(
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        max_total_tokens=8192,
        max_running_requests=4,
        mem_fraction_static=0.3,
        skip_server_warmup=True,
        log_level="error",
        **order["engine"],
    )
    try:
        sampling = {"temperature": 0, "max_new_tokens": order["tokens"], "ignore_eos": True}
        answers = engine.generate(input_ids=order["prompts"], sampling_params=sampling)
    finally:
        engine.shutdown()
    print()
    print(
        json.dumps(
            [
                {
                    "tokens": answer["output_ids"],
                    "rounds": answer["meta_info"].get("spec_verify_ct"),
                }
                for answer in answers
            ]
        )
    )


if __name__ == "__main__":
    main()
