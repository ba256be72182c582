"""Drafts as people publish them: what other exporters leave out, count otherwise, or add."""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosched.convert_checkpoint import convert
from cosched.engines.embedded.target import Target
from cosched.memory.sketch import TargetSketch
from cosched.registry import DRAFTERS
from cosched.testing.harness import make_target
from drafters.eagle3 import Eagle3Config
from tests.helpers.checkpoints import change, example, load, read, refused, same, save, with_tokens
from tests.helpers.cli import run_cli
from tests.helpers.paths import QUICKSTART, TINYWORLD

WIDE = make_target(vocab_size=80)


def rewrite(directory: Path, **tensors: Any) -> dict[str, Tensor]:
    """Exchange tensors of a file (``...`` takes one out); returns those that it had."""
    path = directory / "model.safetensors"
    had = load_file(path)
    new = {**had, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({n: t.contiguous() for n, t in new.items() if t is not ...}, path)
    return had


# --- maps of reduced heads -------------------------------------------------------------------


def test_t2d_follows_from_d2t(tmp_path: Path, target: Target) -> None:
    """Model-Optimizer exports ``d2t`` alone."""
    save(target, "eagle3", "reduced vocabulary", tmp_path)
    had = rewrite(tmp_path, t2d=...)
    assert same(read("eagle3", tmp_path).tensors, had)
    assert load("eagle3", tmp_path, target).not_for_sglang() == []


@pytest.mark.parametrize("form", ["sglang", "speculators"])
def test_a_whole_vocabulary_needs_no_map(tmp_path: Path, target: Target, form: str) -> None:
    """Without both maps a head over all tokens drafts the target's own ids; a reduced one cannot."""
    drafter = example(target, "eagle3", "plain")
    drafter.network().d2t.zero_()
    drafter.network().t2d.fill_(True)
    drafter._origin = None
    drafter.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", form, None, ())
    if form == "sglang":
        rewrite(tmp_path / "b", d2t=..., t2d=...)
    loaded = load("eagle3", tmp_path / "b", target)
    assert loaded.target_ids() is None
    assert same(dict(loaded.network().state_dict()), load_state(drafter, loaded))
    save(target, "eagle3", "reduced vocabulary", tmp_path / "c")
    rewrite(tmp_path / "c", d2t=..., t2d=...)
    refused(lambda: load("eagle3", tmp_path / "c", target), "d2t: expected [48], missing")


def load_state(drafter: Any, like: Any) -> dict[str, Tensor]:
    """The drafter's tensors in the types of another."""
    ours = dict(drafter.network().state_dict())
    return {n: ours[n].to(t.dtype) for n, t in like.network().state_dict().items()}


def test_a_head_that_is_not_there_is_the_targets(
    tmp_path: Path, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """``draft_vocab_size`` of the whole vocabulary and no head: the target's, and we say so.

    SGLang would draft with an empty head (sglang#27829), until it is written anew.
    """
    save(target, "eagle3", "plain", tmp_path / "a")
    rewrite(tmp_path / "a", lm_head__weight=..., d2t=..., t2d=...)
    with caplog.at_level(logging.WARNING, "cosched"):
        drafter = load("eagle3", tmp_path / "a", target)
    assert drafter.network().lm_head is None
    assert "borrows the target's" in caplog.text
    assert "draft_vocab_size is null" in drafter.not_for_sglang()[0]
    _, problems = convert(tmp_path / "a", tmp_path / "b", "sglang", None, ())
    assert problems == []
    assert load("eagle3", tmp_path / "b", target).not_for_sglang() == []
    change(tmp_path / "a", draft_vocab_size=48)  # of a reduced one nobody knows which tokens
    refused(lambda: load("eagle3", tmp_path / "a", target), "lm_head.weight: expected [48, 32]")


# --- keys that change the arithmetic ---------------------------------------------------------

EAGLE3, DFLASH, PARD = ("eagle3", "plain"), ("dflash", "plain"), ("pard", "qwen3")
REFUSED: list[tuple[tuple[str, str], dict[str, Any], tuple[str, ...]]] = [
    (EAGLE3, {"is_neox_style": False}, ("is_neox_style = False", "implemented: True")),
    (EAGLE3, {"rope_is_neox_style": False}, ("rope_is_neox_style = False",)),
    (EAGLE3, {"tie_word_embeddings": True}, ("tie_word_embeddings = True", "implemented: False")),
    (EAGLE3, {"eagle_config": {"use_mtp_layernorm": True}}, ("eagle_config.use_mtp_layernorm = True",)),
    (EAGLE3, {"eagle_config": {"parallel_draft_step": 4}}, ("parallel_draft_step = 4", "1")),
    (EAGLE3, {"quantization_config": {"bits": 4}}, ("quantization_config = {'bits': 4}",)),
    (EAGLE3, {"rope_scaling": {"type": "default", "stretch": 2}}, ("stretch = 2", "rope")),
    (EAGLE3, {"qk_norm": True}, ("qk_norm = True", "can be taken out")),
    (DFLASH, {"is_neox_style": False}, ("is_neox_style = False",)),
    (DFLASH, {"dflash_config": {"mask_token_id": 1, "markov_rank": 8}}, ("dflash_config.markov_rank = 8",)),
    (DFLASH, {"gating": True}, ("gating = True", "False")),
    (DFLASH, {"output_multiplier": True}, ("output_multiplier = True", "1")),
    (PARD, {"is_neox_style": False}, ("is_neox_style = False",)),
    (PARD, {"logit_scale": 0.5}, ("logit_scale = 0.5",)),
]  # fmt: skip


@pytest.mark.parametrize(("draft", "keys", "words"), REFUSED)
def test_what_a_key_asks_for_is_done_or_refused(
    tmp_path: Path,
    target: Target,
    draft: tuple[str, str],
    keys: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    """A key that nobody here goes by is refused, with its value and what it may be."""
    save(target, *draft, tmp_path)
    change(tmp_path, **keys)
    refused(lambda: load(draft[0], tmp_path, target), "config.json", *words)


@pytest.mark.parametrize("draft", [EAGLE3, DFLASH, PARD])
def test_harmless_keys(tmp_path: Path, target: Target, draft: tuple[str, str]) -> None:
    """What trainers and transformers write about themselves, and options that are off."""
    save(target, *draft, tmp_path)
    change(
        tmp_path,
        _name_or_path="somewhere",
        initializer_range=0.02,
        max_window_layers=28,
        torch_dtype="bfloat16",
        attention_dropout=0.0,
        is_neox_style=True,
        final_logit_softcapping=None,
        whatever=None,
    )
    load(draft[0], tmp_path, target)


def test_layers_of_speculators_are_looked_through(tmp_path: Path, target: Target) -> None:
    """The allow-list holds under ``transformer_layer_config``, too."""
    for kind in ("eagle3", "dflash"):
        save(target, kind, "plain", tmp_path / kind, "speculators")
        raw = read(kind, tmp_path / kind).raw
        layer = {**raw["transformer_layer_config"], "attn_logit_softcapping": 30.0}
        change(tmp_path / kind, transformer_layer_config=layer)
        refused(
            lambda k=kind: load(k, tmp_path / k, target),
            "transformer_layer_config.attn_logit_softcapping = 30.0",
        )


def test_a_rotation_in_sections_is_plain_for_text(tmp_path: Path, target: Target) -> None:
    """``mrope`` of Qwen's models that see: text is at one position in all sections."""
    save(target, "eagle3", "plain", tmp_path)
    plain, _ = read("eagle3", tmp_path).config.inverse_frequencies()
    for rope in (
        {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
        {"type": "mrope", "mrope_section": [2, 3, 3]},
    ):
        change(tmp_path, rope_scaling=rope)
        sections, factor = read("eagle3", tmp_path).config.inverse_frequencies()
        assert torch.equal(plain, sections)
        assert factor == 1.0
        load("eagle3", tmp_path, target).save(tmp_path / "again")
        kept = read("eagle3", tmp_path / "again").raw["rope_scaling"]
        assert kept["mrope_section"] == [2, 3, 3]  # of what SGLang makes positions of images
        assert kept["rope_type"] == "default"


def test_the_fusion_may_have_a_bias(tmp_path: Path, target: Target) -> None:
    """``fc.bias`` is added, and SGLang told of it where the file did not."""
    save(target, "eagle3", "plain", tmp_path / "a")
    rewrite(tmp_path / "a", fc__bias=torch.arange(32.0).bfloat16())
    drafter = load("eagle3", tmp_path / "a", target)
    network, features = drafter.network(), torch.randn(2, 96)
    assert torch.allclose(
        network.fuse(features) - features @ network.fc.weight.T, torch.arange(32.0)
    )
    assert "bias: true" in drafter.not_for_sglang()[0]
    _, problems = convert(tmp_path / "a", tmp_path / "b", "sglang", None, ())
    assert problems == []
    assert read("eagle3", tmp_path / "b").raw["bias"] is True


# --- layer ids -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "num_layers", "ids", "after"),
    [
        ("qwen3", 36, [1, 17, 32], (1, 17, 32)),
        ("gpt_oss", 36, [24, 30, 36], (23, 29, 35)),
        ("gpt_oss", 36, [1, 17, 32], (1, 17, 32)),
        ("deepseek_v3", 61, [1, 29, 57], (1, 29, 57)),
        ("deepseek_v3", 61, [2, 30, 58], (1, 29, 57)),
        ("kimi_k2", 61, [2, 30, 61], (1, 29, 60)),
        ("llama", 32, None, (1, 15, 28)),
        ("minimax_m3_vl", 60, None, (2, 30, 57)),
    ],
)
def test_ids_are_read_as_sglang_reads_them(
    model_type: str, num_layers: int, ids: list[int] | None, after: tuple[int, ...]
) -> None:
    """By the target's family, its depth, the first id and the largest (sglang#32334, #25454)."""
    config = Eagle3Config(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=8,
        feature_layers=ids, ids_by_target=True,
    )  # fmt: skip
    assert config.layers_of(num_layers, model_type) == after


def test_boundaries_that_sglang_would_not_capture(tmp_path: Path, target: Target) -> None:
    """The number of layers among the ids is a boundary, which SGLang takes of gpt-oss alone."""
    save(target, "eagle3", "plain", tmp_path)
    change(tmp_path, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 3]})
    refused(lambda: load("eagle3", tmp_path, target), "[1, 2, 3]", "boundaries", "gpt_oss", "qwen3")
    other = copy(target)
    other.model_type = "gpt_oss"
    assert load("eagle3", tmp_path, other).signal.feature_layers == (0, 1, 2)


# --- a base model's draft on a fine-tuned target ---------------------------------------------


@pytest.mark.parametrize(("kind", "form"), [("eagle3", "sglang"), ("dflash", "zlab")])
def test_a_fine_tuned_target(
    tmp_path: Path, target: Target, caplog: pytest.LogCaptureFixture, kind: str, form: str
) -> None:
    """A copy of the base model's embedding is some percent off the target's: a note, and the target's."""
    save(target, kind, "plain", tmp_path, form)
    table = target.embedding.weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(table.shape, generator=generator) * table.std() * 0.05
    rewrite(tmp_path, embed_tokens__weight=(table + noise).half())
    with caplog.at_level(logging.WARNING, "cosched"):
        drafter = load(kind, tmp_path, target)
    assert getattr(drafter.network(), "embed_tokens", None) is None
    assert "the target's by 5.10% of its length" in caplog.text
    assert "fine-tuned" in caplog.text


# --- padded vocabularies ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "draft", [("eagle3", "plain"), ("eagle3", "reduced vocabulary"), DFLASH, PARD]
)
def test_tables_that_are_padded_otherwise(
    tmp_path: Path, target: Target, draft: tuple[str, str]
) -> None:
    """A table of 64 for a target of 80 rows is fine where the tokenizer has 64 tokens, and no more."""
    kind, name = draft
    save(target, kind, name, tmp_path)
    padded = with_tokens(WIDE, 64)
    drafter = load(kind, tmp_path, padded)
    state = drafter.new_state(1, 16, None)
    from cosched.records import Segment

    tokens = torch.tensor([3, 79, 5])  # one of the padding: nobody means it, and nothing breaks
    features = torch.randn(2, 32 * len(drafter.signal.feature_layers))
    drafter.observe(state, 0, Segment("a", 0, tokens, features, None))
    proposal = drafter.propose(state, 1, lambda _k, logits: logits.argmax(-1), 3)
    assert proposal.logits_BKV is not None
    assert proposal.logits_BKV.shape == (1, 3, 80)
    refused(lambda: load(kind, tmp_path, with_tokens(WIDE, 70)), "64", "80", "ids up to 69")
    refused(lambda: load(kind, tmp_path, WIDE), "64", "80", "no tokenizer")
    save(WIDE, kind, name, tmp_path / "wide")
    narrow = with_tokens(target, 64)
    if draft == EAGLE3:
        refused(lambda: load(kind, tmp_path / "wide", narrow), "80 tokens", "lacks")
    elif name != "reduced vocabulary":  # a random one, which does draft from the padding
        load(kind, tmp_path / "wide", narrow)


