"""Serving without SGLang: its arguments, operators' requests, reports, what the plugin costs."""

from __future__ import annotations

import argparse
import json
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cosched import cli
from cosched.convert_checkpoint import convert
from cosched.engines.sglang.launcher import launch
from cosched.engines.sglang.launcher.arguments import (
    command_line,
    fixed_arguments,
    keyword_arguments,
)
from cosched.engines.sglang.launcher.launch import check_servable
from cosched.engines.sglang.launcher.run_directory import RunDirectory
from cosched.engines.sglang.operators import routes
from cosched.engines.sglang.operators.control import Client, SocketOperator, check
from cosched.engines.sglang.worker.adaptation import Command, Status
from cosched.errors import ConfigError, ControlError
from cosched.settings.load import load_config, to_yaml
from cosched.settings.schema import Config
from cosched.settings.serving import check_for_server

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("serve_*.yaml"))
TINY = ROOT / "configs" / "serve_tiny_cpu.yaml"

STATUS = Status(
    algorithm="COSCHED_EAGLE3",
    adapting=True,
    failure=None,
    warning=None,
    draft_version=3,
    rounds=10,
    acceptance_length=2.5,
    recent_acceptance_length=2.25,
    updates=4,
    skipped_steps=0,
    starved_decisions=0,
    update_seconds=1.0,
    background_seconds=0.0,
    publish_seconds=0.5,
    draft_seconds=2.0,
    verify_seconds=3.0,
    last_loss=0.1,
)


