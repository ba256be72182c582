"""The tiny world: what is committed fits, and the command that builds it goes through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosched.engines.embedded.target import Target, load_tokenizer
from cosched.tinyworld import build, corpus
from cosched.tinyworld.corpus import Document, deroff
from cosched.tinyworld.pretrain import grow, target_config
from tests.helpers.cli import run_cli
from tests.helpers.paths import ROOT, TINYWORLD


def test_the_committed_models_stay_below_24_mib() -> None:
    total = sum(path.stat().st_size for path in TINYWORLD.rglob("*.safetensors"))
    assert 1e6 < total <= 24 * 2**20


def test_the_target_knows_more_than_letter_frequencies(tiny_target: Target) -> None:
    """On held-out text its loss is far below that of guessing among 2048 tokens (7.6 nats)."""
    import json

    tokenizer = load_tokenizer(str(TINYWORLD / "target"))
    for domain in ("code", "manuals", "translated"):
        line = (TINYWORLD / "documents" / f"{domain}.jsonl").read_text().splitlines()[0]
        ids = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"][:600])
        logits = tiny_target.model(input_ids=ids[None]).logits[0]
        assert torch.nn.functional.cross_entropy(logits[:-1], ids[1:]) < 3.6


def test_growing_does_not_change_the_function() -> None:
    """Twice the layers, the same logits: the copies are silent until they are trained."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    small = Qwen3ForCausalLM(target_config(2)).eval()
    ids = torch.randint(0, 2048, (1, 20))
    assert torch.allclose(small(ids).logits, grow(small, 4).eval()(ids).logits, atol=1e-5)


def test_a_file_is_always_on_the_same_side_of_the_split() -> None:
    """The split depends on the path alone, and holds out about one file in twenty."""
    sides = [Document(f"man1/page{n}.1", "").split for n in range(4000)]
    assert sides == [Document(f"man1/page{n}.1", "other").split for n in range(4000)]
    assert 0.03 < sides.count("heldout") / len(sides) < 0.07


def test_deroff_leaves_text() -> None:
    page = '.TH X 1\n.SH "SEE ALSO"\nThis is \\fBbold\\fP and\n.BR ls (1).\n.PP\nf\\(:ur\n.nf\n a\n b\n.fi'
    assert deroff(page) == "SEE ALSO\nThis is bold and ls(1).\n\nf\u00fcr\n a\n b\n"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_build_command_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousandth of the training, on a sixth of each source's text and crops of a quarter of their
    length, it leaves a world that ``cosched run`` accepts."""
    fewer = {
        domain: tuple(replace(one, max_megabytes=one.max_megabytes / 6) for one in several)
        for domain, several in corpus.sources().items()
    }
    shorter = tuple(replace(stage, length=stage.length // 4) for stage in build.STAGES)
    monkeypatch.setattr(corpus, "sources", lambda: fewer)
    monkeypatch.setattr(build, "STAGES", shorter)
    monkeypatch.setattr(build, "EDGES", build.EDGES[:4])
    code, _, err = run_cli(
        *("tinyworld", "build", "--directory", tmp_path / "w"),
        *("--share", "0.001", "--threads", "1"),
    )
    assert code == 0, err
    assert "Held-out loss" in (tmp_path / "w" / "README.md").read_text()
    world = tmp_path / "w"
    code, _, err = run_cli(
        "run",
        "-c",
        ROOT / "configs" / "sampled.yaml",
        f"run.dir={tmp_path / 'runs'}",
        f"target.path={world / 'target'}",
        f"drafter.path={world / 'eagle3'}",
        f"workload.prompts={world / 'prompts' / 'code.jsonl'}",
        "workload.max_prompts=1",
        "workload.max_new_tokens=16",
    )
    assert code == 0, err