# --- heads of several layers -----------------------------------------------------------------


def test_a_second_layer_that_adds_nothing(tmp_path: Path, target: Target) -> None:
    """With its two output matrices zero, a head of two layers drafts as that of its first one."""
    two = DRAFTERS.get("eagle3").examples(target, 3)["two layers"]
    with torch.no_grad():
        two.network().layers["1"].self_attn.o_proj.weight.zero_()
        two.network().layers["1"].mlp.down_proj.weight.zero_()
    two.save(tmp_path)
    change(tmp_path, num_hidden_layers=1)
    names = [
        name for name in load_file(tmp_path / "model.safetensors") if name.startswith("layers.1")
    ]
    rewrite(tmp_path, **dict.fromkeys(names, ...))
    one = load("eagle3", tmp_path, target)
    from cosched.testing.specimen import Feeder, as_batch, make_texts

    texts = make_texts(target, one, count=2, length=40)
    assert torch.allclose(Feeder(one, texts).run(6), Feeder(two, texts).run(6), atol=1e-5)
    anchors = torch.arange(1, 31).expand(2, -1)
    batch = as_batch(texts, anchors, 3, None)
    assert torch.allclose(one.replay(batch), two.replay(batch), atol=1e-5)


def test_the_norm_of_a_further_layer_has_two_names(tmp_path: Path, target: Target) -> None:
    """SGLang reads ``hidden_norm``, vLLM ``input_layernorm``: one is enough, two must not differ."""
    save(target, "eagle3", "two layers", tmp_path / "a")
    ours, theirs = "layers.1.hidden_norm.weight", "layers.1.input_layernorm.weight"
    norm = rewrite(tmp_path / "a", **{theirs: torch.ones(32).bfloat16()})[ours]
    good = load("eagle3", tmp_path / "a", target)
    assert good.not_for_sglang() == []
    rewrite(tmp_path / "a", **{theirs: norm * 2})
    refused(lambda: load("eagle3", tmp_path / "a", target), ours, theirs)
    rewrite(tmp_path / "a", **{theirs: norm, ours: ...})
    loaded = load("eagle3", tmp_path / "a", target)
    assert same(dict(good.network().state_dict()), dict(loaded.network().state_dict()))
    assert ours in loaded.not_for_sglang()[0]
    _, problems = convert(tmp_path / "a", tmp_path / "b", "sglang", None, ())
    assert problems == []
    refused(lambda: convert(tmp_path / "a", tmp_path / "c", "specforge", None, ()), "have 1")


