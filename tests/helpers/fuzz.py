"""Seeded damage: what is done to an input, how much of it there is, and what may come of it.

``COSCHED_FUZZ`` says how many inputs each test takes, the whole of them with ``make fuzz``. Input ``i`` is
the same whatever their number, so a failure names all that is needed to see it again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cosched.errors import CoschedError

LONGEST_MESSAGE = 4000  # characters that a person is asked to read
ROOM = 1 << 30  # bytes that reading any input may take

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "-1", "null", "true", "1e9", "auto",
    "a" * 300, "ü\u202e\u0000", "\ud800", "../../etc", "/dev/null", "~", ".", "a.b", "a[0]", "${run.name}",
    "${run", "${oc.env:NOT_SET_ANYWHERE}", "${oc.create:{a:1}}", "???", "%s%n", "<x>", "[red]",
    [], {}, [[]], [None], {"": None}, {"kind": None}, {"kind": "nobody"}, [1, "a", {}],
    {"a": {"b": {"c": {}}}}, [0] * 50, {"kind": []}, {1: 2}, {None: 1}, {True: False}, {1.5: []},
)  # fmt: skip


def number(usual: int, share: float = 1.0) -> int:
    """How many inputs a test takes: so many, or its share of what the environment asks for."""
    asked = os.environ.get("COSCHED_FUZZ")
    return usual if asked is None else math.ceil(share * int(asked))


def cases(name: str, usual: int, share: float = 1.0) -> Iterator[tuple[int, random.Random]]:
    """The inputs of a test by their numbers, each with a generator of its own."""
    for case in range(number(usual, share)):
        yield case, random.Random(f"{name} {case}")


@contextmanager
def only_ours(case: int, came: object) -> Generator[None]:
    """Nothing is raised in here but a clear error of ours."""
    try:
        yield
    except CoschedError as error:
        said = str(error)
        assert said.strip(), f"input {case}: an error that says nothing, for {_short(came)}"
        assert len(said) <= LONGEST_MESSAGE, f"input {case}: {len(said)} characters: {said[:300]}"
    except Exception as error:
        raise AssertionError(
            f"input {case}: {type(error).__name__}: {str(error)[:300]}, for {_short(came)}"
        ) from error


def _short(came: object) -> str:
    return repr(came)[:1500]


@contextmanager
def little_memory() -> Generator[None]:
    """What is asked for beyond ``ROOM`` is refused by the system, and shows as an error that is not ours."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def nothing_written(*folders: Path) -> Generator[None]:
    """The folders are as they were."""
    before = {folder: _listing(folder) for folder in folders}
    yield
    for folder, was in before.items():
        assert _listing(folder) == was, f"{folder} is not as it was"


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = ((str(path), path.lstat()) for path in folder.rglob("*"))
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found}


# --- trees ------------------------------------------------------------------------------------


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree, with each key or index in it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        for step, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            found += [(tree, step), *places_in(value)]
    return found


def damaged_tree(rng: random.Random, tree: Any) -> Any:
    """A copy with one to three things changed in it."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = places_in(tree)
        if not places:
            return rng.choice(NASTY)
        container, step = rng.choice(places)
        _damage(rng, container, step, places)
    return tree


def _damage(rng: random.Random, container: Any, step: Any, places: list[tuple[Any, Any]]) -> None:
    value, other = container[step], rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            container[step] = copy.deepcopy(rng.choice(NASTY))
        case 3:
            del container[step]
        case 4:
            container[step] = copy.deepcopy(other[0][other[1]])
        case 5 if isinstance(container, dict):
            container[rng.choice(("unknown", "", 0, None, str(step).upper(), f"{step} "))] = value
        case 6:
            container[step] = rng.choice(([value], {"kind": value}, [value, value], str(value)))
        case _:
            container[step] = near(rng, value)


def near(rng: random.Random, value: Any) -> Any:
    """Something like it."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return rng.choice((-value, value + 1, value * 10**9, value / 3, float(value), str(value)))
    if isinstance(value, str):
        return damaged_text(rng, value)
    return rng.choice(NASTY)


