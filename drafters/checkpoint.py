"""Reading and writing draft checkpoints: all tensors accounted for, or a table of what is wrong."""

from __future__ import annotations

import json
import stat
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError
from drafters.config import DecoderConfig
from drafters.raw_keys import check_raw

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping
    from pathlib import Path

LONGEST_NAME = 200  # characters of a foreign tensor's that are shown
MOST_LINES = 40  # of a table of wrong tensors
VERIFIERS_OWN = ("verifier_lm_head.weight", "verifier_norm.weight")  # the target's, saved by some

C = TypeVar("C", bound=DecoderConfig)


@dataclass(frozen=True, slots=True)
class Checkpoint(Generic[C]):
    """A draft on disk in our own terms: its shape, its tensors, and the file it came from.

    ``config`` and ``tensors`` use one convention whatever the format (layers mean "after that
    layer"); ``raw`` is the ``config.json`` as it was, so that writing the same format back keeps
    what we do not read.
    """

    config: C
    tensors: dict[str, Tensor]
    format: str
    raw: dict[str, Any] = field(default_factory=dict)


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no file, or not a JSON object; or a key is not what any format has.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint folder at {directory}")
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json")
    try:
        raw = json.loads(path.read_text())
        json.dumps(raw, ensure_ascii=False).encode()  # half a character can be escaped, and is none
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    check_raw(raw, path)
    return raw


def read_tensors(directory: Path, extra: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a folder: ``*.safetensors``, or ``pytorch_model*.bin`` without unpickling code.

    ``extra`` names ``torch.save`` files that belong to the format besides; they may be absent.

    Raises:
        CheckpointError: no weights, a damaged file, or a file that holds more than tensors.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{directory} has neither *.safetensors nor pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for path in [*files, *(directory / name for name in extra if (directory / name).exists())]:
        found = _read_file(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{path} has {twice[0]}, which another file of the folder has too"
            )
        tensors |= found
    return tensors


def tensor_names(directory: Path) -> frozenset[str] | None:
    """Names of all tensors of a folder, without their values; None where it has no weights.

    Raises:
        CheckpointError: a file is damaged.
    """
    names: set[str] = set()
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                names.update(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not files:
        files = sorted(directory.glob("pytorch_model*.bin"))
        for path in files:
            names.update(read_saved(path, mmap=is_zipfile(path)))  # older files are none
    return frozenset(names) if files else None


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        saved = read_saved(path)
        if not all(isinstance(tensor, Tensor) for tensor in saved.values()):
            raise CheckpointError(f"{path} is no table of named tensors")
        return saved
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_saved(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What ``torch.save`` wrote, without running code that may be in it; with ``mmap`` left on disk.

    Raises:
        CheckpointError: it is damaged, holds code, or is no dictionary.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(
            f"{path} is not read: it is damaged, or holds code besides tensors ({error})"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is no table of named tensors")
    return loaded


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], directory: Path
) -> None:
    """Refuse missing, unknown and misshapen tensors, and weights without fractions: one line for each.

    Raises:
        CheckpointError: any name or shape differs, or a weight is of integers.
    """
    problems = [
        f"  {name}: expected {list(one.shape)}, "
        + (f"found {list(found[name].shape)}" if name in found else "missing")
        for name, one in expected.items()
        if name not in found or found[name].shape != one.shape
    ]
    problems += [
        f"  {name}: expected a floating-point type, found {tensor.dtype}"
        for name, tensor in found.items()
        if name in expected
        and expected[name].is_floating_point()
        and not tensor.is_floating_point()
    ]
    problems += [
        f"  {name[:LONGEST_NAME]}: not a tensor of this drafter, found {list(tensor.shape)}"
        for name, tensor in found.items()
        if name not in expected
    ]
    if problems:
        more = [f"  and {len(problems) - MOST_LINES} more"] if len(problems) > MOST_LINES else []
        shown = "\n".join([*sorted(problems)[:MOST_LINES], *more])
        raise CheckpointError(f"the tensors of {directory} do not fit:\n{shown}")


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write ``model.safetensors``, files of ``torch.save`` by name, and last ``config.json``.

    Each file appears whole or not at all, and without the last one the folder is no checkpoint.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    dtype = next((t.dtype for t in contiguous.values() if t.is_floating_point()), torch.float32)
    said = str(dtype).removeprefix("torch.")
    keys = {k: said if k in {"dtype", "torch_dtype"} else value for k, value in config.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
        with _whole(directory / "model.safetensors") as partial:
            save_file(contiguous, partial, metadata={"format": "pt"})
        for name, content in (saved or {}).items():
            with _whole(directory / name) as partial:
                torch.save(dict(content), partial)
        with _whole(directory / "config.json") as partial:
            partial.write_text(json.dumps(keys, indent=2) + "\n")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


@contextmanager
def _whole(path: Path) -> Generator[Path]:
    """A name to write under; the file takes its own when that is done, and the mode of any new file.

    Libraries differ: safetensors makes files that only their owner can read.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = stat.S_IMODE(partial.stat().st_mode)
    yield partial
    partial.chmod(mode)
    partial.replace(path)


def first_form(forms: Iterable[str], unfit: Callable[[str], list[str]]) -> str:
    """The first format that can express a draft.

    Raises:
        CheckpointError: none can.
    """
    reasons = {form: unfit(form) for form in forms}
    fitting = [form for form, problems in reasons.items() if not problems]
    if not fitting:
        raise CheckpointError(
            "no format can express this draft:\n"
            + "\n".join(f"  {form}: {'; '.join(why)}" for form, why in reasons.items())
        )
    return fitting[0]


def rename(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with the beginnings of their names exchanged, one after the other in that order.

    Raises:
        CheckpointError: two tensors come to have one name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = name
        for old, new in prefixes.items():
            if ours.startswith(old):
                ours = new + ours.removeprefix(old)
        if ours in renamed:
            raise CheckpointError(f"two tensors of the checkpoint are both {ours}")
        renamed[ours] = tensor
    return renamed


def tokenizer_vocabulary(directory: Path) -> dict[str, int] | None:
    """Token ids of the folder's own ``tokenizer.json``; None where it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def completed(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A ``transformer_layer_config`` with what transformers takes for the keys that it leaves out.

    Raises:
        CheckpointError: transformers knows no such type, or not these keys.
    """
    from transformers import AutoConfig

    keys = {"model_type": "qwen3", **layer}  # the type that speculators takes
    try:
        return AutoConfig.for_model(**keys).to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"transformer_layer_config: {error}") from error


def speculators_block(algorithm: str, num_draft_tokens: int) -> dict[str, Any]:
    """``speculators_config`` of a draft that does not say whose it is: the loader is told."""
    return {
        "algorithm": algorithm,
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": None, "architectures": []},
    }
