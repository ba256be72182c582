"""benchmarks/gpu_check.sh, which nobody runs for months: that its commands are still understood."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cosched.settings.load import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = ["configs/serve_tiny_gpu.yaml", "configs/serve_qwen3_8b_eagle3.yaml"]


class Understood(Exception):  # noqa: N818 - no error
    """What a script was told; raised where it would begin."""


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import one another by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> Any:
    return importlib.import_module(name)


def read_by(script: str, words: list[str]) -> Namespace:
    """The words as the script's own parser reads them."""
    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, stopping_after(method))
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Understood) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return caught.value.args[0]


def stopping_after(method: str) -> Any:
    whole = getattr(argparse.ArgumentParser, method)

    def stop(self: Any, *given: Any) -> None:
        raise Understood(whole(self, *given))

    return stop


@pytest.mark.slow
def test_the_list_names_every_arm() -> None:
    """The shell script finds its Python, and an arm is chosen by the name that is shown."""
    run = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", "--list"],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    arms = module("gpu_arms").arms(CONFIGS[0])
    assert [line.split()[0] for line in run.stdout.splitlines()] == [arm.name for arm in arms]
    assert len({arm.name for arm in arms}) == len(arms)
    assert max(arm.bound for arm in arms) <= 8 * 60, "an arm has to fit into a call"


@pytest.mark.parametrize("dry", [False, True])
def test_every_script_understands_its_arm(dry: bool) -> None:
    """An option that was renamed would be found on the GPU, where time is short."""
    for arm in module("gpu_arms").arms(CONFIGS[0]):
        if arm.is_pytest:
            continue
        script, *words = arm.command(Path("figures.json"), dry)
        read = read_by(script, words)
        figures = read.rows if arm.is_sglang else read.json
        assert figures == Path("figures.json"), arm.name


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_of_a_server_s_arm_is_one(config: str) -> None:
    """Keys are renamed too, and a wrong one would cost the start of an engine each."""
    served = [arm for arm in module("gpu_arms").arms(config) if arm.is_sglang]
    assert len(served) == 10
    for arm in served:
        (own,) = (spec for word, spec in pairwise(arm.words) if word == "--arm")
        words = [word for word in arm.words if word != own]
        keys = [word for word in (*words, *own.split("/")) if "=" in word]
        assert keys
        load_config(ROOT / config, keys)


