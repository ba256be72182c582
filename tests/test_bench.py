"""`cosched bench`: what its figures are, what is run and what stays, and what a result says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from cosched.bench.candidates import first_candidates
from cosched.bench.commands import spoken
from cosched.bench.figures import Figure, Row, median_of, read_rows, write_figures
from cosched.bench.plan import BenchRun, plan_suite
from cosched.bench.rows import rows_of, too_low
from cosched.bench.suite import RunsSuite, ScriptSuite, load_suite, suite_files
from cosched.errors import ConfigError, RunFolderError
from cosched.records import RoundRow
from cosched.settings.load import load_config
from cosched.sweep.plan import Job
from cosched.telemetry.groups import figures_by_group
from cosched.telemetry.metrics import (
    GroupFigures,
    Place,
    RequestLog,
    Turn,
    round_figures,
)
from tests.helpers.cli import run_cli
from tests.helpers.made_up_runs import make_run
from tests.helpers.paths import QUICKSTART, ROOT

SUITES = list(suite_files(ROOT))


# --- what figures are made of ----------------------------------------------------------------


def logs_of(prefix: str, source: str | None = None) -> list[RequestLog]:
    """Two requests, one of which repeats itself and goes on in a second turn."""
    loop = [5, 6, 7, 8, 9, 10, 11, 12] * 4
    rows = [RoundRow(prefix, at, 0, 3, 1, 2) for at in range(1, 31, 2)]
    return [
        RequestLog(prefix, [1, 2], loop, rows, source=source),
        RequestLog(f"{prefix}@2", [3], list(range(100, 132)), rows[:10], source=source),
    ]


def test_groups_add_up_to_the_figures_of_the_arm() -> None:
    """Pooled over groups, τ and τ novel are those that the summary has: intervals are of the same figure."""
    logs = [*logs_of("a"), *logs_of("b")]
    turns = [Turn(1, 40, 1.0), Turn(2, 30, 2.0), Turn(1, 24, 0.5)]
    groups = figures_by_group(logs, turns, [["a"], ["b"]])
    whole = round_figures(logs)
    places = [place for group in groups for place in group.places]
    assert sum(p.tokens for p in places) / sum(p.rounds for p in places) == whole.tau
    novel = sum(p.tokens_novel for p in places) / sum(p.rounds_novel for p in places)
    assert novel == whole.tau_novel
    assert sum(group.tokens for group in groups) == whole.tokens
    assert sum(g.repeated for g in groups) / whole.tokens == whole.repeat_fraction
    assert [group.seconds for group in groups] == [1.5, 2.0]
    assert [(place.start, place.rounds) for place in groups[0].places] == [(0, 25)]


@pytest.mark.parametrize("number", [6, 7, 8, 9, 12, 30, 101])
def test_the_median_s_interval_is_the_sign_test_s(number: int) -> None:
    """It leaves out as many on either side as it may: what is left has 95 %, and one more has less."""
    found = median_of([float(n) for n in range(number)], "ms")
    assert found.low is not None
    assert found.high == number - 1 - found.low
    left_out = int(found.low)

    def outside(k: int) -> float:
        return 2 * sum(math.comb(number, i) for i in range(k + 1)) / 2**number

    assert outside(left_out) <= 0.05 < outside(left_out + 1)


def test_five_repeats_have_no_interval() -> None:
    """Even the whole range of five leaves out the median in 6 % of all cases."""
    assert median_of([1.0, 2.0, 3.0, 4.0, 5.0], "ms") == Figure(value=3.0, unit="ms")


def test_a_script_hands_over_what_is_read(tmp_path: Path) -> None:
    """And nothing else: a file of another form is no result."""
    figures = {"never / bare": Figure(value=1.01, unit="times", low=1.0, high=1.02)}
    write_figures(tmp_path / "f.json", figures)
    assert read_rows(tmp_path / "f.json") == [Row({}, figures)]
    rows = [Row({"text": "code", "arm": arm}, figures) for arm in ("plain", "adapted")]
    write_figures(tmp_path / "f.json", rows)
    assert read_rows(tmp_path / "f.json") == rows
    write_figures(None, figures)
    (tmp_path / "f.json").write_text('{"never / bare": 1.01}')
    with pytest.raises(RunFolderError, match=r"no figures"):
        read_rows(tmp_path / "f.json")


# --- rows of runs ----------------------------------------------------------------------------


def group(tokens: int, seconds: float, source: str | None = None) -> GroupFigures:
    """Rounds of two tokens before position 512, of four behind it."""
    places = [Place(0, tokens // 4, tokens // 2, tokens // 4, tokens // 2)]
    places.append(Place(512, tokens // 8, tokens // 2, tokens // 8, tokens // 2))
    return GroupFigures(
        source=source, tokens=tokens, repeated=0, drafted=tokens, seconds=seconds, places=places
    )


def made_up(tmp_path: Path, seconds: dict[str, list[float]], **labels: str) -> BenchRun:
    """A run whose arms took so long for each group of 800 tokens, of two texts in turn."""
    import msgspec

    name = "-".join(("run", *labels.values()))
    config = load_config(QUICKSTART, [f"run.dir={tmp_path}", f"run.name={name}"])
    summary = make_run(config.run_folder, tuple(seconds))
    for arm, spent in seconds.items():
        texts = ["near", "far"] * len(spent)
        groups = [group(800, s, text) for s, text in zip(spent, texts, strict=False)]
        summary.arms[arm].by_group = groups
    (config.run_folder / "summary.json").write_bytes(msgspec.json.encode(summary))
    return BenchRun(labels, 0, Job(name, config))


def suite(**changes: object) -> RunsSuite:
    import msgspec

    raw = {"kind": "runs", "about": "?", "minutes": 1, "base": "x.yaml", **changes}
    return msgspec.convert(raw, RunsSuite)


def at(rows: list[Row], **labels: str) -> dict[str, Figure]:
    (row,) = (row for row in rows if row.at == labels)
    return row.figures


def test_rows_pool_seeds_and_compare_with_the_better_control(tmp_path: Path) -> None:
    """By hand: speeds are sums over sums, and of two frozen arms the faster is what counts on each text."""
    seconds = {
        "plain": [8.0] * 12,
        "frozen": [4.0, 8.0] * 6,
        "frozen+window": [8.0, 4.0] * 6,
        "adapted": [2.0, 2.5] * 6,
    }
    runs = [made_up(tmp_path, seconds), made_up(tmp_path, seconds)]
    against = {"of_frozen": {"arms": ["frozen", "frozen+window"]}, "of_plain": {"arms": ["plain"]}}
    rows = rows_of(suite(against=against, behind=512), runs)
    assert [row.at["text"] for row in rows] == ["all"] * 4 + ["near"] * 4 + ["far"] * 4
    near, far = (at(rows, text=text, arm="adapted") for text in ("near", "far"))
    assert near["tokens"] == Figure(value=9600, unit="tokens")
    assert near["tokens_per_s"].value == pytest.approx(400)
    assert near["of_frozen"].value == pytest.approx(2.0)  # of 4 seconds, not of 8
    assert far["of_frozen"].value == pytest.approx(1.6)
    assert at(rows, text="all", arm="adapted")["of_plain"].value == pytest.approx(8 / 2.25)
    assert near["of_frozen"].low is not None
    assert near["tau"].value == pytest.approx(800 / 300)
    assert near["tau_novel_behind"].value == pytest.approx(4.0)
    assert "of_frozen" not in at(rows, text="near", arm="frozen")
    assert "of_plain" not in at(rows, text="near", arm="plain")


def test_a_ratio_of_few_groups_claims_nothing(tmp_path: Path) -> None:
    """Below six groups there is no interval, as in a run's own report."""
    seconds = {"frozen": [4.0] * 10, "adapted": [2.0] * 10}
    rows = rows_of(suite(against={"of_frozen": {"arms": ["frozen"]}}), [made_up(tmp_path, seconds)])
    near = at(rows, text="near", arm="adapted")["of_frozen"]
    assert near == Figure(value=2.0, unit="times")
    assert at(rows, text="all", arm="adapted")["of_frozen"].low is not None


