"""``adapt.placement: sidecar``: which addresses need a key, and what does not go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosched.errors import ConfigError
from tests.helpers.sidecar import configured

KEYLESS = "adapt.sidecar.address=tcp://10.0.0.7:29600"


@pytest.mark.parametrize(
    "address",
    ["ipc:///tmp/some/socket", "tcp://127.0.0.1:29600", "tcp://localhost:1", "tcp://[::1]:29600"],
)
def test_on_this_machine_nobody_needs_a_key(tmp_path: Path, address: str) -> None:
    """Sockets of files and the loopback are for who is here already."""
    config = configured(tmp_path, f"adapt.sidecar.address={address}")
    assert config.adapt.sidecar.address == address


@pytest.mark.parametrize(
    "address", ["tcp://10.0.0.7:29600", "tcp://*:29600", "tcp://trainer.example:29600"]
)
def test_where_others_can_speak_a_key_is_required(tmp_path: Path, address: str) -> None:
    """Anybody could send rows to learn from; with a key the same address is accepted."""
    words = f"adapt.sidecar.address={address}"
    with pytest.raises(ConfigError, match=r"adapt\.sidecar\.key_file: required"):
        configured(tmp_path, words)
    assert configured(tmp_path, words, "adapt.sidecar.key_file=some/key")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["adapt.sidecar.address=null"], r"adapt\.sidecar\.address"),
        (["adapt.sidecar.address=udp://127.0.0.1:1"], r"adapt\.sidecar\.address"),
        (["adapt.sidecar.address=ipc://relative"], r"adapt\.sidecar\.address"),
        (["adapt.sidecar.device=tpu"], r"adapt\.sidecar\.device"),
        (["adapt.sidecar.queue_rounds=1"], r"adapt\.sidecar\.queue_rounds"),
        (["adapt.placement=elsewhere"], r"adapt\.placement"),
        (["adapt.scope.state=per_request"], r"adapt\.scope\.state"),
        (["engine.arguments={tp_size: 2}"], r"engine\.arguments\.tp_size"),
        (["engine.kind=trace", "engine.trace=t", "engine.exact=false"], r"adapt\.placement"),
    ],
)
def test_what_does_not_go_with_a_sidecar_is_named(
    tmp_path: Path, words: list[str], key: str
) -> None:
    """Each by its own key, when the file is read."""
    with pytest.raises(ConfigError, match=key):
        configured(tmp_path, *words)


def test_a_colocated_draft_needs_no_address(tmp_path: Path) -> None:
    """The section is there for who wants it."""
    words = "adapt.placement=colocated", "adapt.sidecar.address=null"
    assert configured(tmp_path, *words).adapt.placement == "colocated"
