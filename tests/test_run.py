"""Whole runs on the tiny world: the command line, traces, interruption and what users get wrong."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import yaml

from cosched import cli
from cosched.engines.embedded.engine import EngineSeconds
from cosched.errors import ConfigError, CoschedError, RunFolderError
from cosched.loop.counters import Counters
from cosched.runs.experiment import TURN_TOKENS, Experiment
from cosched.runs.resume import ArmProgress, Progress, load, save
from cosched.settings.load import load_config, to_yaml
from cosched.settings.schema import Config
from cosched.telemetry.metrics import Turn
from cosched.telemetry.run_folder import RunFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings(tmp_path: Path, tinyworld: Path) -> dict:
    """A short experiment over the tiny world, as plain YAML data."""
    return {
        "run": {"name": "one", "dir": str(tmp_path / "runs")},
        "engine": {"num_threads": 1},
        "target": {"path": str(tinyworld / "target")},
        "drafter": {"kind": "eagle3", "path": str(tinyworld / "eagle3"), "window": 48},
        "workload": {
            "prompts": str(tinyworld / "prompts" / "translated.jsonl"),
            "max_new_tokens": 48,
            "max_prompts": 2,
        },
        "arms": ["plain", "frozen", "frozen+window", "adapted"],
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 4},
            "replay": {"window": 32, "anchors": 16},
            "guard": {"kind": "finite"},
        },
    }


def new_folder(config: Config) -> RunFolder:
    folder = RunFolder(config.run_folder)
    folder.create()
    return folder


def events_of(folder: Path) -> list[str]:
    return (folder / "events.jsonl").read_text().splitlines()


def write(tmp_path: Path, settings: dict) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run_cli(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, output, errors."""
    import contextlib
    import io

    from rich.console import Console

    out, err = io.StringIO(), io.StringIO()
    old = sys.argv, cli.console, cli.errors
    sys.argv = ["cosched", *map(str, arguments)]
    cli.console, cli.errors = Console(file=out, width=200), Console(file=err, width=200)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv, cli.console, cli.errors = old
    return code, out.getvalue(), err.getvalue()


# --- a run from end to end -----------------------------------------------------------------


def test_a_run_leaves_its_folder(tmp_path: Path, settings: dict) -> None:
    """Four arms, equal greedy tokens, and every file that design.md names."""
    code, out, err = run_cli("run", "-c", write(tmp_path, settings))
    assert code == 0, err
    assert "report.html" in out
    folder = tmp_path / "runs" / "one"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["arms"]) == settings["arms"]
    for arm in summary["arms"].values():
        assert arm["lossless_mismatches"] == 0
        assert arm["tokens"] == summary["arms"]["plain"]["tokens"]
    adapted = summary["arms"]["adapted"]
    assert adapted["versions"] == adapted["updates"] > 0
    assert adapted["tau"] > 1
    kinds = [json.loads(line)["kind"] for line in events_of(folder)]
    expected = {"round", "request", "decision", "update", "verdict", "publication"}
    assert expected <= set(kinds)
    for arm, name in ((a, a) for a in settings["arms"]):
        rounds = summary["arms"][arm]["rounds"]
        found = sum(
            (e := json.loads(line))["kind"] == "round" and e["arm"] == name
            for line in events_of(folder)
        )
        assert found == rounds
    assert (folder / "report.html").stat().st_size > 10_000
    again = load_config(folder / "config.yaml")  # fully resolved, and readable as an experiment
    assert again.run.name == "one"
    saved = folder / "checkpoints" / "adapted" / "model.safetensors"
    assert saved.exists()
    code, out, _ = run_cli("report", folder)
    assert code == 0
    assert "adapted" in out