def test_a_control_that_was_not_run_in_full_does_not_count(tmp_path: Path) -> None:
    """A seed of another suite, or an arm that one seed lacks: its pool is of other text."""
    runs = [
        made_up(tmp_path, {"frozen": [4.0] * 6, "adapted": [2.0] * 6}, part="a"),
        made_up(tmp_path, {"adapted": [2.0] * 6}, part="b"),
    ]
    rows = rows_of(suite(against={"of_frozen": {"arms": ["frozen"]}}), runs)
    assert "of_frozen" in at(rows, part="a", text="near", arm="adapted")
    assert "of_frozen" not in at(rows, part="b", text="near", arm="adapted")


def test_what_is_below_its_bound_is_named(tmp_path: Path) -> None:
    """A suite that says `never worse` has to be able to fail; controls have no bound."""
    seconds = {"frozen": [2.0] * 12, "adapted": [2.0, 4.0] * 6}
    own = suite(against={"of_frozen": {"arms": ["frozen"]}}, at_least={"of_frozen": 0.98})
    found = too_low(own, rows_of(own, [made_up(tmp_path, seconds)]))
    assert found == [
        "all adapted: of_frozen 0.667 is below 0.98",
        "far adapted: of_frozen 0.500 is below 0.98",
    ]


def test_first_candidates_are_counted_by_request() -> None:
    """Rows add up until a verdict other than waiting; what comes behind it is no first candidate."""

    def verdict(action: str, rows: int, score: float | None = 1.0) -> dict:
        return {"kind": "verdict", "verdict": {
            "action": action, "num_rows": rows, "candidate_score": score}}  # fmt: skip

    events = [
        verdict("wait", 64), verdict("publish", 32), verdict("rollback", 64), {"kind": "reset"},
        verdict("wait", 64, None), verdict("wait", 64), verdict("rollback", 64), {"kind": "reset"},
        verdict("wait", 32),
    ]  # fmt: skip
    assert list(first_candidates(events)) == [96, -128]


