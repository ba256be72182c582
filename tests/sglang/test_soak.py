"""Half an hour of mixed requests, while the trainer is lost: no memory, no request and no text is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.sglang.serving import ROOT
from tests.sglang.soak import SOCKET, Plan, Soak

CONFIG = "configs/serve_smollm2_cpu.yaml"
MINUTES = float(os.environ.get("COSCHED_SOAK", "0"))

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.timeout(900 + 90 * MINUTES),
    pytest.mark.skipif(not MINUTES, reason="it takes half an hour, twice: make soak"),
    pytest.mark.skipif(
        not (ROOT / "models/drafts/eagle3").is_dir(),
        reason="the model or its draft is not in models/: cosched realworld fetch",
    ),
]


def plan_of(placement: str, folder: Path) -> Plan:
    """Chats of all kinds with the real model, whose trainer is beside it or elsewhere. It learns and publishes
    all along, whether that pays or not: on texts like these the file's own policy hardly trains."""
    words = [
        "adapt.policy={kind: every_n_rounds, rounds: 16, num_steps: 1}",
        "adapt.guard={kind: finite}",
        f"adapt.sidecar.address=ipc://{folder}/{SOCKET}",
        "adapt.sidecar.limit_seconds=4",
    ]
    if placement == "sidecar":  # it refuses to be trained in the background
        words += ["adapt.trainer.background=false", "adapt.checkpoint.every_minutes=1"]
    else:
        words.append("adapt.trainer.restarts=100")
    texts = [
        json.loads(line)["messages"][0]["content"][:1200]
        for name in ("chat", "languages", "formats", "summaries")
        for line in (ROOT / f"realworld/prompts/{name}.jsonl").read_text().splitlines()
    ]
    return Plan(CONFIG, words, texts, MINUTES, placement)


@pytest.mark.parametrize("placement", ["colocated", "sidecar"])
def test_it_is_as_well_in_the_end_as_in_the_beginning(
    placement: str,
    bare_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Requests of five clients and an operator, some wrong, some given up. Figures go into ``build/``."""
    folder = tmp_path_factory.mktemp("soak")
    soak = Soak(plan_of(placement, folder), folder, bare_environment)
    figures = soak.run()
    figures.write(ROOT / "build" / f"soak-{placement}.json")
    with capsys.disabled():
        Console().print(figures.table())
    assert list(figures.wrong()) == []