@pytest.mark.parametrize("background", [False, True])
def test_arms_take_turns(tmp_path: Path, settings: dict, background: bool) -> None:
    """A few tokens at a time, and more where an update would go on in the time of the others."""
    settings["arms"] = ["frozen", "adapted"]
    settings["adapt"]["trainer"] = {"background": background}
    config, said = load_config(write(tmp_path, settings)), []
    folder = new_folder(config)
    summary = Experiment(config).run(folder, lambda arm, number: said.append((arm, number)))
    turns = [
        (arm, sum(number for _, number in turn))
        for arm, turn in itertools.groupby(said, key=lambda one: one[0])
    ]
    assert [arm for arm, _ in turns] == settings["arms"] * (len(turns) // 2)
    longest = config.drafter_settings.num_draft_tokens + TURN_TOKENS
    assert all(number <= (48 if background else longest) for _, number in turns)
    assert len(turns) <= 8 if background else len(turns) == 8
    kept = _turns(folder.path)
    assert [(turn["arm"], turn["tokens"]) for turn in kept] == turns
    assert [turn["group"] for turn in kept] == sorted([1, 2] * (len(turns) // 2))
    for name, arm in summary.arms.items():
        seconds = sum(turn["seconds"] for turn in kept if turn["arm"] == name)
        assert seconds == pytest.approx(arm.seconds["wall"], rel=0.05)


@pytest.mark.slow
def test_a_saved_draft_is_a_draft(tmp_path: Path, settings: dict) -> None:
    """The adapted checkpoint loads as a drafter, and drafts better on the same text than before."""
    settings["arms"] = ["frozen", "adapted"]
    settings["workload"]["max_new_tokens"] = 96
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    first = Experiment(config).run(folder)
    settings["drafter"]["path"] = str(folder.path / "checkpoints" / "adapted")
    settings["run"]["name"] = "two"
    settings["arms"] = ["frozen"]
    config = load_config(write(tmp_path, settings))
    second = Experiment(config).run(new_folder(config))
    assert second.arms["frozen"].tau > first.arms["frozen"].tau


@pytest.mark.slow
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("max_batch", [1, 2])
def test_trace_equals_engine(
    tmp_path: Path, settings: dict, max_batch: int, computed: bool
) -> None:
    """A frozen greedy arm has the same rounds from the trace as from the engine, one by one, whether
    the target's rows are read or computed again."""
    settings["arms"] = ["frozen", "frozen+window"]
    settings["engine"]["max_batch"] = max_batch
    settings["workload"] |= {"max_new_tokens": 96, "max_prompts": 2}
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    live = Experiment(config, record=True).run(folder)
    settings["engine"] |= {"kind": "trace", "trace": str(folder.path / "trace")}
    settings["engine"]["live"] = computed
    settings["run"]["name"] = "replayed"
    config = load_config(write(tmp_path, settings))
    replayed_folder = new_folder(config)
    replayed = Experiment(config).run(replayed_folder)
    assert live.arms["frozen"].rounds < live.arms["frozen"].tokens  # drafts were accepted
    for arm in settings["arms"]:
        assert replayed.arms[arm].tau == live.arms[arm].tau
        rows = [_rounds(f.path, arm) for f in (folder, replayed_folder)]
        assert rows[0] == rows[1]
        assert (
            replayed.arms[arm].seconds["verify"] > live.arms[arm].seconds["verify"] / 2
        ) is computed


def _rounds(folder: Path, arm: str) -> list[tuple]:
    events = [json.loads(line) for line in events_of(folder)]
    return sorted(
        tuple(e["row"].values()) for e in events if e["kind"] == "round" and e["arm"] == arm
    )


def _turns(folder: Path) -> list[dict]:
    events = [json.loads(line) for line in events_of(folder)]
    return [e["turn"] | {"arm": e["arm"]} for e in events if e["kind"] == "turn"]


def test_parts_are_what_the_arms_did(tmp_path: Path, settings: dict) -> None:
    """Six requests make six parts: the same text in each arm, and all of it."""
    settings["arms"] = ["plain", "frozen"]
    settings["workload"] |= {"max_new_tokens": 8, "max_prompts": 6}
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    summary = Experiment(config).run(folder)
    assert summary.run["parts_of"] == "requests"
    for arm in summary.arms.values():
        assert [part.tokens for part in arm.parts] == [8] * 6
        wall = arm.seconds["wall"]
        assert sum(part.seconds for part in arm.parts) == pytest.approx(wall, rel=0.05)


@pytest.mark.slow
def test_a_sampled_trace_agrees_with_sampling_in_the_mean(tmp_path: Path, settings: dict) -> None:
    """Acceptance on recorded samples estimates that of sampling: within four standard errors."""
    settings["arms"] = ["frozen"]
    settings["workload"] |= {"max_new_tokens": 256, "max_prompts": 6, "temperature": 1.0}
    config = load_config(write(tmp_path, settings))
    folder = new_folder(config)
    live = Experiment(config, record=True).run(folder).arms["frozen"]
    settings["engine"] |= {"kind": "trace", "trace": str(folder.path / "trace")}
    settings["run"]["name"] = "replayed"
    config = load_config(write(tmp_path, settings))
    replayed = Experiment(config).run(new_folder(config))
    standard_error = 1.1 * (2 / live.rounds) ** 0.5  # K = 3 commits 1 to 4 tokens a round
    assert abs(replayed.arms["frozen"].tau - live.tau) < 4 * standard_error


@pytest.mark.slow
def test_documents_are_forced(tmp_path: Path, settings: dict, tinyworld: Path) -> None:
    """With documents every arm commits the document, whatever it drafts."""
    settings["workload"] = {
        "documents": str(tinyworld / "documents" / "code.jsonl"),
        "prompt_tokens": 16,
        "max_new_tokens": 80,
        "max_prompts": 2,
    }
    config = load_config(write(tmp_path, settings))
    summary = Experiment(config).run(new_folder(config))
    assert {arm.tokens for arm in summary.arms.values()} == {160}
    assert all(arm.lossless_mismatches == 0 for arm in summary.arms.values())
    assert summary.arms["frozen"].tau > 1.2
    assert summary.arms["plain"].tau == 1


# --- what a user can get wrong -------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapt.trainer.zero_stagee=1", ("adapt.trainer", "zero_stagee", "zero_stage")),
        ("adapt.trainer.zero_stage=3", ("adapt.trainer.zero_stage", "3", "0, 1, 2")),
        ("adapt.scope.state=forever", ("adapt.scope.state", "forever", "per_request")),
        ("engine.kind=vllm", ("engine.kind", "vllm", "embedded, sglang, trace")),
        ("adapt.loss.rows=some", ("adapt.loss.rows", "some", "accepted, all, delayed, refused")),
        ("adapt.guard.kind=bouncer", ("adapt.guard.kind", "bouncer", "finite, shadow")),
        ("adapt.trainer.lr=fast", ("adapt.trainer.lr", "float", "fast")),
        ("adapt.trainer.lr=-1", ("adapt.trainer.lr", "-1")),
        ("adapt.trainer.lr=.inf", ("adapt.trainer.lr", "finite", "inf")),
        ("adapt.policy.kind=someday", ("adapt.policy.kind", "someday", "every_n_rounds")),
        ("adapt.policy.round=3", ("adapt.policy", "round", "rounds")),
        ("adapt.loss.kind=nonsense", ("adapt.loss.kind", "nonsense", "forward_kl")),
        ("adapt.loss.position_decay=0", ("adapt.loss.position_decay", "0")),
        ("drafter.kind=eagle9", ("drafter.kind", "eagle9", "eagle3")),
        ("adapt.policy.kind=3", ("adapt.policy.kind", "got 3", "every_n_rounds")),
        ("arms=[plain,3]", ("arms[1]", "got 3")),
        ("adapt.scope.kind=toes", ("adapt.scope.kind", "toes", "body")),
        ("arms=[plain,warm]", ("arms", "warm", "frozen")),
        ("arms=[]", ("arms",)),
        ("drafter.window=null", ("drafter.window",)),
        ("engine.kind=trace", ("engine.trace",)),
        ("engine.device=abacus", ("engine.device", "abacus")),
        ("workload.documents=x.jsonl", ("workload",)),
        ("workload.prompts=missing.jsonl", ("workload.prompts", "missing.jsonl")),
        ("target.path=nowhere", ("target.path", "nowhere")),
        ("drafter.path=nowhere", ("drafter.path", "nowhere")),
        ("workload.max_new_tokens=5000", ("max_new_tokens", "4096")),
        ("adapt.replay.window=3", ("adapt.replay.window", "3")),
        ("adapt.memory.max_tokens=31", ("adapt.memory.max_tokens", "31")),
        ("adapt.memory.max_bytes=1000", ("adapt.memory.max_bytes", "1000", "window = 32")),
        ("adapt.replay.max_bytes=1000", ("adapt.replay", "use adapt.memory.max_bytes instead")),
        ("adapt.replay.max_tokens=64", ("adapt.replay", "use adapt.memory.max_tokens instead")),
        ("adapt.loss.chunk_rows=8", ("adapt.loss", "use adapt.memory.chunk_rows instead")),
        ("engine.max_batch=two", ("engine.max_batch", "two")),
        ("nonsense", ("key.sub=value", "nonsense")),
    ],
)
def test_bad_settings_are_one_clear_message(
    tmp_path: Path, settings: dict, override: str, says: tuple[str, ...]
) -> None:
    """The message names the key, what came and what is allowed; exit code 2; no folder is left."""
    code, _, err = run_cli("run", "-c", write(tmp_path, settings), override)
    assert code == 2
    assert all(word in err for word in says), err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: }")
    code, _, err = run_cli("check", "-c", tmp_path / "bad.yaml")
    assert (code, "bad.yaml" in err, "Traceback" in err) == (2, True, False)
    code, _, err = run_cli("check", "-c", tmp_path / "none.yaml")
    assert (code, "none.yaml" in err) == (2, True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompt"),
        ("{not json}\n", "line 1"),
        ('{"id": 1}\n', "text"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "twice"),
    ],
)
def test_bad_prompts(tmp_path: Path, settings: dict, content: str, says: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    settings["workload"]["prompts"] = str(path)
    code, _, err = run_cli("run", "-c", write(tmp_path, settings))
    assert (code, says in err, "Traceback" in err) == (2, True, False), err


def test_a_draft_for_another_target(tmp_path: Path, settings: dict, tinyworld: Path) -> None:
    """Wrong vocabulary, wrong width, a missing and a damaged tensor: each is named."""
    from safetensors.torch import load_file, save_file

    source = tinyworld / "eagle3"
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    spoiled = {
        "vocab_size 999": ({**config, "vocab_size": 999}, tensors),
        "hidden_size 96": ({**config, "hidden_size": 96}, tensors),
        "missing": (config, {n: t for n, t in tensors.items() if n != "fc.weight"}),
        "extra.weight": (config, {**tensors, "extra.weight": tensors["norm.weight"].clone()}),
        "norm_output": ({**config, "norm_output": True}, tensors),
        "hidden_size": ({k: v for k, v in config.items() if k != "hidden_size"}, tensors),
    }
    for number, (says, (new_config, new_tensors)) in enumerate(spoiled.items()):
        folder = tmp_path / f"draft{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(new_config))
        save_file(new_tensors, folder / "model.safetensors")
        settings["drafter"]["path"] = str(folder)
        code, _, err = run_cli("run", "-c", write(tmp_path, settings), f"run.name=bad{number}")
        assert (code, "Traceback" in err) == (2, False)
        assert says in err, err
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    code, _, err = run_cli("run", "-c", write(tmp_path, settings), "run.name=cut")
    assert (code, "model.safetensors" in err) == (2, True)


def test_an_existing_run_is_kept(tmp_path: Path, settings: dict) -> None:
    """A second run into the same folder is refused, and the first stays; --overwrite replaces."""
    settings["arms"] = ["plain"]
    settings["workload"] |= {"max_new_tokens": 4, "max_prompts": 1}
    path = write(tmp_path, settings)
    assert run_cli("run", "-c", path)[0] == 0
    before = (tmp_path / "runs" / "one" / "summary.json").read_bytes()
    code, _, err = run_cli("run", "-c", path)
    assert (code, "--overwrite" in err) == (1, True)
    assert (tmp_path / "runs" / "one" / "summary.json").read_bytes() == before
    assert run_cli("run", "-c", path, "--overwrite")[0] == 0
    stranger = tmp_path / "runs" / "mine"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("do not delete")
    code, _, err = run_cli("run", "-c", path, "--overwrite", "run.name=mine")
    assert (code, (stranger / "thesis.txt").exists()) == (1, True)


def test_a_folder_that_cannot_be_made(tmp_path: Path, settings: dict) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run_cli(
        "run", "-c", write(tmp_path, settings), f"run.dir={tmp_path / 'file' / 'runs'}"
    )
    assert (code, "file/runs" in err, "Traceback" in err) == (1, True, False), err


def cosched_process(arguments: list[str], preexec_fn=None, **variables) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "cosched.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def heed_ctrl_c() -> None:
    """In a new process, as a shell's foreground job does: those of a script's ``&`` ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_a_full_disk_is_one_message(tmp_path: Path, settings: dict) -> None:
    """When no byte more can be written the run ends with a message that names the file."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    settings["arms"] = ["plain", "frozen"]
    process = cosched_process(["run", "-c", str(write(tmp_path, settings))], preexec_fn=small_files)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "cannot be written" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_no_compiler_is_needed(tmp_path: Path, settings: dict) -> None:
    """A run that trains goes through where neither a compiler nor ninja is on the path."""
    empty = tmp_path / "bin"
    empty.mkdir()
    extensions = tmp_path / "extensions"
    process = cosched_process(
        ["run", "-c", str(write(tmp_path, settings))],
        PATH=str(empty),
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert summary["arms"]["adapted"]["updates"] > 0
    assert not extensions.exists()  # nothing was compiled, nothing was cached


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, settings: dict) -> None:
    """SIGINT in the middle: exit code 1, and a readable summary, report and event log."""
    settings["workload"] |= {"max_new_tokens": 2000, "max_prompts": 6}
    process = cosched_process(["run", "-c", str(write(tmp_path, settings))], heed_ctrl_c)
    events = tmp_path / "runs" / "one" / "events.jsonl"
    deadline = time.monotonic() + 100
    while not events.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert summary["run"]["interrupted"] is True
    assert sum(arm["tokens"] for arm in summary["arms"].values()) > 50
    assert (tmp_path / "runs" / "one" / "report.html").exists()
    for line in events.read_text().splitlines():
        json.loads(line)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, settings: dict) -> None:
    """Interrupted after the first request and resumed, all arms do what they do in one go."""
    settings["workload"] |= {"max_new_tokens": 96, "max_prompts": 2}
    path = write(tmp_path, settings)
    config = load_config(path)
    whole = Experiment(load_config(path, ["run.name=whole"]))
    expected = whole.run(new_folder(whole.config))

    folder = new_folder(config)
    committed = 0

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 4 * 96 + 40:  # in the middle of the second request
            raise KeyboardInterrupt

    cut = Experiment(config)
    assert cut.run(folder, interrupt).run["interrupted"]
    code, _, err = run_cli("run", "-c", path, "--resume", "adapt.trainer.lr=0.5")
    assert (code, "lr" in err) == (1, True), err
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    resumed = json.loads((folder.path / "summary.json").read_text())
    for arm, figures in expected.arms.items():
        assert resumed["arms"][arm]["tau"] == figures.tau
        assert resumed["arms"][arm]["tokens"] == figures.tokens
        assert resumed["arms"][arm]["lossless_mismatches"] == 0
        assert _rounds(folder.path, arm) == _rounds(tmp_path / "runs" / "whole", arm)
        done = [
            [(turn["group"], turn["tokens"]) for turn in _turns(path) if turn["arm"] == arm]
            for path in (folder.path, tmp_path / "runs" / "whole")
        ]
        assert done[0] == done[1], "turns before the interruption are kept, half ones are not"
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert (code, "nothing to resume" in err) == (1, True)


