"""Compact drafts: what has to be exact is exact, the rest is as close as eight bits allow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.errors import CheckpointError, RealWorldError
from cosched.realworld.folders import is_whole, sealed_folder
from cosched.realworld.storage import dequantise, expand, pack, quantise

VOCAB, WIDTH, DRAFT_VOCAB = 64, 24, 20


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Embedding and head of a target."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "target"
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, WIDTH, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(VOCAB, WIDTH, generator=generator).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def draft_tensors(target: Path) -> dict[str, Tensor]:
    """Everything that a draft may have: trained matrices, vectors, maps, what is the target's."""
    generator = torch.Generator().manual_seed(1)
    lent = load_file(target / "model.safetensors")
    ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    trained = torch.randn(32, WIDTH, generator=generator) * torch.logspace(-6, 3, 32)[:, None]
    trained[3] = 0
    trained[5, 1:] = 0  # one weight alone is its row's greatest
    return {
        "layers.0.weight": trained.bfloat16(),
        "norm.weight": torch.randn(WIDTH, generator=generator).bfloat16(),
        "d2t": ids - torch.arange(DRAFT_VOCAB),
        "t2d": torch.isin(torch.arange(VOCAB), ids),
        "embed_tokens.weight": lent["model.embed_tokens.weight"],
        "lm_head.weight": lent["lm_head.weight"][ids],
    }


@pytest.fixture
def draft(tmp_path: Path, target: Path) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    save_file(draft_tensors(target), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("A card.\n")
    return folder


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for n, t in tensors.items()
    }


def test_expanding_gives_back_what_was_packed(tmp_path: Path, target: Path, draft: Path) -> None:
    """Vectors, maps and borrowed tensors bit by bit; of a row, no weight is off by more than half
    a scale, and by what bfloat16 rounds (half a unit in the eighth place) besides."""
    pack(draft, tmp_path / "compact", target)
    expand(tmp_path / "compact", tmp_path / "whole", target)
    before, after = draft_tensors(target), load_file(tmp_path / "whole" / "model.safetensors")
    trained, restored = (t.pop("layers.0.weight").float() for t in (before, after))
    assert bits(before) == bits(after)
    scales = trained.abs().amax(1, keepdim=True) / 127
    off = (trained - restored).abs()
    assert (off <= scales / 2 * (1 + 1e-5) + restored.abs() * 2**-8).all()
    assert off.max() > 0
    assert (tmp_path / "whole" / "config.json").read_text() == '{"model_type": "llama"}'
    assert (tmp_path / "whole" / "README.md").read_text() == "A card.\n"


def test_nothing_of_the_target_is_stored_and_a_weight_takes_a_byte(
    tmp_path: Path, target: Path, draft: Path
) -> None:
    manifest = pack(draft, tmp_path / "compact", target)
    kept = {name: entry.kept for name, entry in manifest.tensors.items()}
    assert kept == {
        "d2t": "exact",
        "t2d": "exact",
        "norm.weight": "exact",
        "layers.0.weight": "int8",
        "embed_tokens.weight": "target",
        "lm_head.weight": "target_rows",
    }
    parts = load_file(tmp_path / "compact" / "compact.safetensors")
    assert parts.keys() == {"d2t", "t2d", "norm.weight", "layers.0.weight", "layers.0.weight.scale"}
    assert parts["layers.0.weight"].dtype == torch.int8


def test_packing_what_was_expanded_changes_no_bit(
    tmp_path: Path, target: Path, draft: Path
) -> None:
    """A draft that is packed again (its card mended, say) must stay the one that was measured."""
    pack(draft, tmp_path / "c1", target)
    expand(tmp_path / "c1", tmp_path / "d1", target)
    pack(tmp_path / "d1", tmp_path / "c2", target)
    expand(tmp_path / "c2", tmp_path / "d2", target)
    for name in ("c{}/compact.safetensors", "c{}/compact.json", "d{}/model.safetensors"):
        one, two = ((tmp_path / name.format(n)).read_bytes() for n in (1, 2))
        assert one == two, name