@pytest.mark.slow
@pytest.mark.long
def test_every_arm_of_tests_has_some() -> None:
    """One that chooses none would say that all is well."""
    tests = [arm for arm in module("gpu_arms").arms(CONFIGS[0]) if arm.is_pytest]
    words = tests[0].words[: tests[0].words.index("-k")]
    run = subprocess.run(
        [sys.executable, *words, "--collect-only"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ids = [line.partition("::")[2] for line in run.stdout.splitlines() if "::" in line]
    assert ids, run.stdout + run.stderr
    chosen: set[str] = set()
    for arm in tests:
        for which in (arm.words[-1], arm.tiny[-1]):
            found = {one for one in ids if all(word in one for word in which.split(" and "))}
            assert found, which
            chosen |= found
    assert chosen == set(ids)


def arm_of(name: str, code: str, bound: int = 20) -> Any:
    """An arm that runs that code; ``out`` is the file for its figures."""
    head = "import json, pathlib, sys; out = pathlib.Path(sys.argv[-1]);"
    return module("gpu_arms").Arm(name, ("-c", head + code), (), bound)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    check = module("gpu_check")
    monkeypatch.setattr(check, "describe", lambda *_: {"device": "none", "torch": "", "commit": ""})
    return check.parsed(["--work", str(tmp_path / "work"), "--minutes", "5"])


def test_arms_that_fail_or_hang_are_recorded_and_the_next_goes_on(options: Namespace) -> None:
    """A lease is short: one bad arm, or an engine that it left running, must not take the rest of it."""
    check, work = module("gpu_check"), options.work
    pids = work / "pids"
    hang = (
        f"import subprocess; p = subprocess.Popen(['sleep', '60']);"
        f"pathlib.Path({str(pids)!r}).write_text(str(p.pid)); p.wait()"
    )
    arms = [
        arm_of("fails", "out.write_text('{\"half\": 1}'); print('because'); sys.exit(3)"),
        arm_of("hangs", hang, bound=2),
        arm_of("works", "out.write_text(json.dumps({'figure': 2}))"),
    ]
    check.run_all(arms, options)
    fails, hangs, works = (json.loads((work / f"{arm.name}.json").read_text()) for arm in arms)
    assert fails["error"].startswith("ended with 3")
    assert "because" in fails["error"]
    assert fails["figures"] == {"half": 1}
    assert hangs["error"].startswith("not done after 2 s")
    assert (works["error"], works["figures"]) == (None, {"figure": 2})
    assert {"command", "commit", "date", "device", "seconds"} <= works.keys()
    assert not is_running(int(pids.read_text()))


def is_running(pid: int) -> bool:
    """Whether it is there and no mere entry that nobody has collected yet."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_a_call_goes_on_where_the_last_one_ended(options: Namespace) -> None:
    """What is there is not measured again, and what does not fit into the time waits."""
    check, work = module("gpu_check"), options.work
    count = "seen = out.parent / 'seen'; seen.open('a').write('x'); out.write_text('{}')"
    arms = [arm_of("short", count), arm_of("long", count, bound=600)]
    for _ in range(2):
        check.run_all(arms, options)
        assert [file.name for file in work.glob("*.json")] == ["short.json"]
    assert (work / "seen").read_text() == "x"
    options.minutes = 11
    check.run_all(arms, options)
    assert (work / "seen").read_text() == "xx"
    options.again = True
    check.run_all(arms[:1], options)
    assert (work / "seen").read_text() == "xxx"


def test_the_table_compares_servers_with_the_stock_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 a text may change by itself: only beside a second stock run does a count say anything."""

    def served(name: str, seconds: float, texts: list[str]) -> None:
        row = {
            "arm": "stock", "requests": 2, "tokens/s": 1.0, "gap p99 ms": 2.0 * seconds,
            "hidden": 0.0, "learning": 0.0, "versions": 0,
            "pairs": [{"seconds": seconds, "texts": texts}],
        }  # fmt: skip
        facts = dict.fromkeys(("device", "torch", "commit", "date", "command"), "x")
        record = {"arm": name, **facts, "seconds": 1.0, "error": None, "figures": [row]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    served("sglang-stock", 1.0, ["a", "b"])
    served("sglang-stock-again", 1.25, ["a", "c"])
    served("sglang-never", 1.5, ["a", "b"])
    names = ["sglang-stock", "sglang-stock-again", "sglang-never", "overhead"]
    module("gpu_table").show(tmp_path, names)
    text = capsys.readouterr().out
    assert "3 of 4 arms" in text
    assert "noise floor at 2 requests: time 1.250, other text 1 of 2" in text
    (never,) = (line for line in text.splitlines() if "at most 1.02" in line)
    assert "1.500" in never
    assert "0 of 2" in never


def test_the_table_has_each_figure_beside_its_aim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script's figures have a unit and an interval; what is compared with an aim is the value."""
    facts = dict.fromkeys(("device", "torch", "commit", "date", "command"), "x")
    figures = {"never / bare": {"value": 1.01, "unit": "times", "low": 1.0, "high": 1.02}}
    record = {"arm": "overhead", **facts, "seconds": 1.0, "error": None, "figures": figures}
    (tmp_path / "overhead.json").write_text(json.dumps(record))
    module("gpu_table").show(tmp_path, ["overhead"])
    assert "| overhead | never / bare | 1.010 | at most 1.02 |" in capsys.readouterr().out