@pytest.mark.slow
def test_a_run_cut_in_its_first_request_can_be_resumed(tmp_path: Path, settings: dict) -> None:
    """There is a point to go on from before anything is done."""
    settings["arms"] = ["plain", "adapted"]
    path = write(tmp_path, settings)

    def interrupt(_arm: str, _number: int) -> None:
        raise KeyboardInterrupt

    config = load_config(path)
    assert Experiment(config).run(new_folder(config), interrupt).run["interrupted"]
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    summary = json.loads((config.run_folder / "summary.json").read_text())
    assert summary["arms"]["plain"]["tokens"] == 2 * 48
    assert summary["arms"]["adapted"]["lossless_mismatches"] == 0


def test_progress_with_a_loss_that_was_not_finite_is_readable(tmp_path: Path) -> None:
    """JSON has no NaN: a skipped step must not make an interrupted run unreadable."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    counters = Counters(losses=[0.5, None], skipped_steps=1)
    arm = ArmProgress([], 1.0, EngineSeconds(), counters, 1, [Turn(1, 32, 0.5)])
    save(folder, Progress(1, 0, {"adapted": arm}), {"adapted": {}})
    assert load(folder)[0].arms["adapted"] == arm


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """The kernel's refusal is one message that names the folder."""
    tmp_path.chmod(0o555)
    libc = ctypes.CDLL(None)
    libc.setfsuid(65534)  # root may write anywhere: go to the file system as nobody
    try:
        with pytest.raises(RunFolderError, match=r"runs/one cannot be written: Permission denied"):
            RunFolder(tmp_path / "runs" / "one").create()
    finally:
        libc.setfsuid(os.geteuid())
        tmp_path.chmod(0o755)


