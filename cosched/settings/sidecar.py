"""``adapt.placement: sidecar``: what does not go with it, and which addresses need a key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.settings.arms import adapts
from cosched.settings.device import check_name
from cosched.settings.sections import TrainerSettings

if TYPE_CHECKING:
    from cosched.settings.schema import Config

IPC = re.compile(r"ipc://(?P<path>/[^\x00]{1,100})")  # the system's limit is 107 bytes
TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9.*-]+):(?P<port>\d{1,5})")
LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]")


def check_sidecar(config: Config) -> None:
    """Refuse what a trainer elsewhere cannot do, and an address that others could speak to.

    Raises:
        ConfigError: something does not go with ``adapt.placement: sidecar``.
    """
    adapt, where = config.adapt, config.adapt_key
    settings = adapt.sidecar
    check_name(settings.device, f"{where}.sidecar.device")
    if adapt.placement == "colocated":
        return
    address = settings.address or ""
    tcp = TCP.fullmatch(address)
    if not (tcp or IPC.fullmatch(address)):
        raise ConfigError(
            f"{where}.sidecar.address: {where}.placement = sidecar needs ipc:///PATH (of at most 100 "
            f"letters) or tcp://HOST:PORT, got {settings.address!r}"
        )
    if tcp and settings.key_file is None and not LOOPBACK.fullmatch(tcp["host"]):
        raise ConfigError(
            f"{where}.sidecar.key_file: required for {settings.address}, which others can speak to; "
            f"write one with: openssl rand -hex 32 > FILE"
        )
    if config.engine.kind == "trace":
        raise ConfigError(
            f"{where}.placement: a trace is decoded in no time that a sidecar could learn in, got "
            f"engine.kind: trace; use colocated"
        )
    for name in ("background", "limit_seconds", "restarts"):
        value, usual = getattr(adapt.trainer, name), getattr(TrainerSettings(), name)
        if value != usual:
            raise ConfigError(
                f"{where}.trainer.{name}: with {where}.placement = sidecar training goes on in a thread of "
                f"the trainer's process, which nobody starts again, got {value}; leave it out"
            )
    if adapt.scope.state != "shared":
        raise ConfigError(
            f"{where}.scope.state: {where}.placement = sidecar has one draft for all servers, got "
            f"{adapt.scope.state}; use shared"
        )
    if config.experts:
        raise ConfigError(
            f"{where}.objective.kind: {config.objective_settings.kind} tries its experts while "
            f"nothing else goes on, and {where}.placement = sidecar trains beside; use fixed"
        )


def check_one_learner(config: Config) -> None:
    """Refuse arms that could not all have the trainer that there is.

    Raises:
        ConfigError: several arms learn in a sidecar.
    """
    learning = {arm: config.for_arm(arm) for arm in config.arms if adapts(arm)}
    elsewhere = [arm for arm, own in learning.items() if own.adapt.placement == "sidecar"]
    if len(elsewhere) > 1:
        where = learning[elsewhere[-1]].adapt_key
        raise ConfigError(
            f"arms: {', '.join(elsewhere)} learn in a sidecar, and a trainer has one draft, which sees "
            f"and learns the same everywhere; keep one of them, or use {where}.placement: colocated"
        )
