"""What SGLang is given: arguments that follow from the settings, and the user's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosched.engines.sglang.launcher.arguments import (
    command_line,
    fixed_arguments,
    keyword_arguments,
)
from cosched.engines.sglang.launcher.launch import check_draft_servable
from cosched.engines.sglang.worker.algorithms import algorithms, has_worker
from cosched.errors import ConfigError, PluginError
from cosched.records import SglangWorker
from cosched.registry import DRAFTERS
from cosched.settings.load import load_config
from tests.helpers.paths import ROOT
from tests.helpers.serving import config, sglang_parser

CONFIGS = sorted((ROOT / "configs").glob("serve_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_valid_and_means_something_to_sglang(path: Path) -> None:
    """A user starts from these files: a key that the schema dropped must not stay in them."""
    arguments = fixed_arguments(load_config(path))
    assert arguments["model_path"].key == "target.path"
    assert arguments["speculative_algorithm"].value.startswith("COSCHED_")


def test_sglang_counts_the_anchor_among_the_drafts() -> None:
    """K drafted tokens are K steps and K + 1 verified rows."""
    fixed = {name: setting.value for name, setting in fixed_arguments(config()).items()}
    assert fixed["speculative_num_steps"] == 3
    assert fixed["speculative_num_draft_tokens"] == 4
    assert fixed["speculative_eagle_topk"] == 1


def test_a_tree_has_as_many_tokens_as_it_has_in_the_embedded_engine() -> None:
    """``top_k`` at each depth; SGLang takes the likeliest of what it drafted, as many in all."""
    fixed = {name: one.value for name, one in fixed_arguments(config("drafter.top_k=4")).items()}
    assert fixed["speculative_eagle_topk"] == 4
    assert fixed["speculative_num_steps"] == 3
    assert fixed["speculative_num_draft_tokens"] == 13


def test_a_tree_does_not_change_its_length_in_sglang() -> None:
    with pytest.raises(ConfigError, match=r"drafter\.length\.kind: .* goodput .*drafter\.top_k: 4"):
        config("drafter.top_k=4", "drafter.length={kind: goodput}")


def test_dflash_drafts_a_block_in_one_step() -> None:
    """SGLang sets the steps and the width of DFLASH itself."""
    fixed = fixed_arguments(config("drafter.kind=dflash"))
    assert fixed["speculative_num_draft_tokens"].value == 4
    assert not {"speculative_num_steps", "speculative_eagle_topk"} & set(fixed)


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> type:
    """A drafter of another package, that brings a worker of its own."""

    class Stranger(DRAFTERS.get("eagle3")):
        """An EAGLE-3 of somebody else's."""

        sglang = SglangWorker("THEIRS", "stranger.worker:Worker", builtin="EAGLE", stock=False)

    monkeypatch.setattr(DRAFTERS, "_plugins", dict(DRAFTERS._plugins))
    return DRAFTERS.register("stranger")(Stranger)


def test_a_drafter_names_its_own_algorithm(stranger: type) -> None:
    """No table of ours has to know it: what is registered and asked of SGLang is what it names."""
    worker = stranger.sglang
    assert algorithms()["THEIRS"] == worker
    assert (
        fixed_arguments(config("drafter.kind=stranger"))["speculative_algorithm"].value == "THEIRS"
    )
    assert not has_worker(worker)
    with pytest.raises(ConfigError, match=r"no stranger; it has dflash, eagle3"):
        fixed_arguments(config("drafter.kind=stranger"), "stock")
    with pytest.raises(
        ConfigError, match=r"drafter\.kind: .*stranger\.worker:Worker.*no such module"
    ):
        check_draft_servable(config("drafter.kind=stranger"))


def test_one_algorithm_means_one_worker(stranger: type) -> None:
    """Two drafters may share it; if they differ, one would be served by the other's worker."""
    shared, stranger.sglang = stranger.sglang, DRAFTERS.get("eagle3").sglang
    assert "THEIRS" not in algorithms()
    stranger.sglang = replace(shared, algorithm="COSCHED_EAGLE3")
    with pytest.raises(
        PluginError, match=r"'stranger' names stranger\.worker:Worker .*COSCHED_EAGLE3"
    ):
        algorithms()