def random_tree(rng: random.Random, keys: list[str], values: list[Any], depth: int = 3) -> Any:
    """A tree of these keys and values, at places where they may mean nothing."""
    if depth == 0 or rng.random() < 0.3:
        return copy.deepcopy(rng.choice(values if rng.random() < 0.5 else NASTY))
    if rng.random() < 0.2:
        return [random_tree(rng, keys, values, depth - 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(keys): random_tree(rng, keys, values, depth - 1) for _ in range(rng.randrange(6))
    }


# --- text and bytes -----------------------------------------------------------------------------

PIECES = ("{", "}", "[", "]", ":", ",", "\n", "\t", "&a ", "*a", "!!python/object:os.system", "|", ">", "#",
          "'", '"', "---", "${", "}", "0x", "1e", "\x00", "é", "- ", "? ", "%", "<<: ", "=", "\r")  # fmt: skip


def damaged_text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    match rng.randrange(5):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + rng.choice(PIECES) + text[at:]
        case 2:
            return text[:at] + text[at + rng.randrange(1, 20) :]
        case 3:
            end = min(len(text), at + rng.randrange(40))
            return text[:end] + text[at:end] * rng.randrange(1, 4) + text[end:]
        case _:
            return text[:at] + chr(rng.randrange(1, 0x3000)) + text[at + 1 :]


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 20) :]
        case 3 if data:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                changed[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(changed)
        case _:
            return rng.randbytes(rng.randrange(64))


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """Of a JSON text: as a tree, as bytes, or nested deeper than anybody reads."""
    kind = rng.random()
    if kind < 0.6:
        return as_json(damaged_tree(rng, json.loads(data)))
    if kind < 0.63:
        depth = rng.choice((200, 5000, 100_000))
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"x":[', b"]}")))
        return opening * depth + b"1" + closing * rng.choice((0, depth))
    return damaged_bytes(rng, data)


def as_json(tree: Any) -> bytes:
    """With NaN, and with half a character, which JSON has not."""
    return json.dumps(tree, skipkeys=True).encode()


# --- safetensors files ---------------------------------------------------------------------------


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Its header's length, its header as JSON, its data, or any bytes of it."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(8):
        case 0:
            lengths = (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data))
            return rng.choice(lengths).to_bytes(8, "little") + data[8:]
        case 1 | 2 | 3 | 4:
            changed = _damaged_header(rng, json.loads(header))
            return len(changed).to_bytes(8, "little") + changed + rest
        case 5:
            changed = damaged_json(rng, header)
            return len(changed).to_bytes(8, "little") + changed + rest
        case 6:
            return data[: 8 + length] + damaged_bytes(rng, rest)
        case _:
            return damaged_bytes(rng, data)


def _damaged_header(rng: random.Random, header: dict[str, Any]) -> bytes:
    """One tensor is of another type, shape or place, or has another name."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return as_json(damaged_tree(rng, header))
    name, other = rng.choice(names), rng.choice(names)
    match rng.randrange(7):
        case 0:
            header[name]["dtype"] = rng.choice(
                ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8", "", 3)
            )
        case 1:
            shape = header[name]["shape"]
            header[name]["shape"] = rng.choice(
                (
                    [*shape, 1],
                    shape[::-1],
                    shape[:-1],
                    [10**12],
                    [0],
                    [-1],
                    [2**62, 4],
                    [1] * 100,
                    None,
                )
            )
        case 2:
            begin, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = rng.choice(
                (
                    [begin, end + 4],
                    [begin + 4, end],
                    [end, begin],
                    [0, 2**62],
                    [-4, 0],
                    [begin],
                    "0",
                )
            )
        case 3:
            header[rng.choice(("other.weight", "", "a" * 5000, "../x", other))] = header.pop(name)
        case 4:
            del header[name]
        case 5:
            header[name], header[other] = header[other], header[name]
        case _:
            return as_json(damaged_tree(rng, header))
    return as_json(header)


def damaged_file(rng: random.Random, path: Path) -> Callable[[], None]:
    """Damage a file where it stands; returns what puts it back."""
    data = path.read_bytes()
    how = {".json": damaged_json, ".safetensors": damaged_safetensors}.get(
        path.suffix, damaged_bytes
    )
    if rng.random() < 0.03:
        path.unlink()
    else:
        path.write_bytes(how(rng, data))

    def put_back() -> None:
        path.write_bytes(data)

    return put_back
