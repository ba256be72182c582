"""The versions of SGLang that we support: the installed one, and others from `make versions`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosched.settings.load import load_config, to_yaml
from tests.sglang.serving import ROOT, Decode, accept_length, tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

MAIN = "0.5.23"  # which `make sglang` installs
OTHERS = ("0.5.20", "0.5.21")  # which `make versions` puts before it

CHAIN = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
SHAPES = {"eagle3": CHAIN, "dflash": {"num_draft_tokens": 4}, "pard": CHAIN}
OFTEN = ("adapt.policy.rounds=4", "adapt.replay.anchors=32")
OVERRIDDEN = {
    "COSCHED_EAGLE3": {"verify"},
    "COSCHED_DFLASH": {"_append_target_hidden_to_draft_kv_by_loc"},
    "COSCHED_PARD": {"verify", "_validate_vocab_compatibility"},
}
OVERRIDDEN_BY_ALL = {"forward_batch_generation", "on_verify_complete_cpu", "note_request_finished"}
OVERRIDDEN_BY_PARD_DRAFT = {
    "init_attention_backend", "_capture_cuda_graphs", "draft", "_draft_extend_for_prefill",
    "_draft_extend_for_decode",
}  # fmt: skip
# Arguments that SGLang's methods take and ours do not.
PIPELINES = {"draft": ["with_topology"]}  # which we refuse
REFUSED = {("0.5.21", "draft of PARD"): PIPELINES, (MAIN, "draft of PARD"): PIPELINES}


@pytest.fixture(scope="module")
def environment(server_environment: dict[str, str]) -> Callable[[str], dict[str, str]]:
    """Of a process that finds this version first."""

    def of(version: str) -> dict[str, str]:
        if version == MAIN:
            return server_environment
        folder = ROOT / "build" / f"sglang-{version}"
        if not folder.is_dir():
            pytest.skip(f"no build/sglang-{version}, which `make versions` installs")
        paths = [str(folder), server_environment["PYTHONPATH"]]
        return {**server_environment, "PYTHONPATH": os.pathsep.join(paths)}

    return of


@pytest.fixture(scope="module")
def decoders(environment: Callable[[str], dict[str, str]]) -> Callable[[str], Decode]:
    """One a version: it remembers what the target says without a draft."""
    return functools.cache(lambda version: Decode(environment(version)))


@pytest.mark.parametrize("version", [*OTHERS, MAIN])
def test_all_that_we_use_is_there(version: str, environment: Any) -> None:
    """Names, targets of hooks, and methods that our workers take the place of: SGLang only logs a
    hook that leads nowhere, and a method that was renamed would never be called."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.sglang.names"],
        env=environment(version), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-8000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["version"] == version
    assert found["unresolved"] == {"backend": [], "cpu": []}
    assert found["targets"] == []
    workers = {name: more | OVERRIDDEN_BY_ALL for name, more in OVERRIDDEN.items()}
    workers["draft of PARD"] = OVERRIDDEN_BY_PARD_DRAFT
    assert found["workers"].keys() == workers.keys()
    for name, worker in found["workers"].items():
        assert set(worker["overridden"]) - {"__init__"} == workers[name], name
        assert worker["refused"] == REFUSED.get((version, name), {}), name
        assert worker["unknown"] == [], name


@pytest.mark.parametrize("version", OTHERS)
@pytest.mark.parametrize("kind", SHAPES)
def test_adapting_changes_the_speed_and_not_the_text(
    version: str, kind: str, decoders: Any, tmp_path: Path, report: Callable[[str], None]
) -> None:
    """Ten publications or more while four requests run: the text is that of no speculation."""
    decode = decoders(version)
    plain = decode("float32")
    words = [f"drafter.kind={kind}", *OFTEN]
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(load_config(ROOT / "configs" / "serve_tiny_cpu.yaml", words)))
    events = tmp_path / "events.jsonl"
    variables = {"COSCHED_CONFIG": str(config), "COSCHED_EVENTS": str(events)}
    algorithm = f"COSCHED_{kind.upper()}"
    adapted = decode("float32", algorithm, kind, variables=variables, **SHAPES[kind])
    assert tokens(adapted) == tokens(plain)
    kinds = [json.loads(line)["kind"] for line in events.read_text().splitlines()]
    assert "failure" not in kinds
    assert kinds.count("publication") >= 10
    report(
        f"SGLang {version}, {algorithm}: accept length {accept_length(adapted):.2f}, "
        f"{kinds.count('publication')} versions of the draft"
    )
    assert accept_length(adapted) > 1.3  # an untrained draft has 1.0
