"""The public chat model that the README serves on a laptop; skipped where nobody has fetched it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from cosched.settings.load import load_config
from tests.sglang.server import Start
from tests.sglang.serving import ROOT, Decode, tokens

CONFIG = "configs/serve_smollm2_cpu.yaml"
MODEL = ROOT / "models/SmolLM2-135M-Instruct"
DRAFT = ROOT / "models/drafts/eagle3"
QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that checks whether a number is prime.",
)
LENGTH = 64

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (MODEL.is_dir() and DRAFT.is_dir()),
        reason="the model or its draft is not in models/: cosched realworld fetch",
    ),
]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_a_chat_is_the_models_own_whatever_the_draft_has_learnt(
    start: Start, decode: Decode
) -> None:
    """Asked with the model's chat template, streamed or not, two at once and again: over ten versions
    of the draft the greedy answers are those of SGLang without a draft."""
    assert load_config(ROOT / CONFIG).target.path == str(MODEL.relative_to(ROOT))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [
        tokenizer.apply_chat_template(chat(q), add_generation_prompt=True, return_dict=False)
        for q in QUESTIONS
    ]
    plain = decode(
        "float32", texts=texts, num_tokens=LENGTH, engine={"model_path": str(MODEL)}
    )  # fmt: skip
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens(plain)]
    server = start(
        "adapt.policy={kind: every_n_rounds, rounds: 8}",
        "adapt.guard={kind: finite}",
        "adapt.trainer.lr=1.0e-3",
        config=CONFIG,
        COSCHED_TEST_SPAWN="1",
    )
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:

        def asked(number: int, **more: Any) -> Any:
            return client.chat.completions.create(
                model="x",
                messages=chat(QUESTIONS[number]),
                max_tokens=LENGTH,
                temperature=0,
                **more,
            )

        for times in range(12):  # a trainer has its time where the machine has some
            if times >= 2 and server.get("/cosched/status")["draft_version"] >= 10:
                break
            with ThreadPoolExecutor(2) as pool:
                answers = list(pool.map(asked, range(2)))
            assert [answer.choices[0].message.content for answer in answers] == expected
            assert [answer.usage.prompt_tokens for answer in answers] == list(map(len, texts))
        pieces = [piece.choices[0].delta.content or "" for piece in asked(0, stream=True)]
        assert len(pieces) > 8
        assert "".join(pieces) == expected[0]
    status = server.get("/cosched/status")
    assert status["draft_version"] >= 10
    assert status["failure"] is None
    assert server.stop() == 0
