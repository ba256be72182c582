"""Drafts of the real model trained on recorded answers: what they see is what the target said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cosched.engines.embedded.target import Target
from cosched.realworld import build
from cosched.realworld import teach as teaching
from cosched.realworld.documents import WANTED
from cosched.realworld.recipes import RECIPES, Classroom, words_by_frequency
from cosched.realworld.recorded import Recorded, compute
from cosched.realworld.teach import acceptance, batch_of, places, teach
from tests.helpers.cli import run_cli

SIZE = 96


@pytest.fixture(scope="module")
def deep() -> Target:
    """A random target with as many layers as the real one, thin as it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=30,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return Target(model)


def say(target: Target, layers: tuple[int, ...], number: int = 12) -> list[Recorded]:
    """Random texts of different lengths with what the target computes of them."""
    answers = list[Recorded]()
    for length in range(20, 20 + number):
        tokens_T = torch.randint(SIZE, (length,), generator=torch.Generator().manual_seed(length))
        answers.append(compute(target, tokens_T, 5, layers))
    return answers


def test_a_row_is_taught_what_the_target_says_there(deep: Target) -> None:
    """Teacher and path of anchor a are of tokens a + 1, a + 2, …; one place off teaches nonsense,
    and what fills up a shorter answer must not count."""
    answers = say(deep, (1, 14), 2)
    anchors = [places(answers[0], 3)[:2], places(answers[1], 3)]
    batch = batch_of(answers, anchors, 3)
    for r, (answer, anchors_N) in enumerate(zip(answers, anchors, strict=True)):
        at = torch.arange(len(answer.tokens_T))[None]
        cache = deep.new_cache(1, len(answer.tokens_T))
        logits = deep.forward(answer.tokens_T[None], at, cache).logits_BTV[0]
        for n, anchor in enumerate(anchors_N.tolist()):
            assert (
                batch.paths_RNK[r, n].tolist() == answer.tokens_T[anchor + 1 : anchor + 4].tolist()
            )
            trained = deep.head(batch.teacher_RNKX[r, n])
            torch.testing.assert_close(trained, logits[anchor : anchor + 3], rtol=1e-4, atol=1e-4)
        assert batch.weights_RNK[r].any(-1).tolist() == [
            n < len(anchors_N) for n in range(batch.weights_RNK.shape[1])
        ]
    assert int(anchors[1][0]) == 4  # the last token of the question: the answer's first is drafted
    assert int(anchors[1][-1]) + 3 == len(answers[1].tokens_T) - 1  # the last path ends with it
    assert not len(places(answers[0]._replace(num_prompt=19), 3))


def test_the_frequent_words_stay_and_others_take_turns(deep: Target) -> None:
    """A student trained on the frequent words alone could put its mass on all others unpunished."""
    head = next(deep.head.parameters())
    classroom = Classroom(deep, torch.arange(SIZE).flip(0), num_frequent=10, num_others=6)
    frequent, drawn = head[torch.arange(SIZE).flip(0)[:10]], set[int]()
    for step in range(150):
        classroom.call(torch.Generator().manual_seed(step))
        (weights,) = classroom.head.parameters()
        torch.testing.assert_close(weights[:10], frequent, rtol=0, atol=0)
        others = [int((head == row).all(-1).nonzero()) for row in weights[10:]]
        assert len(set(others)) == 6
        drawn |= set(others)
    assert drawn == set(range(SIZE - 10))


