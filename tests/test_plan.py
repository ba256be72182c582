"""`cosched plan`: what it is asked, what it says, and that it says of a run what the run did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosched.errors import ConfigError
from cosched.plan.forecast import forecast
from cosched.plan.settings import load
from tests.helpers.cli import run_cli
from tests.helpers.experiments import write
from tests.helpers.made_up_runs import make_run
from tests.helpers.paths import ROOT, TINYWORLD

GIVEN = [
    "plan.round_seconds=0.01", "plan.update_seconds=0.05", "plan.frozen_tau=2", "plan.learnt_tau=2.6",
    "plan.learning_updates=20", "plan.seconds=5", "plan.repeats=2",
]  # fmt: skip
TAUS = [word for word in GIVEN if "_tau" in word or "learning" in word]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of servers that have one trainer."""
    monkeypatch.chdir(ROOT)
    return Path("configs/sidecar_tiny_cpu.yaml")


def planned(path: Path, *words: str, source: Path | None = None) -> dict[str, Any]:
    """As JSON, by the command."""
    options = [] if source is None else ["--from", source]
    code, out, err = run_cli("plan", "-c", path, "--json", *options, *words)
    assert code == 0, err
    return json.loads(out)


def refused(path: Path, *words: str, source: Path | None = None) -> str:
    options = [] if source is None else ["--from", source]
    code, out, err = run_cli("plan", "-c", path, *options, *words)
    assert code, out
    return err


def test_costs_that_are_given_are_enough(server: Path) -> None:
    """Nothing was measured: each figure says that it was given, counted or assumed."""
    found = planned(server, *GIVEN, "plan.servers=[1,8,64]", "adapt.policy.rounds=16")
    assert {one["how"] for one in found["costs"].values()} <= {"given", "counted", "assumed"}
    one, some, many = found["lines"]
    assert [one["servers"], some["servers"], many["servers"]] == [1, 8, 64]
    assert 2.0 < one["tau"]["value"] < one["tau_end"]["value"] <= 2.6
    assert some["tau"]["value"] > one["tau"]["value"], "eight learn faster together"
    assert some["bytes_to_trainer"]["value"] == pytest.approx(
        8 * one["bytes_to_trainer"]["value"], rel=0.2
    )
    assert many["busy"]["value"] == pytest.approx(1.0, abs=0.02)
    assert many["trainer_memory"] > one["trainer_memory"] > 0
    training = next(limit for limit in found["limits"] if limit["what"] == "training")
    # 100 rounds a second, an update of 50 ms behind each 16th: full at 3.2, a little later as rounds wait.
    assert training["servers"] == 4
    assert any("given" in note for note in found["notes"])


def test_a_terminal_shows_whether_it_pays_and_what_is_full_first(server: Path) -> None:
    code, out, err = run_cli("plan", "-c", server, *GIVEN, "plan.servers=[1,64]")
    assert code == 0, err
    for word in (
        "τ learning",
        "trainer memory",
        "assumed",
        "1 server: learning",
        "full first: training",
    ):
        assert word in out
    code, out, _ = run_cli("plan", "-c", server, *GIVEN, "adapt.placement=colocated")
    assert code == 0
    assert "trainer memory" not in out
    assert "full first" not in out


def test_a_link_is_full_where_its_bytes_are(server: Path) -> None:
    """Some 25 kB a round, 100 rounds a second: at 1 MB/s one server is too many."""
    found = planned(server, *GIVEN, "plan.link_gb_per_s=0.001", "plan.servers=2")
    (line,) = found["lines"]
    assert line["dropped"]["value"] > 0.3
    assert line["bytes_to_trainer"]["value"] == pytest.approx(1e6, rel=0.05)
    limit = next(one for one in found["limits"] if one["what"] == "link to the trainer")
    assert limit["servers"] == 1


