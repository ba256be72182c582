"""When a run saves what it can be gone on from, and what it goes on from."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cosched.errors import ConfigError, RunFolderError
from cosched.runs.experiment import Experiment
from cosched.runs.keeping import Keeping, Point, check_kept
from cosched.runs.resume import Progress, RunOrigin, load
from cosched.settings.load import load_config
from cosched.settings.sections import CheckpointSettings
from cosched.sweep.plan import load_plan
from cosched.telemetry.run_folder import RunFolder
from tests.helpers.cli import cosched_process, run_cli
from tests.helpers.experiments import new_folder, write
from tests.helpers.interruption import whole_and_cut
from tests.helpers.paths import ROOT


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "resume").glob("0*"))


class Run:
    """Passes groups of requests, in each of which an arm takes so many updates; the clock stands."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.now, self.updates, self.groups = 0.0, 0, 0
        self.folder = RunFolder(folder)
        self.keeping = Keeping(self.folder, CheckpointSettings(**settings), lambda: self.now)
        self.keeping.behind_group({"adapted": 0, "other": 0}, lambda: self.point())

    def point(self) -> Point:
        return Point(Progress(self.groups, 0, {}, RunOrigin("", "", {})), {})

    def group(self, updates: int, seconds: float = 0.0) -> int:
        """Behind which group a run would go on that was killed now."""
        self.now += seconds
        self.updates += updates
        self.groups += 1
        self.keeping.behind_group({"adapted": self.updates, "other": 1}, lambda: self.point())
        return self.saved

    @property
    def saved(self) -> int:
        return load(self.folder)[0].groups_done


def test_behind_each_group_unless_it_is_said_when(tmp_path: Path) -> None:
    """And always before the first: a run that is cut there begins anew with the same settings."""
    assert [Run(tmp_path / "usual").group(0)] == [1]
    often = Run(tmp_path / "updates", every_updates=3)
    assert [often.group(2), often.group(2), often.group(1), often.group(5)] == [0, 2, 2, 4]
    slow = Run(tmp_path / "minutes", every_minutes=2.0)
    assert [slow.group(9, 100), slow.group(0, 20), slow.group(0, 119)] == [0, 2, 2]
    either = Run(tmp_path / "either", every_updates=3, every_minutes=2.0)
    assert [either.group(3), either.group(0, 100), either.group(0, 20)] == [1, 1, 3]


def test_at_an_end_the_newest_point_is_saved_that_was_not(tmp_path: Path) -> None:
    """At the boundary, not where it was cut: in the middle of a group nothing can be gone on from."""
    at_end = Run(tmp_path / "on", every_updates=100)
    at_end.group(1)
    at_end.group(1)
    assert at_end.saved == 0
    at_end.keeping.interrupted()
    assert at_end.saved == 2
    off = Run(tmp_path / "off", every_updates=100, at_end=False)
    off.group(1)
    off.keeping.interrupted()
    assert off.saved == 0


def test_so_many_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=3)
    for _ in range(5):
        run.group(1)
    assert kept(tmp_path) == ["00000004", "00000005", "00000006"]


def test_two_runs_of_one_folder_are_refused(tmp_path: Path) -> None:
    """Resumed twice at once, each would remove what the other has saved."""
    run = Run(tmp_path)
    with pytest.raises(RunFolderError, match="another process's to write to"):
        Run(tmp_path)
    run.group(1)


# --- where nothing is saved ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "record", "message"),
    [
        ("engine.kind=sglang", False, "arms on SGLang begin anew .*; leave it out, or use engine"),
        ("engine.kind=embedded", True, "a recording begins anew .* or run without --record"),
    ],
)
def test_what_is_said_of_saving_is_refused_where_nothing_is_saved(
    word: str, record: bool, message: str
) -> None:
    """It was ignored: who had set it found nothing to resume."""
    words = [word, "workload.documents=null", "workload.prompts=p.jsonl"]
    check_kept(load_config(ROOT / "configs" / "quickstart.yaml", words), record)
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [*words, "adapt.checkpoint.every_updates=4"]
    )
    with pytest.raises(ConfigError, match=rf"^adapt\.checkpoint: {message}"):
        check_kept(config, record)


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("variants.other.checkpoint.keep=3", r"variants\.other"),
        ("drafts.second.adapt.checkpoint.keep=3", r"drafts\.second\.adapt"),
        (
            "drafts.second.variants.other.checkpoint.at_end=false",
            r"drafts\.second\.variants\.other",
        ),
    ],
)
def test_arms_have_no_checkpoints_of_their_own(word: str, where: str) -> None:
    """A run goes on with all of them from one point."""
    words = ["drafts.second.kind=pard", "drafts.second.path=x", word]
    with pytest.raises(
        ConfigError, match=rf"^{where}\.checkpoint: a run saves all its arms at once"
    ):
        load_config(ROOT / "configs" / "quickstart.yaml", words)
    both = load_config(
        ROOT / "configs" / "quickstart.yaml", [*words[:2], "adapt.checkpoint.keep=3"]
    )
    assert both.drafts["second"].adapt.checkpoint.keep == 3