def test_words_go_by_how_often_they_are_answered() -> None:
    tokens = torch.tensor([7, 7, 7, 3, 5, 5, 3, 5])
    answer = Recorded(tokens, 3, torch.empty(0), torch.empty(0))  # the question's count nothing
    assert words_by_frequency([answer], 8).tolist() == [5, 3, 0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "eagle3" else pytest.mark.slow) for name in RECIPES],
)
def test_a_draft_learns_what_its_target_says(deep: Target, tmp_path: Path, name: str) -> None:
    """Forty steps on a dozen texts: its acceptance on them rises, and what is the target's stays."""
    recipe = RECIPES[name]
    answers = say(deep, recipe.layers)
    words_V = words_by_frequency(answers, SIZE)
    head = next(deep.head.parameters()).clone()
    few, many = (
        teach(
            deep,
            answers,
            words_V,
            replace(recipe, steps=steps),
            0,
            tmp_path / "kept",
            lambda *_: None,
        )[0]
        for steps in (1, 40)
    )
    before, after = (
        acceptance(deep, draft, answers, recipe.num_draft_tokens, 1.0).mean().item()
        for draft in (few, many)
    )
    assert after > before + 0.03
    torch.testing.assert_close(next(deep.head.parameters()), head, rtol=0, atol=0)
    if name == "pard":  # borrowed, so that storage need not have it
        assert torch.equal(many.network().state_dict()["model.embed_tokens.weight"], head)


def test_what_was_interrupted_goes_on_to_the_same_draft(
    deep: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process loses at most the steps since the last that were kept, and no other result."""
    monkeypatch.setattr(teaching, "STEPS_KEPT", 2)
    recipe = replace(RECIPES["eagle3"], anchors=4, steps=5)
    answers = say(deep, recipe.layers)
    words_V = words_by_frequency(answers, SIZE)

    def until(killed_after: int) -> Any:
        done: list[int] = []

        def advance(number: int, _text: str) -> None:
            done.append(number)
            if sum(done) == killed_after:
                raise KeyboardInterrupt

        kept = tmp_path / f"{killed_after > 5}"
        return teach(deep, answers, words_V, recipe, 0, kept, advance)[0].network().state_dict()

    with pytest.raises(KeyboardInterrupt):
        until(3)
    assert (tmp_path / "False").exists()
    monkeypatch.setattr(teaching, "STEPS_KEPT", 100)
    resumed = until(0)
    for name, weight in until(99).items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)
    assert not (tmp_path / "False").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.realworld
@pytest.mark.timeout(900)
def test_the_build_command_makes_a_draft(tmp_path: Path) -> None:
    """With a thousandth of the training: a card, and a compact draft that expands and is loaded; what
    is there is not made again."""
    if not Path("models/SmolLM2-135M-Instruct").is_dir():
        pytest.skip("no model in models/; cosched realworld fetch gets it")
    words = (
        *("realworld", "build", "--only", "eagle3", "--share", "0.001", "--threads", "1"),
        *("--to", tmp_path / "drafts", "--documents", tmp_path / "documents"),
        *("--work", tmp_path / "work"),
    )
    code, _, err = run_cli(*words)
    assert code == 0, err
    card = (tmp_path / "drafts" / "eagle3" / "README.md").read_text(encoding="utf-8")
    assert all(f"| {domain} |" in card for domain in WANTED)
    made = tmp_path / "work" / "answers" / "0000" / "rows.safetensors"
    when = made.stat().st_mtime_ns
    (tmp_path / "drafts" / "eagle3" / "README.md").unlink()
    code, _, err = run_cli(*words)
    assert code == 0, err
    assert made.stat().st_mtime_ns == when
    assert (tmp_path / "drafts" / "eagle3" / "README.md").read_text(encoding="utf-8") == card
    code, _, err = run_cli("realworld", "build", "--only", "medusa")
    assert code == 2
    assert "--only: no draft 'medusa'; there are eagle3, dflash, pard" in err


@pytest.mark.parametrize("share", ["0.5", "1"])
def test_a_trial_leaves_nothing_where_the_drafts_are_made(
    monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    """What is there is not made again: shards and documents of a trial would pass for whole ones."""
    given: list[build.Folders] = []
    monkeypatch.setattr(build, "build", lambda folders, *_: given.append(folders))
    code, _, err = run_cli("realworld", "build", "--share", share)
    assert code == 0, err
    (folders,) = given
    written = {folders.work, folders.to, folders.documents}
    made = {Path("build/realworld"), Path("realworld/drafts"), Path("realworld/documents")}
    if share == "1":
        assert written == made
    else:
        assert all(path.is_relative_to("build/realworld-0.5") for path in written)
        assert folders.to != folders.work / "drafts"  # those in full