def test_a_gpu_is_counted_and_a_larger_batch_is_not_free(server: Path) -> None:
    """On an H200 the tiny target's rounds are launches and scheduling, and updates are launches."""
    words = [*TAUS, "plan.device=h200", "plan.seconds=2", "plan.repeats=1"]
    few, many = (planned(server, *words, f"plan.requests={n}")["costs"] for n in (1, 256))
    assert few["a round"]["how"] == few["an update, rows of one request"]["how"] == "counted"
    assert 3e-4 < few["a round"]["value"] < many["a round"]["value"] < 1e-2
    update = few["an update, rows of one request"]["value"]
    # Launches take longer than the operations of a draft so narrow, and are nearly as many.
    assert few["an update, rows of most"]["value"] == pytest.approx(update, rel=0.1)
    assert 1e-3 < update < 0.1


def test_answers_are_as_long_as_they_are_said_to_be(server: Path, tmp_path: Path) -> None:
    """A file of lengths, one length, and a distribution by mean and spread."""
    (tmp_path / "lengths.txt").write_text("30\n50\n")
    by_file = planned(server, *GIVEN, f"plan.answer_file={tmp_path}/lengths.txt")
    by_mean = planned(server, *GIVEN, "plan.answer_tokens=40")
    spread = planned(server, *GIVEN, "plan.answer_tokens=40", "plan.answer_spread=0.8")
    speeds = [one["lines"][0]["tokens"]["value"] for one in (by_file, by_mean, spread)]
    assert speeds == pytest.approx([speeds[0]] * 3, rel=0.1)
    assert len(set(speeds)) == 3
    (tmp_path / "lengths.txt").write_text("30\n-5\n")
    assert "'-5'" in refused(server, *GIVEN, f"plan.answer_file={tmp_path}/lengths.txt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan.server=3"], "`server`"),
        (["plan.servers=[0]"], "plan.servers"),
        (["plan.device=h300"], "plan.device"),
        (["plan.arm=frozen"], "does not learn"),
        (["plan.answer_spread=1"], "plan.answer_tokens"),
        (["plan.answer_tokens=9", "plan.answer_file=x"], "one of them"),
        (["plan.device=h100", "plan.update_factor=2"], "plan.update_factor"),
        (["adapt.policy.kind=earned"], "--from"),
        (["plan=3"], "expected a section"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(server: Path, words: list[str], said: str) -> None:
    assert said in refused(server, *GIVEN, *words)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("plan.round_seconds", "plan.round_seconds: required"),
        ("plan.update_seconds", "plan.update_seconds: required"),
        ("plan.learnt_tau", "plan.learnt_tau: required beside plan.frozen_tau"),
    ],
)
def test_what_is_missing_is_named(server: Path, left_out: str, said: str) -> None:
    assert said in refused(server, *(word for word in GIVEN if not word.startswith(left_out)))


def test_without_a_run_and_without_lengths_there_is_no_plan(server: Path) -> None:
    assert "--from RUN_FOLDER: required" in refused(server)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (("plain", "frozen"), "no arm of that run learns, it has plain, frozen"),
        (("plain", "adapted"), "run one with the arm frozen too"),
    ],
)
def test_a_run_that_shows_no_learning_is_refused(
    server: Path, tmp_path: Path, arms: tuple[str, ...], said: str
) -> None:
    """There is neither a cost nor a gain of learning in it."""
    make_run(tmp_path / "run", arms)
    assert said in " ".join(refused(server, source=tmp_path / "run").split())


def test_a_folder_that_is_no_run_is_refused(server: Path, tmp_path: Path) -> None:
    assert "no finished run" in refused(server, source=tmp_path)


# --- a run of the tiny world ------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of two requests at once; its file is beside its folder."""
    folder = tmp_path_factory.mktemp("plan")
    settings = {
        "run": {"name": "one", "dir": str(folder / "runs")},
        "engine": {"num_threads": 1, "device": "cpu", "max_batch": 2},
        "target": {"path": f"{TINYWORLD}/target"},
        "drafter": {"kind": "eagle3", "path": f"{TINYWORLD}/eagle3", "num_draft_tokens": 3},
        "workload": {
            "documents": f"{TINYWORLD}/documents/translated.jsonl",
            "max_new_tokens": 500,
            "max_prompts": 4,
        },
        "arms": ["plain", "frozen", "adapted"],
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 16},
            "replay": {"window": 128, "anchors": 16},
            "guard": {"kind": "finite"},
        },
    }
    path = write(folder, settings)
    code, out, err = run_cli("run", "-c", path)
    assert code == 0, out + err
    return path


