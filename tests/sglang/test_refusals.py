"""What a worker refuses goes by what SGLang made of its arguments, not by what was typed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosched.engines.sglang import compat
from cosched.engines.sglang.launcher.launch import start_engine
from cosched.engines.sglang.worker.adapted import AdaptedWorker
from cosched.errors import ConfigError
from cosched.settings.load import load_config
from tests.sglang.serving import ROOT

pytestmark = pytest.mark.sglang

SPEC = {"speculative_eagle_topk": 1}
PARALLEL = {"attn_dp_size": 1, "pp_size": 1}


def check(monkeypatch: pytest.MonkeyPatch, changes_length: bool = False, **settled: Any) -> None:
    spec = {name: settled.get(name, value) for name, value in SPEC.items()}
    parallel = {name: settled.get(name, value) for name, value in PARALLEL.items()}
    monkeypatch.setattr(compat, "get_spec", lambda: SimpleNamespace(**spec))
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(**parallel))
    rest = {name: value for name, value in settled.items() if name not in {**SPEC, **PARALLEL}}
    worker: Any = SimpleNamespace(server_args=SimpleNamespace(**rest), takes_trees=False)
    AdaptedWorker._check(worker, changes_length)


@pytest.mark.parametrize(
    ("settled", "flag"),
    [
        ({"speculative_eagle_topk": 4}, "--speculative-eagle-topk 4"),
        ({"speculative_adaptive": True}, "--speculative-adaptive"),
        ({"attn_dp_size": 2}, "--attn-dp-size: .* got 2"),
        ({"pp_size": 2}, "--pp-size: .* got 2"),
        ({"enable_linear_replayssm_spec": True}, "--enable-linear-replayssm-spec"),
    ],
)
def test_what_cannot_be_watched_is_refused_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, settled: dict[str, Any], flag: str
) -> None:
    """The draft would learn from the rows of other requests, or of trees, as if they were a chain."""
    check(monkeypatch)
    with pytest.raises(ConfigError, match=flag):
        check(monkeypatch, **settled)


@pytest.mark.parametrize(
    ("mode", "flag"),
    [
        ("enable_two_batch_overlap", "--enable-two-batch-overlap"),
        ("enable_pdmux", "--enable-pdmux"),
        ("enable_hisparse", "--enable-hisparse"),
    ],
)
def test_modes_that_need_a_fixed_length_are_refused_with_another(
    monkeypatch: pytest.MonkeyPatch, mode: str, flag: str
) -> None:
    """SGLang refuses them beside its own ``--speculative-adaptive``, which it is not told of here."""
    check(monkeypatch, **{mode: True})
    with pytest.raises(ConfigError, match=rf"{flag}: .* drafter\.length"):
        check(monkeypatch, changes_length=True, **{mode: True})


def test_a_run_takes_one_replica(tmp_path: Path) -> None:
    """Each of two emptied the file of events that the other wrote, and figures were those of the first."""
    words = ["engine.arguments.dp_size=2", "adapt.sidecar.address=ipc:///tmp/nobody"]
    config = load_config(ROOT / "configs" / "sidecar_tiny_cpu.yaml", words)
    with pytest.raises(ConfigError, match=r"^engine\.arguments\.dp_size: .* use 1"):
        start_engine(config, events=tmp_path / "events.jsonl")