# --- at the command --------------------------------------------------------------------------


def test_check_names_it(tmp_path: Path) -> None:
    """``cosched check`` reads no weights, and refuses by name what a run would have stumbled over."""
    for kind in ("eagle3", "pard"):
        (tmp_path / kind).mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / kind / name).write_bytes((TINYWORLD / kind / name).read_bytes())

    def check(kind: str) -> tuple[int, str, str]:
        return run_cli(
            "check", "-c", QUICKSTART, f"drafter.kind={kind}", f"drafter.path={tmp_path / kind}",
            f"target.path={TINYWORLD / 'target'}", f"workload.documents={TINYWORLD}/documents/translated.jsonl",
        )  # fmt: skip

    assert check("eagle3")[0] == 0
    change(tmp_path / "eagle3", is_neox_style=False)
    code, _, errors = check("eagle3")
    assert code
    assert "is_neox_style = False" in errors
    change(tmp_path / "pard", vocab_size=1984)
    code, _, errors = check("pard")
    assert code
    assert "vocab_size 1984" in errors
    assert "ids up to 2047" in errors


def test_the_family_of_a_target_is_known_from_its_file() -> None:
    """Ids are read alike by ``check``, which loads nothing."""
    sketch = TargetSketch.read(str(TINYWORLD / "target"), torch.float32)
    assert sketch.model_type == "qwen3"
