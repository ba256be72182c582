"""What can be served, before SGLang is started; and what the plugin costs that nobody asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cosched import cli
from cosched.convert_checkpoint import convert
from cosched.engines.sglang.launcher import launch
from cosched.engines.sglang.launcher.launch import check_servable
from cosched.errors import ConfigError
from cosched.settings.load import load_config, to_yaml
from cosched.settings.schema import Config
from cosched.settings.serving import check_for_server
from tests.helpers.paths import ROOT
from tests.helpers.serving import TINY, config


@pytest.fixture
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("in_the_repository")
def test_a_draft_that_sglang_would_run_wrongly_is_refused(tmp_path: Path) -> None:
    """SGLang ignores what it does not know in a configuration, and drafts nonsense."""
    foreign = tmp_path / "foreign"
    convert(ROOT / "tinyworld/eagle3", foreign, "speculators", "eagle3", ())
    raw = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**raw, "norm_before_residual": True}))
    with pytest.raises(ConfigError, match=r"stock SGLang cannot run .*norm_before_residual"):
        check_servable(config(f"drafter.path={foreign}"))


@pytest.mark.usefixtures("in_the_repository")
def test_a_draft_in_a_foreign_format_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    """The command in the message is one that works."""
    foreign = tmp_path / "foreign"
    convert(ROOT / "tinyworld/eagle3", foreign, "speculators", "eagle3", ())
    with pytest.raises(ConfigError, match="cosched convert") as error:
        check_servable(config(f"drafter.path={foreign}"))
    words = str(error.value).partition("cosched convert ")[2].split()
    result = CliRunner().invoke(cli.app, ["convert", *words])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "foreign-sglang" / "config.json").exists()


@pytest.mark.usefixtures("in_the_repository")
def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """Before SGLang spends half a minute on its imports."""
    with pytest.raises(ConfigError, match=r"target\.path: nothing at"):
        check_servable(config(f"target.path={tmp_path / 'none'}"))


@pytest.mark.usefixtures("in_the_repository")
def test_without_sglang_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a traceback of an import."""
    monkeypatch.setattr(launch, "version_of", lambda _name: None)
    with pytest.raises(ConfigError, match="SGLang is not installed: pip install"):
        check_servable(config())


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("workload.prompts=tinyworld/prompts/code.jsonl", "workload.prompts"),
        ("workload.temperature=0.7", "workload.temperature"),
        ("arms=[adapted]", "arms"),
        ("variants={other: {}}", "variants"),
        ("record.max_bytes=1", "record.max_bytes"),
        ("engine.trace=x", "engine.trace"),
        ("engine.pack=false", "engine.pack"),
        ("engine.tree_rule=k_sequential", "engine.tree_rule"),
        ("adapt.replay.teacher_top_k=8", "adapt.replay.teacher_top_k"),
    ],
)
@pytest.mark.usefixtures("in_the_repository")
def test_what_only_an_experiment_reads_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    """It would have no effect: who sets a temperature there believes that the server has it."""
    monkeypatch.setattr(launch, "version_of", lambda _name: "0.5.23")
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: .*no effect.*run, engine, target"):
        check_servable(config(override))


@pytest.mark.usefixtures("in_the_repository")
def test_a_rule_of_acceptance_is_not_told_to_sglang() -> None:
    """It would be ignored there: SGLang has a rule of its own, and cosched goes by that."""
    with pytest.raises(ConfigError, match=r"engine\.acceptance: SGLang .*'target_only'"):
        config("engine.acceptance=target_only")


@pytest.mark.usefixtures("in_the_repository")
def test_rejection_sampling_is_refused_on_a_cpu_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"speculative_use_rejection_sampling: .* GPUs only"):
        check_servable(config("engine.arguments.speculative_use_rejection_sampling=true"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("serve_*.yaml")), ids=lambda path: path.stem
)
def test_a_server_can_be_started_from_the_settings_that_a_start_has_left(
    tmp_path: Path, path: Path
) -> None:
    """There every default is written out, those of experiments too: they are no mistake."""
    loaded = load_config(path)
    check_for_server(loaded)
    (tmp_path / "config.yaml").write_text(to_yaml(loaded))
    check_for_server(load_config(tmp_path / "config.yaml"))


@pytest.mark.parametrize("at", [None, 0, 1, 3, 6])
def test_words_before_the_first_dashes_are_settings(
    monkeypatch: pytest.MonkeyPatch, at: int | None
) -> None:
    """The rest is SGLang's, whatever it looks like, but for --resume: that may stand anywhere."""
    calls: list[tuple[Config, list[str], bool]] = []
    monkeypatch.setattr(launch, "serve", lambda *given: calls.append(given))
    words = ["run.name=x", "--port", "1", "a=b", "-v", "--help"]
    said = words if at is None else [*words[:at], "--resume", *words[at:]]
    result = CliRunner().invoke(cli.app, ["serve", "-c", str(TINY), *said])
    assert result.exit_code == 0, result.output
    loaded, rest, resume = calls[0]
    assert (loaded.run.name, rest, resume) == ("x", words[1:], at is not None)


def test_every_start_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """A server that is restarted by its supervisor must not be refused, nor replace anything."""
    loaded = config(f"run.dir={tmp_path}")
    first, second = (launch._folder_of_start(loaded) for _ in range(2))
    assert first != second
    assert load_config(second / "config.yaml") == load_config(first / "config.yaml")


def test_an_installed_plugin_that_nobody_configured_costs_nothing() -> None:
    """It is loaded in every process of every SGLang server of the machine."""
    code = (
        "import sys, time, os, typing\n"  # SGLang has these anyway
        "os.environ.pop('COSCHED_CONFIG', None)\n"
        "before = time.process_time()\n"
        "from cosched.sglang_entry import install; install()\n"
        "spent = time.process_time() - before\n"
        "heavy = {'torch', 'numpy', 'msgspec', 'omegaconf', 'cosched.build', 'sglang'}\n"
        "print(spent, *sorted(heavy & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    spent, *heavy = process.stdout.split()
    assert heavy == []
    assert float(spent) < 0.05  # seconds of processor time: a busy machine does not slow it down
