"""``adapt.placement: sidecar``: what does not go with it, and which addresses need a key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cosched.errors import ConfigError
from cosched.settings.device import check_name

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
    ranks = config.engine.arguments.get("tp_size", 1)
    if ranks != 1:
        raise ConfigError(
            f"engine.arguments.tp_size: {where}.placement = sidecar serves with one rank, got {ranks}; "
            f"use 1, or colocated"
        )
