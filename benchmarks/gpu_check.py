"""Everything that still lacks a GPU figure, in short arms: gpu_check.sh says how to call it.

An arm is one command with a bound in seconds, at which it is ended. As it ends its figures, or the
error and the last lines of what it printed, go into ``WORK/ARM.json``; an arm whose file is there is
skipped, so that a machine lent for some minutes at a time is enough. An arm that fails stops no
other, and one that would not fit into what is left of ``--minutes`` waits for the next call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from gpu_arms import ROOT, Arm, arms
from gpu_table import show

LAST = 1500  # characters of what a failing arm printed that are kept
GRACE = 10  # seconds between asking an arm to end and ending it
SLOWER = 4  # a CPU that others use as well, than a GPU: a dry run's bounds are that much longer


def describe(python: str, dry: bool) -> dict[str, str]:
    """What the figures are of, as the arms' interpreter sees it.

    Raises:
        SystemExit: there is no CUDA device, and this is no dry run.
    """
    ask = (
        "import json, torch; cuda = torch.cuda.is_available();"
        "print(json.dumps([torch.cuda.get_device_name() if cuda else None, torch.__version__]))"
    )
    said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(f"{python} cannot import torch:\n{said.stderr[-LAST:]}")
    device, torch = json.loads(said.stdout)
    if device is None and not dry:
        raise SystemExit(
            "no CUDA device; --dry-run starts every arm on the CPU with the tiny world"
        )
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": "a dry run on the CPU" if dry else device,
        "commit": os.environ.get("COMMIT") or commit or "unknown",  # a copy has no repository
        "python": platform.python_version(),
        "torch": torch,
    }


def has_sglang(python: str) -> bool:
    ask = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    return subprocess.run([python, "-c", ask], check=False).returncode == 0


def environment(work: Path, dry: bool) -> dict[str, str]:
    """Nothing is downloaded, and cosched is that of this folder, whether it is installed or not.

    SGLang finds plugins through a package's metadata, which a folder on the search path may be.
    """
    metadata = work / "site" / "cosched-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines: list[str] = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cosched\nVersion: 0\n")
    paths = [str(ROOT), str(metadata.parent), os.environ.get("PYTHONPATH", "")]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    on_cpu = {"COSCHED_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if dry else {}
    found = os.pathsep.join(filter(None, paths))
    return {**os.environ, **offline, **on_cpu, "PYTHONPATH": found, "PYTHONUNBUFFERED": "1"}


def execute(command: list[str], bound: float, variables: dict[str, str], log: Path) -> str | None:
    """Run it in a process group of its own, which ends with it; returns what went wrong."""
    with log.open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, cwd=ROOT, env=variables, start_new_session=True
        )
        try:
            code, late = process.wait(bound), False
        except subprocess.TimeoutExpired:
            code, late = None, True
        finally:
            _end_group(process)
    if not late and code == 0:
        return None
    what = f"not done after {bound:.0f} s" if late else f"ended with {code}"
    return f"{what}; it said last:\n{log.read_text(errors='replace')[-LAST:]}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End an arm and all that it started: an engine that is left keeps the device's memory."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def read_figures(arm: Arm, file: Path) -> Any:
    """What the arm wrote, also where it failed: some tests may have passed."""
    if not file.exists():
        return None
    if not arm.is_pytest:
        return json.loads(file.read_text(encoding="utf-8"))
    suite = ET.parse(file).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name")
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def bound_of(arm: Arm, options: argparse.Namespace) -> float:
    return arm.bound * (SLOWER if options.dry_run else 1)


def run_arm(arm: Arm, python: str, options: argparse.Namespace, facts: dict[str, str]) -> None:
    """Run one and write its file."""
    work: Path = options.work
    made, log = work / f"{arm.name}.figures", work / f"{arm.name}.log"
    made.unlink(missing_ok=True)
    command = [python, *arm.command(made, options.dry_run)]
    started, date = time.monotonic(), datetime.datetime.now(datetime.UTC)
    variables = environment(work, options.dry_run)
    error = execute(command, bound_of(arm, options), variables, log)
    record = {
        "arm": arm.name,
        "command": shlex.join(command),
        **facts,
        "date": date.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "error": error,
        "figures": read_figures(arm, made),
    }
    made.unlink(missing_ok=True)
    finished = work / f"{arm.name}.json"
    partial = finished.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(finished)  # a file that is there is whole
    print(f"{arm.name}: {'failed' if error else 'done'} in {record['seconds']} s", flush=True)
    if error:
        print(error, flush=True)


def run_all(chosen: list[Arm], options: argparse.Namespace) -> None:
    """Run those that are missing and fit into the time."""
    end = time.monotonic() + 60 * options.minutes
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    missing = [arm for arm in chosen if options.again or not (work / f"{arm.name}.json").exists()]
    if not missing:
        return
    facts = describe(options.python, options.dry_run)
    served = any(arm.is_sglang for arm in missing) and has_sglang(options.sglang_python)
    for arm in missing:
        if arm.is_sglang and not served:
            print(f"{arm.name}: skipped, {options.sglang_python} has no SGLang", flush=True)
        elif time.monotonic() + bound_of(arm, options) + GRACE > end:
            print(f"{arm.name}: left for the next call", flush=True)
        else:
            python = options.sglang_python if arm.is_sglang else options.python
            run_arm(arm, python, options, facts)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arms", nargs="*", metavar="ARM", help="these alone (--list names all)")
    parser.add_argument("--list", action="store_true", help="name the arms and their bounds")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with the tiny world")
    parser.add_argument("--again", action="store_true", help="also arms whose file is there")
    parser.add_argument("--minutes", type=float, help="of this call; default: 9, a dry run's 60")
    parser.add_argument("--work", type=Path, help="default: runs/gpu_check, or runs/gpu_check_dry")
    parser.add_argument(
        "--config", default="configs/serve_tiny_gpu.yaml", help="what SGLang serves"
    )
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--sglang-python", default=sys.executable)
    options = parser.parse_args(words)
    default = ROOT / "runs" / ("gpu_check_dry" if options.dry_run else "gpu_check")
    options.work = (options.work or default).absolute()
    options.minutes = options.minutes or (60 if options.dry_run else 9)
    return options


def main() -> None:
    options = parsed()
    known = {arm.name: arm for arm in arms(options.config)}
    if unknown := [name for name in options.arms if name not in known]:
        raise SystemExit(f"no arm {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in options.arms or known]
    if options.list:
        for arm in chosen:
            print(f"{arm.name:<18} at most {arm.bound:>3} s: {shlex.join(arm.words)}")
        return
    if not options.table:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no arm is left running
        run_all(chosen, options)
    show(options.work, list(known))


if __name__ == "__main__":
    main()