@pytest.mark.parametrize("seed", range(4))
def test_quantising_is_stable_for_every_magnitude(seed: int) -> None:
    """The bfloat16 rounding of an expanded weight stays below half a step, whatever the scale."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 2.0 ** torch.randint(-60, 60, (4096, 1), generator=generator)
    weights = (torch.randn(4096, 256, generator=generator) * magnitudes).bfloat16()
    values, scales = quantise(weights)
    again, scales_again = quantise(dequantise(values, scales))
    assert torch.equal(values, again)
    assert torch.equal(scales, scales_again)


def test_another_target_is_refused_unless_it_is_asked_for(
    tmp_path: Path, target: Path, draft: Path
) -> None:
    """A draft that borrows from the wrong target would be another draft, and look like this one."""
    pack(draft, tmp_path / "compact", target)
    other = tmp_path / "other"
    other.mkdir()
    lent = {n: t + 1 for n, t in load_file(target / "model.safetensors").items()}
    save_file(lent, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the one it was made for"):
        expand(tmp_path / "compact", tmp_path / "whole", other)
    assert not (tmp_path / "whole").exists()
    expand(tmp_path / "compact", tmp_path / "whole", other, same_target=False)
    found = load_file(tmp_path / "whole" / "model.safetensors")
    assert torch.equal(found["embed_tokens.weight"], lent["model.embed_tokens.weight"])
    save_file({n: t[:8] for n, t in lent.items()}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"which is \[8, 24\]|borrows rows"):
        expand(tmp_path / "compact", tmp_path / "again", other, same_target=False)


@pytest.mark.parametrize("damaged", ["values", "scales", "exact", "manifest", "absent"])
def test_a_damaged_compact_folder_is_refused(
    tmp_path: Path, target: Path, draft: Path, damaged: str
) -> None:
    pack(draft, tmp_path / "compact", target)
    path = tmp_path / "compact" / "compact.safetensors"
    parts = load_file(path)
    name = {
        "values": "layers.0.weight", "scales": "layers.0.weight.scale", "exact": "norm.weight",
        "manifest": "norm.weight", "absent": "norm.weight",
    }[damaged]  # fmt: skip
    if damaged == "absent":
        del parts[name]
    elif damaged == "manifest":
        manifest = tmp_path / "compact" / "compact.json"
        raw = json.loads(manifest.read_text())
        raw["tensors"][name]["kept"] = "pickled"
        manifest.write_text(json.dumps(raw))
    else:
        parts[name] = parts[name].clone()
        parts[name].view(torch.uint8).view(-1)[7] ^= 1
    save_file(parts, path)
    with pytest.raises(CheckpointError, match=r"not what was packed|has no|cannot be read"):
        expand(tmp_path / "compact", tmp_path / "whole", target)
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("how", ["float32", "nan"])
def test_what_eight_bits_cannot_hold_is_refused(
    tmp_path: Path, target: Path, draft: Path, how: str
) -> None:
    tensors = draft_tensors(target)
    weight = tensors["layers.0.weight"]
    weight[0, 0] = float("nan")
    tensors["layers.0.weight"] = weight if how == "nan" else torch.ones(4, WIDTH)
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight is (float32|not finite)"):
        pack(draft, tmp_path / "compact", target)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """An interruption leaves what was there before, and the next attempt cleans up."""
    path = tmp_path / "models" / "one"

    def interrupted() -> None:
        with sealed_folder(path) as folder:
            (folder / "half").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "models").iterdir()) == []
    with sealed_folder(path) as folder:
        (folder / "file").write_text("one")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "file").read_text() == "one"
    (tmp_path / "models" / ".one.partial").mkdir()  # of a process that was killed
    with sealed_folder(path) as folder:
        (folder / "file").write_text("two")
    assert (path / "file").read_text() == "two"
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["one"]


def test_a_changed_folder_is_told_by_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "one"
    assert not is_whole(path)
    with sealed_folder(path) as folder:
        (folder / "weights").write_bytes(b"\0" * 100)
        (folder / "config.json").write_text("{}")
    assert is_whole(path)
    (path / "weights").write_bytes(b"\0" * 99 + b"\1")
    with pytest.raises(RealWorldError, match=r"changed or damaged: weights .*--overwrite"):
        is_whole(path)
    (path / "weights").unlink()
    with pytest.raises(RealWorldError, match=r"weights is missing"):
        is_whole(path)
    (path / "SHA256SUMS").unlink()
    with pytest.raises(RealWorldError, match=r"not from here \(no SHA256SUMS"):
        is_whole(path)