def config(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def sglang_parser() -> argparse.ArgumentParser:
    """A few of SGLang's arguments, in each of the forms that it declares them in."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", "--model", required=True)
    for name in ("--dtype", "--device", "--attention-backend", "--api-key"):
        parser.add_argument(name)
    for name in ("--speculative-algorithm", "--speculative-draft-model-path"):
        parser.add_argument(name)
    for name in (
        "--max-running-requests", "--random-seed", "--speculative-num-steps", "--dp-size", "--port",
        "--speculative-eagle-topk", "--speculative-num-draft-tokens", "--max-total-tokens",
        "--speculative-draft-window-size",
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=1)
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--cuda-graph-bs", type=int, nargs="+")
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--fdfo", action=argparse.BooleanOptionalAction, default=True)
    return parser


# --- arguments ------------------------------------------------------------------------------


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


def test_dflash_drafts_a_block_in_one_step() -> None:
    """SGLang sets the steps and the width of DFLASH itself."""
    fixed = fixed_arguments(config("drafter.kind=dflash"))
    assert fixed["speculative_num_draft_tokens"].value == 4
    assert not {"speculative_num_steps", "speculative_eagle_topk"} & set(fixed)


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
        (["--dp-size", "2"], ["--dp-size", "1", "replica"]),
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
    allowed = {"model_path", "max_total_tokens", "mem_fraction_static", "log_level"}
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


# --- what can be served ---------------------------------------------------------------------


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
        ("workload.prompts=x.jsonl", "workload.prompts"),
        ("workload.temperature=0.7", "workload.temperature"),
        ("arms=[adapted]", "arms"),
        ("variants={other: {}}", "variants"),
        ("record.max_bytes=1", "record.max_bytes"),
        ("engine.trace=x", "engine.trace"),
        ("engine.pack=false", "engine.pack"),
        ("adapt.replay.teacher_top_k=8", "adapt.replay.teacher_top_k"),
    ],
)
@pytest.mark.usefixtures("in_the_repository")
def test_what_only_an_experiment_reads_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    """It would have no effect: who sets a temperature there believes that the server has it."""
    monkeypatch.setattr(launch, "version_of", lambda _name: "0.5.20")
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: .*no effect.*run, engine, target"):
        check_servable(config(override))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_server_can_be_started_from_the_settings_that_a_start_has_left(
    tmp_path: Path, path: Path
) -> None:
    """There every default is written out, those of experiments too: they are no mistake."""
    loaded = load_config(path)
    check_for_server(loaded)
    (tmp_path / "config.yaml").write_text(to_yaml(loaded))
    check_for_server(load_config(tmp_path / "config.yaml"))


def test_words_before_the_first_dashes_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is SGLang's, whatever it looks like."""
    calls: list[tuple[Config, list[str]]] = []
    monkeypatch.setattr(launch, "serve", lambda *given: calls.append(given))
    words = ["run.name=x", "--port", "1", "a=b", "-v", "--help"]
    result = CliRunner().invoke(cli.app, ["serve", "-c", str(TINY), *words])
    assert result.exit_code == 0, result.output
    loaded, rest = calls[0]
    assert (loaded.run.name, rest) == ("x", words[1:])


def test_every_start_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """A server that is restarted by its supervisor must not be refused, nor replace anything."""
    loaded = config(f"run.dir={tmp_path}")
    first, second = (launch._folder_of_start(loaded) for _ in range(2))
    assert first != second
    assert load_config(second / "config.yaml") == load_config(first / "config.yaml")


# --- reports --------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[RunDirectory]:
    made = RunDirectory.create("run: {name: x}")
    yield made
    made.remove()
    assert not made.path.exists()


def test_the_shared_folder_is_private(directory: RunDirectory) -> None:
    """Who can write there can command the server."""
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_a_rank_that_did_not_report_stops_the_launch(directory: RunDirectory) -> None:
    """SGLang only logs a plugin that fails: without this the server would run unadapted."""
    directory.report(0, "COSCHED_EAGLE3")
    directory.check_reports(1)
    with pytest.raises(ConfigError, match="no adapting worker reported from rank 1 of 2"):
        directory.check_reports(2)


def test_the_reason_of_a_rank_that_failed_is_told(directory: RunDirectory) -> None:
    """It is in another process's log otherwise, under a traceback."""
    directory.report(0, "COSCHED_EAGLE3", "adapt.scope.kind: no such scope")
    with pytest.raises(ConfigError, match=r"cannot start: adapt\.scope\.kind"):
        directory.check_reports(1)


# --- control --------------------------------------------------------------------------------


@contextmanager
def served(
    directory: RunDirectory,
    answer: Callable[[Command], Status | str] | None,
    patience: float = 20.0,
    **options: Any,
) -> Iterator[tuple[Client, SocketOperator]]:
    """An operator, with a thread that plays the scheduler; none where ``answer`` is None."""
    operator = SocketOperator(directory.socket, patience=patience, **options)
    stop = threading.Event()

    def schedule() -> None:
        while not stop.wait(0.002):
            for command, reply in operator.asked():
                reply(answer(command))  # type: ignore[misc]

    thread = threading.Thread(target=schedule) if answer else None
    if thread:
        thread.start()
    try:
        yield Client(directory.socket), operator
    finally:
        stop.set()
        if thread:
            thread.join()
        operator.close()


def test_a_command_reaches_the_scheduler_and_its_answer_comes_back(directory: RunDirectory) -> None:
    """Every verb, with what belongs to it."""
    seen: list[Command] = []

    def answer(command: Command) -> Status:
        seen.append(command)
        return STATUS

    with served(directory, answer) as (client, _):
        assert stat.S_IMODE(directory.socket.stat().st_mode) == 0o600
        assert client.status() == client.on() == client.off() == client.rollback(3) == STATUS
    assert [command.verb for command in seen] == ["status", "on", "off", "rollback"]
    assert seen[-1].version == 3


def test_a_refusal_comes_back_as_the_message_that_it_is(directory: RunDirectory) -> None:
    """The scheduler knows which versions are kept."""
    with (
        served(directory, lambda _: "version 7 is not kept") as (client, _),
        pytest.raises(ControlError, match="version 7 is not kept"),
    ):
        client.rollback(7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "malformed"),
        (b'{"verb": "dance"}\n', "dance.*there are status, on"),
        (b'{"verb": "rollback"}\n', "version must be 0 or more, got None"),
        (b'{"verb": "save", "path": "relative"}\n', "path must be absolute"),
        (b"\n", "truncated|malformed"),
    ],
)
def test_nonsense_on_the_socket_is_answered(
    directory: RunDirectory, line: bytes, message: str
) -> None:
    """It never gets as far as the scheduler, and the next client is served."""
    import re
    import socket

    with served(directory, None) as (client, operator):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(directory.socket))
            connection.sendall(line)
            reply = json.loads(connection.makefile().readline())
        assert re.search(message, reply["error"], re.IGNORECASE), reply
        assert operator.asked() == []
        assert client is not None


def test_a_scheduler_that_does_not_come_round_is_not_waited_for(directory: RunDirectory) -> None:
    """And what was not taken is not done later, when nobody expects it any more."""
    with served(directory, None, patience=0.05) as (client, operator):
        reply = client.reply(Command(verb="off"))
        assert reply.late
        assert "withdrawn" in (reply.error or "")
        assert operator.asked() == []


def test_a_command_that_was_taken_is_said_to_be_under_way(directory: RunDirectory) -> None:
    """It cannot be withdrawn: the message must not say so."""
    taken: list[Any] = []
    with served(directory, None, patience=0.2) as (client, operator):

        def take() -> None:
            while not taken:
                taken.extend(operator.asked())
                time.sleep(0.002)

        thread = threading.Thread(target=take)
        thread.start()
        reply = client.reply(Command(verb="on"))
        thread.join()
    assert "under way" in (reply.error or "")