def test_a_sweep_saves_nothing_of_a_cell() -> None:
    with pytest.raises(ConfigError, match=r"adapt\.checkpoint: a sweep goes on with whole cells"):
        load_plan(ROOT / "configs" / "sweep_tiny.yaml", ["adapt.checkpoint.every_updates=4"])


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_sigterm_saves_and_what_goes_on_is_the_same_run(tmp_path: Path, settings: dict) -> None:
    """In the middle of a group, where nothing was due: figures are kept, and the run goes on behind the
    newest whole group, with the losses of a run that was never told to stop."""
    settings["workload"] |= {"max_new_tokens": 160, "max_prompts": 3}
    settings["arms"] = ["adapted"]
    settings["adapt"]["checkpoint"] = {"every_updates": 100_000}
    path = write(tmp_path, settings)
    whole = Experiment(load_config(path, ["run.name=whole"]))
    expected = whole.run(new_folder(whole.config)).arms["adapted"]
    folder = RunFolder(tmp_path / "runs" / "one")
    process = cosched_process(["run", "-c", str(path)])
    events, until = folder.path / "events.jsonl", time.monotonic() + 100
    while not (events.exists() and b'"kind":"turn"' in events.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)  # the log is written in large pieces: the first group is long done
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert json.loads((folder.path / "summary.json").read_text())["run"]["interrupted"]
    groups = load(folder)[0].groups_done
    assert 1 <= groups < 3
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    found = json.loads((folder.path / "summary.json").read_text())["arms"]["adapted"]
    for field in ("tau", "rounds", "versions", "losses", "tokens"):
        assert found[field] == getattr(expected, field), field


@pytest.mark.slow
@pytest.mark.long
def test_rows_of_requests_that_have_ended_are_learnt_from_again(tmp_path: Path) -> None:
    """With ``keep_finished`` the next update has rows of the request before: its loss is the same to the
    bit only where they are saved too."""
    kept = "adapt.replay.keep_finished=true"
    expected, found = whole_and_cut(tmp_path, kept, "adapt.replay.fresh=true")
    assert found.losses == expected.losses
    assert (found.updates, found.versions, found.tau) == (
        expected.updates,
        expected.versions,
        expected.tau,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [("prompts", "^workload: the run in .* began with other contents"),
     ("draft", "^the draft of adapted: the run in .* put those back, or begin anew")],
)  # fmt: skip
def test_files_that_have_changed_under_a_run_are_refused(
    tmp_path: Path, settings: dict, change: str, message: str
) -> None:
    """Settings name files; half a run's figures would have been of other contents."""
    places = {"prompts": tmp_path / "prompts.jsonl", "draft": tmp_path / "draft"}
    shutil.copy(settings["workload"]["prompts"], places["prompts"])
    shutil.copytree(settings["drafter"]["path"], places["draft"])
    settings["workload"]["prompts"] = str(places["prompts"])
    settings["drafter"]["path"] = str(places["draft"])
    settings["arms"] = ["adapted"]
    config = load_config(write(tmp_path, settings))

    def interrupt(_arm: str, _number: int) -> None:
        raise KeyboardInterrupt

    assert Experiment(config).run(new_folder(config), interrupt).run["interrupted"]
    if change == "prompts":
        lines = places["prompts"].read_text().splitlines()
        places["prompts"].write_text("\n".join(lines[1:]) + "\n")
    else:
        weights = next(places["draft"].glob("*.safetensors"))
        stored = load_file(weights)
        stored["norm.weight"] = stored["norm.weight"] * 2
        save_file(stored, weights)
    again = Experiment(config)
    with pytest.raises(RunFolderError, match=message):
        again.run(RunFolder(config.run_folder), resume=True)
