"""``cosched convert``: a draft checkpoint in another public format, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.errors import CheckpointError, ConfigError
from cosched.registry import DRAFTERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# What a folder has besides weights and config.json, and every format keeps as it is.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "generation_config.json", "README*", "LICENSE*", "NOTICE*",
)  # fmt: skip


def family_of(directory: Path) -> str:
    """The drafter that knows a checkpoint by its ``config.json``.

    Raises:
        CheckpointError: no file, or no drafter knows it (the message lists those that were asked).
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
        json.dumps(raw, ensure_ascii=False).encode()  # half a character is none
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    asked = [plugin for plugin in DRAFTERS.plugins() if plugin.cls.formats is not None]
    for plugin in asked:
        if isinstance(raw, dict) and plugin.cls.formats.recognises(raw):
            return plugin.name
    raise CheckpointError(
        f"{path} is of no family that is installed (asked: "
        f"{', '.join(plugin.name for plugin in asked)}); if it is one, say --kind"
    )


def convert(
    source: Path, destination: Path, form: str, kind: str | None, overrides: Sequence[str]
) -> tuple[str, list[str]]:
    """Write ``source`` as ``destination``; returns the family, and why SGLang cannot run the result.

    The destination appears whole or not at all. ``overrides`` are settings of the drafter
    (``drafter.norm_output=fed_back``) where a checkpoint needs one to be understood.

    Raises:
        CheckpointError: the checkpoint is damaged, or the format cannot express it.
        ConfigError: the destination exists, or an override is none of the drafter's.
    """
    if destination.exists():
        raise ConfigError(f"{destination} exists; convert into a new folder")
    kind = kind or family_of(source)
    cls = DRAFTERS.get(kind)
    if cls.formats is None:
        raise ConfigError(f"--kind: the drafter {kind!r} has no checkpoint formats")
    settings = _settings(cls, kind, source, overrides)
    checkpoint = cls.checkpoint(settings)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        cls.formats.write(checkpoint, partial, form)
        for pattern in COMPANIONS:
            for path in source.glob(pattern):
                shutil.copy2(path, partial / path.name)
        partial.rename(destination)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    config, _, _ = cls.formats.read_shape(destination, settings)  # as it says it now
    return kind, cls.formats.not_for_sglang(config, frozenset(checkpoint.tensors))


def _settings(cls: Any, kind: str, source: Path, overrides: Sequence[str]) -> Any:
    keys: dict[str, Any] = {"kind": kind, "path": str(source)}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name.startswith("drafter."):
            raise ConfigError(f"{override!r} is no setting; write drafter.KEY=VALUE")
        keys[name.removeprefix("drafter.")] = value
    try:
        return msgspec.convert(keys, cls.Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"drafter: {error}") from error