@pytest.mark.slow
@pytest.mark.long
def test_a_plan_of_the_run_itself_is_what_the_run_did(ran: Path) -> None:
    """The same file, as long as the run took: its acceptance lengths and its updates within 5 %, its speed and
    the share of learning within 15 %. Groups of a run begin together and end with one request, which
    the plan's servers do not, and a test has 1,000 rounds."""
    folder = ran.parent / "runs" / "one"
    arms = json.loads((folder / "summary.json").read_text())["arms"]
    frozen, adapted = arms["frozen"], arms["adapted"]
    wall = adapted["seconds"]["wall"]
    found = planned(ran, f"plan.seconds={wall}", "plan.repeats=3", source=folder)
    (line,) = found["lines"]
    assert line["tau_frozen"]["value"] == pytest.approx(frozen["tau"], rel=0.05)
    assert line["tau"]["value"] == pytest.approx(adapted["tau"], rel=0.05)
    assert line["tau"]["low"] <= line["tau"]["value"] <= line["tau"]["high"]
    assert line["tokens"]["value"] == pytest.approx(adapted["tokens_per_s"], rel=0.15)
    speed = adapted["tokens_per_s"] / frozen["tokens_per_s"]
    assert line["speed"]["value"] == pytest.approx(speed, rel=0.15)
    share = (adapted["seconds"]["update"] + adapted["seconds"]["publish"]) / wall
    assert line["exposed"]["value"] == pytest.approx(share, abs=0.1)
    assert line["updates"]["value"] == pytest.approx(adapted["updates"] / wall, rel=0.15)
    assert found["costs"]["a round"]["how"] == "measured"
    assert found["plain_tokens"] == pytest.approx(arms["plain"]["tokens_per_s"])


@pytest.mark.slow
@pytest.mark.long
def test_a_trainer_elsewhere_takes_learning_off_the_servers(ran: Path) -> None:
    """From the same run: what decoding waits for is a hand-over, and factors scale what was measured."""
    folder = ran.parent / "runs" / "one"
    own = planned(ran, "plan.seconds=30", "plan.repeats=1", source=folder)
    words = ["adapt.placement=sidecar", "adapt.sidecar.address=ipc:///tmp/x", "plan.seconds=30"]
    away = planned(ran, *words, "plan.repeats=1", "plan.servers=[1,4]", source=folder)
    assert away["lines"][0]["exposed"]["value"] < 0.5 * own["lines"][0]["exposed"]["value"]
    assert away["lines"][0]["speed"]["value"] > own["lines"][0]["speed"]["value"]
    fast = planned(ran, *words, "plan.repeats=1", "plan.round_factor=0.5", source=folder)
    assert fast["costs"]["a round"]["how"] == "scaled"
    assert fast["lines"][0]["tokens"]["value"] == pytest.approx(
        2 * away["lines"][0]["tokens"]["value"], rel=0.2
    )


@pytest.mark.slow
@pytest.mark.long
def test_what_a_run_has_not_measured_is_not_made_up(ran: Path) -> None:
    """Another number of drafted tokens, a policy that decides by itself."""
    folder = ran.parent / "runs" / "one"
    config, asked = load(ran, ["drafter.num_draft_tokens=4"])
    with pytest.raises(ConfigError, match=r"drafter.num_draft_tokens: 4"):
        forecast(config, asked, folder)
    config, asked = load(ran, ["adapt.policy.kind=earned", "adapt.guard.kind=shadow"])
    with pytest.raises(ConfigError, match=r"adapt.policy: earned"):
        forecast(config, asked, folder)