# --- other commands ------------------------------------------------------------------------


def test_check_and_plugins(tmp_path: Path, settings: dict) -> None:
    code, out, _ = run_cli("check", "-c", write(tmp_path, settings), "adapt.trainer.lr=0.01")
    assert (code, "lr: 0.01" in out, "valid" in out) == (0, True, True)
    code, out, _ = run_cli("plugins")
    assert code == 0
    assert all(name in out for name in ("eagle3", "forward_kl", "never", "every_n_rounds"))


def test_check_loads_no_model(tmp_path: Path, settings: dict) -> None:
    """Validation needs neither weights nor transformers."""
    program = (
        "import sys; sys.argv = ['cosched', 'check', '-c', sys.argv[1]]\n"
        "from cosched.cli import main\n"
        "main()\n"
        "assert 'transformers' not in sys.modules and 'deepspeed' not in sys.modules\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(write(tmp_path, settings))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this machine has no huge pages to give",
)
def test_large_tensors_lie_in_huge_pages() -> None:
    """The command asks torch for them before the first tensor, after which nobody is heard."""
    program = (
        "from cosched import cli\n"
        "def allocate():\n"
        "    import torch\n"
        "    kept = torch.ones(2**24)\n"
        "    print(open('/proc/self/smaps_rollup').read())\n"
        "cli.app = allocate\n"
        "cli.main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("AnonHugePages")]
    assert int(line.split()[1]) > 2**15  # KiB: most of the tensor, whose ends may not be aligned


def test_another_kind_needs_no_cleaning_up(tmp_path: Path, settings: dict) -> None:
    """``adapt.policy.kind=never`` works on a file that has the old kind's fields; typos do not."""
    path = write(tmp_path, settings)
    assert load_config(path, ["adapt.policy.kind=never"]).policy_settings.kind == "never"
    with pytest.raises(ConfigError, match="rounds"):
        load_config(path, ["adapt.policy.kind=never", "adapt.policy.rounds=3"])


EXPERIMENTS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if "sweep_" not in p.stem]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_complete(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Each shipped file loads, and its resolved form loads to the same settings."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert msgspec.to_builtins(config)["run"]["name"] == path.stem
    resolved = yaml.safe_load(to_yaml(config))
    assert set(resolved) >= {"run", "engine", "target", "workload", "arms", "adapt"}
    assert "drafter" in resolved or resolved["drafts"]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert to_yaml(load_config(tmp_path / "config.yaml")) == to_yaml(config)


def test_errors_are_also_the_builtins_they_refine() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, CoschedError)


@pytest.mark.parametrize(("max_tokens", "dropped"), [(32, True), (64, False)])
def test_requests_without_room_in_the_buffer_are_in_the_summary(
    tmp_path: Path, settings: dict, max_tokens: int, dropped: bool
) -> None:
    """A buffer of 32 rows holds one of two requests: the arm that learns says so, and the report."""
    settings["arms"] = ["frozen", "adapted"]
    settings["engine"]["max_batch"] = 2
    settings["workload"]["max_new_tokens"] = 16
    settings["adapt"]["memory"] = {"max_tokens": max_tokens}
    code, _, err = run_cli("run", "-c", write(tmp_path, settings))
    assert code == 0, err
    folder = tmp_path / "runs" / "one"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    assert arms["frozen"]["evicted_requests"] == 0
    assert (arms["adapted"]["evicted_requests"] > 0) is dropped
    assert (
        "the replay buffer dropped a request" in (folder / "report.html").read_text()
    ) is dropped
