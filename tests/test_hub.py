"""``target.path`` as the name of a model in this machine's Hugging Face cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cosched.engines.sglang.launcher.arguments import command_line, keyword_arguments
from cosched.engines.sglang.launcher.launch import check_draft_servable
from cosched.errors import ConfigError
from cosched.memory.sketch import sketch
from cosched.settings.load import check_paths, load_config
from tests.helpers.cli import run_cli
from tests.helpers.paths import TINYWORLD
from tests.helpers.serving import sglang_parser

ROOT = TINYWORLD.parent
NAME = "cosched/Tiny-World"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the library reads ``HF_HOME`` once, when it is imported."""
    home = tmp_path / "huggingface"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    return home


def cache(home: Path, left_out: str = "") -> Path:
    """The tiny world's target as a download leaves it; returns its snapshot."""
    model = home / "hub" / "models--cosched--Tiny-World"
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "refs", model / "blobs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for file in (TINYWORLD / "target").iterdir():
        if file.name != left_out:
            (model / "blobs" / file.name).symlink_to(file)
            (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    return snapshot


def experiment(tmp_path: Path, **engine: str) -> Path:
    path = tmp_path / "experiment.yaml"
    settings = {
        "run": {"name": "cached", "dir": str(tmp_path / "runs")},
        "engine": {"num_threads": 1, **engine},
        "target": {"path": NAME},
        "drafter": {"kind": "eagle3", "path": str(TINYWORLD / "eagle3")},
        "workload": {
            "prompts": str(TINYWORLD / "prompts" / "code.jsonl"),
            "max_new_tokens": 4,
            "max_prompts": 1,
        },
        "arms": ["plain", "frozen"],
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_cached_model_is_run_by_its_name(tmp_path: Path, home: Path) -> None:
    """From the command line, and the run folder says what the user said."""
    cache(home)
    path = experiment(tmp_path)
    code, _, err = run_cli("run", "-c", path)
    assert code == 0, err
    folder = tmp_path / "runs" / "cached"
    assert json.loads((folder / "summary.json").read_text())["arms"]["frozen"]["tokens"] == 4
    assert yaml.safe_load((folder / "config.yaml").read_text())["target"] == {"path": NAME}


@pytest.mark.slow
def test_the_cache_is_where_hugging_face_has_it(tmp_path: Path) -> None:
    """``HF_HOME`` moves it, and ``check`` loads neither weights nor transformers."""
    cache(tmp_path / "elsewhere")
    program = (
        "import sys; sys.argv = ['cosched', 'check', '-c', sys.argv[1]]\n"
        "from cosched.cli import main\n"
        "main()\n"
        "assert 'transformers' not in sys.modules\n"
    )
    unset = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    for home, code in (("elsewhere", 0), ("nowhere", 2)):
        process = subprocess.run(
            [sys.executable, "-c", program, str(experiment(tmp_path))],
            env={**inherited, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / home)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == code, process.stderr
    assert f"({tmp_path / 'nowhere' / 'hub'})" in process.stderr


def test_a_folder_of_that_name_wins(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers has it: what is here is what was meant."""
    snapshot = cache(home)
    monkeypatch.chdir(tmp_path)
    target = load_config(experiment(tmp_path)).target
    assert target.folder == str(snapshot)
    (tmp_path / "cosched").mkdir()
    (tmp_path / NAME).symlink_to(TINYWORLD / "target")
    assert target.folder == NAME


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (NAME, rf"nothing at {NAME}, .* no model of that name with its weights; .*download {NAME}"),
        ("nobody/nothing", r"nothing at nobody/nothing, .*huggingface/hub.* hf download nobody"),
        ("../up", r"nothing at \.\./up"),
        ("a/b/c", r"nothing at a/b/c; give a folder .* owner/model .*huggingface/hub"),
        ("nowhere", r"nothing at nowhere; give a folder .* owner/model"),
    ],
)
def test_a_model_that_is_nowhere_is_one_message(
    tmp_path: Path, home: Path, path: str, says: str
) -> None:
    """What was looked for and where, and the ways to get it. Of a model whose tokenizer alone was
    once loaded the cache has a folder as well, which no engine could load."""
    cache(home, left_out="model.safetensors")
    config = load_config(experiment(tmp_path), [f"target.path={path}"])
    with pytest.raises(ConfigError, match=rf"^target\.path: {says}"):
        check_paths(config)


def test_sglang_gets_the_folder_and_keeps_the_name(tmp_path: Path, home: Path) -> None:
    """SGLang would ask the Hub for a name; clients ask for the model by it, as without cosched."""
    snapshot = cache(home)
    config = load_config(experiment(tmp_path, kind="sglang", device="cpu"), ["arms=[plain]"])
    allowed = {"model_path", "served_model_name"}
    words = keyword_arguments(config, {}, allowed)
    assert (words["model_path"], words["served_model_name"]) == (str(snapshot), NAME)
    own = keyword_arguments(config, {"served_model_name": "mine"}, allowed)
    assert own["served_model_name"] == "mine"
    parser = sglang_parser()
    parser.add_argument("--served-model-name")
    read = parser.parse_args(command_line(config, [], parser))
    assert (read.model_path, read.served_model_name) == (str(snapshot), NAME)
    read = parser.parse_args(command_line(config, ["--served-model-name", "mine"], parser))
    assert read.served_model_name == "mine"
    folder = load_config(experiment(tmp_path, kind="sglang"), [f"target.path={TINYWORLD}/target"])
    assert "served_model_name" not in keyword_arguments(folder, {}, allowed)


def test_sizes_and_serving_find_the_model(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``check``, ``doctor`` and ``serve`` all ask the same place."""
    cache(home)
    monkeypatch.setattr("cosched.engines.sglang.launcher.launch.version_of", lambda _name: "0.5.23")
    config = load_config(experiment(tmp_path, kind="sglang", device="cpu"))
    check_draft_servable(config)
    assert sketch(config)[0].num_parameters() > 6_000_000