def test_stock_sglang_is_asked_for_its_own_algorithm() -> None:
    """The arm without cosched: the same arguments but for the algorithm."""
    ours, stock = (fixed_arguments(config(), kind) for kind in ("adapted", "stock"))
    assert stock.pop("speculative_algorithm").value == "EAGLE3"
    assert ours.pop("speculative_algorithm").value == "COSCHED_EAGLE3"
    assert ours == stock


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("auto", {}),
        ("cuda", {"device": "cuda"}),
        ("cuda:1", {"device": "cuda", "base_gpu_id": 1}),
        ("cpu", {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}),
    ],
)
def test_the_device_decides_what_follows_from_it(device: str, expected: dict[str, Any]) -> None:
    """``auto`` leaves the choice to SGLang."""
    fixed = fixed_arguments(config(f"engine.device={device}"))
    assert {n: s.value for n, s in fixed.items() if s.key == "engine.device"} == expected


def test_a_window_of_the_draft_reaches_sglang() -> None:
    """The arm +window and the server must mean the same by it."""
    fixed = fixed_arguments(config("drafter.window=96"))
    assert fixed["speculative_draft_window_size"].value == 96


def test_the_users_words_stand_last_and_unchanged() -> None:
    """Whatever SGLang takes passes through, word by word."""
    words = ["--port", "31000", "--enable-metrics", "--cuda-graph-bs", "1", "2"]
    line = command_line(config(), words, sglang_parser())
    assert line[-len(words) :] == words
    read = vars(sglang_parser().parse_args(line))
    assert read["model_path"] == "tinyworld/target"
    assert read["max_total_tokens"] == 16384
    assert read["disable_cuda_graph"] is True


def test_the_command_line_wins_over_the_files_arguments() -> None:
    """As it does for every other setting; only what our settings mean cannot be said twice."""
    line = command_line(config(), ["--max-total-tokens", "99"], sglang_parser())
    assert line.count("--max-total-tokens") == 1
    assert sglang_parser().parse_args(line).max_total_tokens == 99


def test_arguments_of_the_file_take_every_form() -> None:
    """Lists, flags, and flags that can be switched off."""
    loaded = config(
        "engine.arguments.cuda_graph_bs=[1,2]",
        "engine.arguments.enable_metrics=true",
        "engine.arguments.fdfo=false",
    )
    read = sglang_parser().parse_args(command_line(loaded, [], sglang_parser()))
    assert (read.cuda_graph_bs, read.enable_metrics, read.fdfo) == ([1, 2], True, False)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model-path", "other"], ["--model-path", "target.path", "tinyworld/target"]),
        (["--model", "other"], ["--model-path", "target.path"]),
        (["--speculative-algorithm=EAGLE3"], ["--speculative-algorithm", "drafter.kind"]),
        (["--max-running-requests", "8"], ["--max-running-requests", "engine.max_batch"]),
        (["--dp-size", "2"], ["--dp-size", "2 replicas", "adapt.placement: sidecar"]),
    ],
)
def test_a_word_that_contradicts_a_setting_is_refused(words: list[str], named: list[str]) -> None:
    """One of the two would be ignored silently; the message names both."""
    with pytest.raises(ConfigError) as error:
        command_line(config(), words, sglang_parser())
    assert all(name in str(error.value) for name in named)


def test_a_word_that_says_the_same_is_no_contradiction() -> None:
    """Start scripts that name the model keep working."""
    command_line(config(), ["--model-path", "tinyworld/target"], sglang_parser())


def test_an_unknown_argument_of_the_file_is_refused_with_the_nearest() -> None:
    """A misspelt name must not be dropped."""
    with pytest.raises(ConfigError, match=r"engine\.arguments\.max_total_token.*max_total_tokens"):
        command_line(config("engine.arguments.max_total_token=5"), [], sglang_parser())


def test_an_engine_refuses_the_same() -> None:
    """Who embeds SGLang gets the same messages."""
    ours = {"max_total_tokens", "mem_fraction_static", "sleep_on_idle"}
    allowed = {"model_path", "log_level", *ours}
    merged = keyword_arguments(config(), {"log_level": "error"}, allowed)
    assert merged["log_level"] == "error"
    assert merged["model_path"] == "tinyworld/target"
    with pytest.raises(ConfigError, match=r"model_path.*target\.path"):
        keyword_arguments(config(), {"model_path": "other"}, allowed)
    with pytest.raises(ConfigError, match=r"log_leve.*log_level"):
        keyword_arguments(config(), {"log_leve": "error"}, allowed)


def test_an_engine_of_another_kind_is_not_served() -> None:
    """Settings of the embedded engine were made for other costs."""
    with pytest.raises(ConfigError, match=r"engine\.kind.*sglang"):
        fixed_arguments(config("engine.kind=embedded", "workload.prompts=x"))
