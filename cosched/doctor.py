"""``cosched doctor``: what is here, whether it fits together, and what to do where it does not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cosched.engines.sglang import CONFIG
from cosched.engines.sglang.cpu.environment import STAND_INS, environment, install_command
from cosched.engines.sglang.launcher.launch import check_servable
from cosched.engines.sglang.launcher.run_directory import too_long, version_of
from cosched.engines.sglang.operators.routes import call, status_of
from cosched.errors import CoschedError
from cosched.telemetry.alarms import SAID_ELSEWHERE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cosched.settings.schema import Config

# Oldest that is supported, and the first that is not; pyproject.toml says the same.
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", None),
    "transformers": ("5.8", "6"),
    "deepspeed": ("0.19.8", "0.20"),
    "peft": ("0.18", None),
    "sglang": ("0.5.20", "0.5.24"),
}
OPTIONAL = {
    "sglang": "cosched run works without it, cosched serve does not",
    "peft": "nothing that ships with cosched needs it",
}
PROBE_SECONDS = 300


class Finding(NamedTuple):
    """One line of the doctor's: ``bad`` is what stops something that was asked for."""

    level: Literal["ok", "note", "bad"]
    text: str


def examine(config: Config | None, url: str | None, api_key: str | None) -> Iterator[Finding]:
    """All findings, the quick ones first."""
    yield from packages()
    yield from device()
    yield from folders()
    if version_of("sglang") is not None:
        yield from kernels()
        yield from plugin()
    if config is not None:
        yield from draft(config)
    if url is not None:
        yield from server(url, api_key)


def packages() -> Iterator[Finding]:
    """Versions, against those that are supported."""
    version = sys.version_info[:3]
    text = f"Python {'.'.join(map(str, version))}"
    yield Finding("ok", text) if version >= (3, 11) else Finding("bad", f"{text}: 3.11 is needed")
    for name, (oldest, below) in SUPPORTED.items():
        found = version_of(name)
        wanted = f">={oldest}" + (f",<{below}" if below else "")
        if found is None:
            why = OPTIONAL.get(name)
            say = f"{name} is not installed: pip install '{name}{wanted}'"
            say = f"{say} ({why})" if why else say
            if name == "sglang":
                say = f"{say}; without a GPU, this instead:\n{install_command()}"
            yield Finding("note" if why else "bad", say)
        elif numbers(found) < numbers(oldest) or (below and numbers(found) >= numbers(below)):
            yield Finding("bad", f"{name} {found}: cosched supports {wanted}; install one of these")
        else:
            yield Finding("ok", f"{name} {found}")


def numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` is ``(2, 13, 0)``."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z-]", version)[0])))


def device() -> Iterator[Finding]:
    """What torch computes on."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")
    else:
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built}, but sees no device" if built else "torch has no CUDA"
        )
        yield Finding(
            "note",
            f"no GPU ({why}): SGLang serves on the CPU with engine.device: cpu, slowly",
        )


def folders() -> Iterator[Finding]:
    """Where the launcher puts its private folder."""
    path = tempfile.gettempdir()
    reason = too_long(path)
    yield Finding("bad", reason) if reason else Finding("ok", f"temporary folder {path}")


def kernels() -> Iterator[Finding]:
    """SGLang's compiled package, or what stands in for it."""
    import torch

    spec = importlib.util.find_spec("sgl_kernel")
    if spec is not None and not Path(spec.origin or "").is_relative_to(STAND_INS):
        yield Finding("ok", f"sgl_kernel: {Path(spec.origin or '').parent}")
    elif torch.cuda.is_available():
        yield Finding(
            "bad", "sgl_kernel is not installed, and a GPU server needs it: reinstall SGLang"
        )
    else:
        yield Finding("ok", "sgl_kernel: cosched's stand-in in plain PyTorch (CPU only)")


def plugin() -> Iterator[Finding]:
    """Whether SGLang takes our plugin up, seen from a process of its own."""
    import torch

    extra = {} if torch.cuda.is_available() else environment()
    process = subprocess.run(
        [sys.executable, "-m", "cosched.engines.sglang.launcher.probe"],
        env={**os.environ, **extra, CONFIG: os.devnull},
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
        check=False,
    )
    try:
        seen: dict[str, list[str]] = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        tail = "\n".join(process.stderr.splitlines()[-5:])
        yield Finding("bad", f"SGLang cannot be imported with cosched in it:\n{tail}")
        return
    yield from judge_plugin(seen, process.stderr)


def judge_plugin(seen: dict[str, list[str]], log: str) -> Iterator[Finding]:
    """What a probe saw, in words."""
    if "cosched" not in seen["entry_points"]:
        yield Finding(
            "bad",
            "SGLang finds no plugin 'cosched': the package is on the path but not installed; run "
            "pip install (-e .) in this environment",
        )
        return
    served = [name for name in seen["algorithms"] if name not in seen["without_worker"]]
    if not served:
        lines = [line for line in log.splitlines() if "Error" in line][-3:]
        yield Finding(
            "bad",
            "SGLang found the plugin and it did not take hold (does SGLANG_PLUGINS leave it out?)"
            + "".join(f"\n{line}" for line in lines),
        )
        return
    yield Finding("ok", f"the plugin takes hold: {', '.join(served)}")
    for name in seen["without_worker"]:
        yield Finding(
            "note",
            f"{name} has no worker: the module that its drafter names is missing; use another drafter",
        )
    for target in seen["hooks_missing"]:
        yield Finding("bad", f"SGLang has no {target} to hook into: use a supported version")


def draft(config: Config) -> Iterator[Finding]:
    """Whether the draft of a configuration can be served."""
    try:
        check_servable(config)
    except CoschedError as error:
        yield Finding("bad", str(error))
    else:
        path = config.drafter_settings.path
        yield Finding("ok", f"{path} can be served with {config.target.path}")


def server(url: str, api_key: str | None) -> Iterator[Finding]:
    """How a running server does."""
    try:
        answer: dict[str, Any] = call(url, "status", {}, api_key)
        status = status_of(answer)
    except CoschedError as error:
        yield Finding("bad", str(error))
        return
    if status.failure:
        yield Finding(
            "bad",
            f"{url}: training stopped for good: {status.failure}. It serves version "
            f"{status.draft_version} of its draft; restart it to learn again",
        )
    if status.warning:
        yield Finding("note", f"{url}: {status.warning}")
    for name, text in status.alarms.items():
        if name not in SAID_ELSEWHERE:
            yield Finding("note", f"{url}: alarm {name}: {text}; see docs/watching.md")
    if not status.adapting and not status.failure:
        yield Finding(
            "note", f"{url}: its draft does not learn: adaptation is off or its policy never trains"
        )
    length = status.acceptance_length
    shown = "nothing drafted yet" if length is None else f"acceptance length {length:.2f}"
    yield Finding(
        "ok",
        f"{url}: {status.algorithm}, version {status.draft_version}, {status.rounds} rounds, "
        f"{status.updates} updates, {shown} (recently {status.recent_acceptance_length:.2f})",
    )