def test_a_saved_folder_is_whole(directory: RunDirectory, tmp_path: Path) -> None:
    """It is written beside its place and moved there: no reader finds half a checkpoint."""

    def write(command: Command) -> Status:
        path = Path(command.path or "")
        assert path != tmp_path / "new"
        path.mkdir()
        (path / "config.json").write_text("{}")
        return STATUS

    with served(directory, write) as (client, _):
        client.save(tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        with pytest.raises(ControlError, match="new exists and is not empty"):
            client.save(tmp_path / "new")


def test_nobody_at_the_socket_is_said_plainly(tmp_path: Path) -> None:
    """The server has stopped, or it is another's."""
    with pytest.raises(ControlError, match="no server answers at"):
        Client(tmp_path / "control.sock").status()


def test_statuses_are_shown_now_and_then_and_the_last_one_always(directory: RunDirectory) -> None:
    """Metrics must not cost every round, and must not stay behind when rounds stop."""
    now, shown = [0.0], []
    operator = SocketOperator(directory.socket, show=shown.append, clock=lambda: now[0])
    try:
        statuses = [msgspec.structs.replace(STATUS, rounds=number) for number in range(5)]
        for status in statuses:
            operator.show(status)
        assert shown == statuses[:1]
        operator.asked()
        assert shown == statuses[:1]
        now[0] = 1.0
        operator.asked()  # an idle tick
        assert shown == [statuses[0], statuses[-1]]
        operator.asked()
        assert len(shown) == 2
        operator.show(msgspec.structs.replace(STATUS, failure="broken"))
        assert shown[-1].failure == "broken"
    finally:
        operator.close()


# --- routes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", "", ".hidden", "x" * 101, None, "a\n", "a b"]
)
def test_a_remote_caller_names_a_checkpoint_and_no_path(tmp_path: Path, name: str | None) -> None:
    """Who has the key of the API must not write where the server's user may."""
    with pytest.raises(ControlError, match="a NAME is letters"):
        routes.command_of("save", json.dumps({"path": name}).encode(), tmp_path)


def test_a_name_goes_below_the_checkpoints(tmp_path: Path) -> None:
    """And nowhere else."""
    command = routes.command_of("save", b'{"path": "monday-1.0"}', tmp_path)
    assert command.path == str(tmp_path / "monday-1.0")


def test_a_relative_run_folder_can_be_saved_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shipped file has one, and another process writes there: it is handed an absolute path."""
    monkeypatch.chdir(tmp_path)
    relative = config("run.dir=runs", "run.name=mine")
    folder = launch._folder_of_start(relative)
    assert folder.parent == tmp_path / "runs" / "mine"
    command = routes.command_of("save", b'{"path": "monday"}', folder / "checkpoints")
    check(command)
    assert command.path == str(folder / "checkpoints" / "monday")


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("rollback", b"{}"),
        ("rollback", b'{"version": -1}'),
        ("rollback", b'{"version": "3"}'),
        ("rollback", b'{"versions": 3}'),
        ("on", b"[]"),
        ("on", b"\xff"),
    ],
)
def test_a_body_that_is_not_as_documented_is_refused(verb: str, body: bytes) -> None:
    """Not guessed at: rolling back to a default would be a surprise."""
    with pytest.raises(ControlError, match=verb):
        routes.command_of(verb, body, Path("/x"))


@pytest.mark.parametrize(
    ("host", "headers", "answered"),
    [
        ("127.0.0.1", {}, True),
        ("127.1.2.3", {}, True),
        ("::1", {}, True),
        ("10.0.0.1", {}, False),
        ("::ffff:10.0.0.1", {}, False),
        ("", {}, False),
        ("unix", {}, False),
        ("127.0.0.1", {"origin": "http://evil.example"}, False),
        ("127.0.0.1", {"origin": "null"}, False),
    ],
)
def test_without_a_key_only_this_machine_is_answered(
    host: str, headers: dict[str, str], answered: bool
) -> None:
    """SGLang lets every web page call it, so a page open on this machine is refused as well."""
    refusal = routes.refused(SimpleNamespace(host=host), headers)
    assert (refusal is None) is answered


def test_a_connection_without_an_address_is_refused() -> None:
    """A server on a Unix socket knows no peer."""
    assert routes.refused(None, {}) is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "there are status"),
        (["rollback"], "give a version"),
        (["rollback", "-1"], "No such option|give a version"),
        (["save"], "give a NAME"),
        (["on", "now"], "takes nothing"),
        (["status", "--url", "ftp://x"], "is no address"),
        (["status", "--url", "http://127.0.0.1:1"], "does not answer"),
    ],
)
def test_a_mistake_at_the_command_line_is_one_message(words: list[str], message: str) -> None:
    """No traceback, and nothing is sent."""
    import re

    result = CliRunner().invoke(cli.app, ["control", *words])
    assert result.exit_code != 0
    assert re.search(message, f"{result.output} {result.exception}")


# --- the plugin, not asked for --------------------------------------------------------------


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
