"""Saved states of numbers, and a program that writes them until it is killed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from cosched.telemetry.saved_states import SavedStates


def numbered(number: int) -> Callable[[Path], None]:
    """A state of several files, one of them in a folder, that all say a number."""

    def fill(path: Path) -> None:
        (path / "state.json").write_text(f"{number}")
        (path / "draft").mkdir()
        (path / "draft" / "model").write_bytes(number.to_bytes(4, "big") * 5000)

    return fill


def number_of(path: Path | None) -> int:
    """What all files of a state say."""
    assert path is not None
    number = int((path / "state.json").read_text())
    assert (path / "draft" / "model").read_bytes() == number.to_bytes(4, "big") * 5000
    return number


def main() -> None:
    """Write one state after the other, from the newest on, and report each that is whole."""
    states = SavedStates(Path(sys.argv[1]), keep=2)
    newest = states.newest()
    number = 0 if newest is None else number_of(newest)
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()
    while True:
        number += 1
        states.save(numbered(number))
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
