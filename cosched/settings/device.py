"""``engine.device``: what it may say, and what that is on this machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cosched.errors import ConfigError

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

# Settings alone need no tensor library: torch is imported where a machine is looked at.


def check_name(device: str, key: str = "engine.device") -> None:
    """Whether it is one that torch would know; ``key`` is where the file says it.

    Raises:
        ConfigError: it is not.
    """
    if not NAME.fullmatch(device):
        raise ConfigError(f"{key}: auto, cpu, cuda or cuda:N is allowed, got {device!r}")


def check_there(device: str, key: str = "engine.device") -> None:
    """Whether this machine has it; ``key`` as above.

    Raises:
        ConfigError: it has not.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    import torch

    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        there = f"{count} of them" if count else "no GPU"
        raise ConfigError(
            f"{key}: {device!r}, and torch sees {there} here; use auto or cpu (cosched doctor "
            f"says what torch was built for)"
        )


def device_of(device: str) -> torch.device:
    """Torch's; ``auto`` is a GPU where there is one."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
