"""How a CPU server finds the stand-ins: folders on the module search path, for what is absent.

SGLang starts its scheduler and its detokenizer as processes of their own, and these import
``sgl_kernel`` before any plugin runs. A folder on ``PYTHONPATH`` reaches them all. A stand-in has a
folder of its own, so that it is offered only where the real package is absent.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from cosched.errors import ConfigError

SWITCH = "SGLANG_USE_CPU_ENGINE"
STAND_INS = Path(__file__).parent / "stand_ins"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"

_SETTINGS = {
    SWITCH: "1",  # SGLang's own: take the CPU paths although the processor has no AMX
    "OMP_NUM_THREADS": "1",  # several processes share the cores: more threads are 50 times slower
    "TORCHDYNAMO_DISABLE": "1",  # else the first draft waits about 14 s for a compiler
    "HF_HUB_OFFLINE": "1",  # the models are folders
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def requested() -> bool:
    """Whether this process was started to serve on a CPU."""
    return os.environ.get(SWITCH) == "1"


def install_command() -> str:
    """What puts SGLang into this environment for a CPU; torch and transformers stay as they are."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps"]
    return shlex.join([*pip, "-r", str(REQUIREMENTS)])


def environment() -> dict[str, str]:
    """Variables to start a CPU server with, on top of one's own: ``{**os.environ, **environment()}``.

    ``PYTHONPATH`` keeps what this process has in it.

    Raises:
        ConfigError: a package that we could stand in for is installed and cannot be imported.
    """
    inherited = os.environ.get("PYTHONPATH")
    paths = [*_folders(), *([inherited] if inherited else [])]
    return {**_SETTINGS, "PYTHONPATH": os.pathsep.join(paths)}


def install_stand_ins() -> None:
    """Let this process, and what it spawns, import the stand-ins of absent packages.

    For a process that already runs and imports SGLang itself. Does nothing unless
    ``SGLANG_USE_CPU_ENGINE=1``; a second call changes nothing.

    Raises:
        ConfigError: as ``environment``.
    """
    if requested():
        # At the end: what is installed later goes first. Spawned processes inherit `sys.path`.
        sys.path.extend(folder for folder in _folders() if folder not in sys.path)


def _folders() -> list[str]:
    """The folders of those stand-ins whose real package is absent."""
    return [str(folder) for folder in sorted(STAND_INS.iterdir()) if not _is_installed(folder.name)]


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    if spec is None or (spec.origin and Path(spec.origin).is_relative_to(STAND_INS)):
        return False
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        names = importlib.metadata.packages_distributions().get(package, [package])
        raise ConfigError(
            f"{package} is installed ({spec.origin}) but cannot be imported: {error}. It is "
            f"probably built for a GPU or for another torch. To serve on a CPU, let cosched stand in "
            f"for it: pip uninstall {' '.join(sorted(set(names)))}"
        ) from error
    return True
