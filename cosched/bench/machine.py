"""What a figure was measured with: the commit of the code, and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import msgspec

CODE = ("cosched", "drafters", "losses", "schedulers", "configs", "benchmarks")
RESULTS = ":(exclude)benchmarks/results"  # a figure that is kept does not change the code
VECTOR_FLAG = re.compile(r"(avx|amx|fma|f16c|asimd|sve|bf16|i8mm)")
PACKAGES = ("torch", "deepspeed", "transformers", "sglang")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """``flags`` are those of vectors and matrices; ``device`` is a GPU's name, where there is one."""

    cpu: str
    flags: list[str]
    cores: int
    memory_bytes: int
    device: str | None
    python: str
    packages: dict[str, str]

    @property
    def in_words(self) -> str:
        """Short, for below a table."""
        cores = f"{self.cores} cores of an {self.cpu}"
        return cores if self.device is None else f"{self.device}, {cores}"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """``commit`` is None where the code lies in no repository; ``dirty`` it was changed since."""

    commit: str | None
    dirty: bool
    machine: Machine


def provenance() -> Provenance:
    """Of what is measured now."""
    root = Path(__file__).parents[2]
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    there = [name for name in CODE if (root / name).exists()]
    changed = _git(root, "status", "--porcelain", "--", *there, RESULTS)
    return Provenance(commit=commit or None, dirty=bool(changed), machine=this_machine())


def this_machine() -> Machine:
    """The one that this process runs on."""
    import torch

    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu, flags = _cpu()
    return Machine(
        cpu=cpu,
        flags=flags,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        packages=packages,
    )


def _cpu() -> tuple[str, list[str]]:
    """Its name, and which vectors and matrices it multiplies."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    words = flags[1].split() if flags else []
    own = sorted(word for word in words if VECTOR_FLAG.search(word))
    return (name[1].strip() if name else platform.processor() or platform.machine()), own


def _git(root: Path, *words: str) -> str:
    """What git says of the code; nothing where there is no git, or no repository."""
    try:
        run = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