def test_seconds_are_spoken_by_their_size() -> None:
    """What is left is read at a glance, and an hour is not 60 min."""
    assert [spoken(s) for s in (12, 59.6, 61, 3570, 11_100)] == [
        "12 s", "60 s", "1 min", "1 h 0 min", "3 h 5 min",
    ]  # fmt: skip


# --- suites ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_every_shipped_suite_is_read_and_names_what_there_is(file: Path) -> None:
    """Its experiment is changed by keys that exist, its scripts are there, its views' figures are known."""
    own = load_suite(file)
    if isinstance(own, ScriptSuite):
        assert (ROOT / own.script).exists()
        return
    words = [f"{key}={json.dumps(value)}" for key, value in own.set.items()]
    words += ["engine.kind=trace", "engine.trace=of each text"] * (own.record is not None)
    config = load_config(file.parent / own.base, words)
    assert own.figures == "candidates" or set(config.arms)
    arms = {arm for one in own.against.values() for arm in one.arms}
    ends = {arm.rpartition(".")[2] for arm in config.arms} | set(config.arms)
    assert arms <= ends | {"frozen"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the tiny world's data in it, which files name as paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinyworld").symlink_to(ROOT / "tinyworld")
    return tmp_path


def tiny_suite(folder: Path, **changes: object) -> Path:
    """Two arms, two seeds, eight documents of 24 tokens."""
    settings = {
        "kind": "runs",
        "about": "is it told?",
        "minutes": 1,
        "base": str(QUICKSTART),
        "set": {
            "arms": ["frozen", "adapted"],
            "workload.max_new_tokens": 24,
            "workload.max_prompts": 6,
            "adapt.policy.rounds": 4,
            "adapt.replay": {"window": 64, "anchors": 8},
        },
        "against": {"of_frozen": {"arms": ["frozen"]}},
        "views": {"table": {"figures": ["tau", "of_frozen"]}},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_a_run_is_known_by_its_settings(here: Path) -> None:
    """What changes a run changes its folder; where it lies and what it is called do not."""
    file = tiny_suite(here, seeds=[0, 1])
    plan = plan_suite("tiny", load_suite(file), file)
    again = plan_suite("other", load_suite(file), file)
    other = plan_suite("tiny", load_suite(file), file, ["adapt.trainer.lr=1e-4"])
    ids = [run.job.id for run in plan.runs]
    assert len(set(ids)) == 2
    assert [run.job.id for run in again.runs] == ids
    assert not set(ids) & {run.job.id for run in other.runs}


def test_seeds_begin_with_another_text_each(here: Path) -> None:
    """What learning may spend in advance it spends on the first text."""
    texts = [f"tinyworld/documents/{name}.jsonl" for name in ("code", "manuals", "translated")]
    file = tiny_suite(here, seeds=[0, 1, 4], rotate_texts=True, set={"workload.documents": texts})
    plan = plan_suite("tiny", load_suite(file), file)
    first = [run.job.config.workload.documents for run in plan.runs]
    assert [some[0] for some in first if isinstance(some, tuple)] == [texts[0], texts[1], texts[1]]
    assert all(sorted(some) == sorted(texts) for some in first if isinstance(some, tuple))


def test_texts_are_recorded_once_for_all_points(here: Path) -> None:
    """Every draft is judged on the same words, with the features that any of them needs."""
    record = {
        "dir": str(here / "traces"),
        "set": {"workload.max_new_tokens": 16},
        "texts": {
            "far": {},
            "near": {"workload.documents": "tinyworld/documents/code.jsonl"},
        },
    }
    grid = {"draft": {kind: {"drafter.kind": kind} for kind in ("eagle3", "dflash")}}
    file = tiny_suite(here, record=record, grid=grid)
    plan = plan_suite("tiny", load_suite(file), file)
    assert len(plan.recordings) == 2
    assert [run.labels for run in plan.runs] == [
        {"draft": kind, "text": text} for kind in ("eagle3", "dflash") for text in ("far", "near")
    ]
    far = str(plan.recordings[0].config.run_folder / "trace")
    assert [run.job.config.engine.trace for run in plan.runs][::2] == [far, far]


def test_an_unknown_suite_or_key_is_refused(here: Path) -> None:
    """By one line that says what there is."""
    code, _, err = run_cli("bench", "nothing")
    assert code == 2
    assert "no suite 'nothing'" in err
    code, _, err = run_cli("bench")
    assert code == 2
    with pytest.raises(ConfigError, match=r"tiny.yaml: .*seed.*allowed"):
        load_suite(tiny_suite(here, seed=1))


@pytest.mark.slow
@pytest.mark.long
def test_a_suite_is_measured_once_and_its_result_says_with_what(here: Path) -> None:
    """The second call measures nothing; a figure has its unit, a run its commit and machine."""
    file = tiny_suite(here, seeds=[0, 1])
    code, out, err = run_cli("bench", "-c", file, "--json")
    assert code == 0, err
    (result,) = json.loads(out)
    summaries = sorted((here / "runs" / "bench" / "tiny").glob("*/summary.json"))
    assert len(summaries) == 2
    times = [path.stat().st_mtime_ns for path in summaries]
    assert result["command"] == f"cosched bench -c {file}"
    assert {"commit", "dirty", "date", "machine", "seconds", "suite"} <= result.keys()
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert result["machine"]["packages"]["torch"]
    assert result["machine"]["cores"] >= 1
    adapted = next(row for row in result["rows"] if row["at"] == {"arm": "adapted"})
    assert adapted["figures"]["of_frozen"]["unit"] == "times"
    assert adapted["figures"]["of_frozen"]["low"] < adapted["figures"]["of_frozen"]["high"]
    assert adapted["figures"]["updates"]["value"] > 0
    code, out, err = run_cli("bench", "-c", file, "--seed", 1)
    assert code == 0, err
    assert "of frozen" in out
    assert [path.stat().st_mtime_ns for path in summaries] == times
    assert len(json.loads((here / "runs/bench/tiny/result.json").read_text())["runs"]) == 1


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_suite_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second group: the same command ends with the figures of all of them."""
    from cosched.bench import measure
    from cosched.bench.measure import Progress

    file = tiny_suite(here)
    seen: list[float] = []
    whole = measure._Clock.tell

    def stop(self: measure._Clock, share: float) -> None:
        whole(self, share)
        seen.append(share)
        if share > 0.5 and max(seen[:-1]) <= 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr(measure._Clock, "tell", stop)
    code, _, err = run_cli("bench", "-c", file)
    assert code == 1
    assert "same command" in err
    monkeypatch.setattr(measure._Clock, "tell", whole)
    told: list[Progress] = []
    plan = plan_suite("tiny", load_suite(file), file)
    measure.measure(plan, told.append)
    assert told[1].share > 0.3  # not from the beginning
    assert told[-1].share == 1.0
    assert measure.measured_with(plan.runs[0].job.config.run_folder) is not None
    code, out, err = run_cli("bench", "-c", file, "--json")
    rows = json.loads(out)[0]["rows"]
    assert {row["figures"]["tokens"]["value"] for row in rows} == {6 * 24}


def test_a_script_s_figures_become_a_result(here: Path) -> None:
    """It is told where to write, what it prints is shown apart, and one that fails is named."""
    script = here / "script.py"
    script.write_text(
        "import pathlib, sys\nprint('busy')\n"
        "path = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
        'path.write_text(\'{"a / b": {"value": 1.5, "unit": "times", "low": 1.2, "high": 1.7}}\')\n'
        "sys.exit(int(sys.argv[1]))\n"
    )
    file = here / "own.yaml"
    for code, word in ((0, "0"), (1, "3")):
        settings = {"kind": "script", "about": "?", "minutes": 1, "script": str(script)}
        file.write_text(yaml.safe_dump({**settings, "words": [word]}))
        found, out, err = run_cli("bench", "-c", file)
        assert found == code, err
        assert ("1.50 (1.20" in out) == (code == 0)
    assert "ended with 3" in err
