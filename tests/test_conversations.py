"""Conversations of several turns: their requests, and runs that answer them."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cosched.engines.embedded.target import Target, load_end_tokens
from cosched.errors import ConfigError, WorkloadError
from cosched.memory.footprint import footprint
from cosched.memory.sketch import sketch
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.settings.schema import Config
from cosched.telemetry.run_folder import RunFolder
from cosched.workload.requests import SPARE
from tests.helpers.cli import run_cli
from tests.helpers.conversations import (
    ASKS,
    CHAT,
    ENDS,
    SHAREGPT,
    requests_of,
    text_of,
    write_lines,
)
from tests.helpers.paths import TINYWORLD

# --- several turns -------------------------------------------------------------------------


def test_the_last_turns_are_answered_in_order(tmp_path: Path, tokenizer: Any) -> None:
    """A later turn's prompt has the target's own answer, not that of the file, without the token
    that ended it; what stands before the first turn is as in the file."""
    tokenizer.chat_template = ENDS
    chat = [*CHAT, *ASKS]
    path = write_lines(tmp_path / "p.jsonl", {"id": "a", "messages": chat, "tenant": "t"})
    (request,) = requests_of(path, tokenizer, turns=2)
    end, (stop,) = "<|endoftext|>\n", load_end_tokens(str(TINYWORLD / "target"))
    before = f"Manuals.{end}NAME\nls - list{end}ls lists files{end}NAME\ncp - copy{end}"
    assert text_of(tokenizer, request.prompt_P) == before
    assert (request.id, request.num_turns) == ("a", 2)
    answer = [*tokenizer("mine")["input_ids"], stop, *tokenizer("not")["input_ids"]]
    then = request.later.after(answer)
    assert text_of(tokenizer, then.prompt_P) == f"{before}mine{end}NAME\nls - list{end}"
    assert (then.id, then.tenant, then.num_turns, then.later) == ("a@2", "t", 1, None)
    both_answers = 32 + 32 + 32 // SPARE  # and no more room than that: caches are as long
    unanswered = request.later.after([]).prompt_P
    assert request.max_length_of_turns == len(unanswered) + both_answers
    (all_of_them,) = requests_of(path, tokenizer, turns=9)
    assert text_of(tokenizer, all_of_them.prompt_P) == f"Manuals.{end}NAME\nls - list{end}"
    assert all_of_them.num_turns == 3


def test_ids_of_samples_and_turns(tmp_path: Path, tokenizer: Any) -> None:
    """Each is a request of its own name: uniform numbers and adapters go by it."""
    path = write_lines(tmp_path / "p.jsonl", {"id": "a", "messages": CHAT}, {"text": "b"})
    requests = requests_of(path, tokenizer, turns=2, samples=2)
    assert [r.id for r in requests] == ["a", "2", "a#2", "2#2"]
    assert [r.later.after([]).id for r in requests if r.later] == ["a@2", "a#2@2"]
    for taken in ("a@2", "a#2@2", "a#2"):
        write_lines(path, {"id": "a", "messages": CHAT}, {"id": taken, "text": "b"})
        with pytest.raises(WorkloadError, match=f"'{taken}', an id in .*, is also that of"):
            requests_of(path, tokenizer, turns=2, samples=2)


def test_a_turn_that_cannot_fit_is_found_before_the_run(tmp_path: Path, tokenizer: Any) -> None:
    """Without any answer it is too long already; where only the answer makes it so, it ends there."""
    path = write_lines(tmp_path / "p.jsonl", {"id": "a", "messages": CHAT})
    (request,) = requests_of(path, tokenizer, turns=2)
    least = len(request.later.after([]).prompt_P) + 32
    with pytest.raises(
        WorkloadError, match=rf"line 1 .* a@2 has {least - 32} prompt tokens beside the 1 answers"
    ):
        requests_of(path, tokenizer, turns=2, max_length=least - 1)
    (tight,) = requests_of(path, tokenizer, turns=2, max_length=least)
    assert tight.max_length_of_turns == least
    assert tight.later.after([]).max_length == least
    assert tight.later.after(tokenizer("an answer")["input_ids"]) is None


def test_documents_have_no_turns() -> None:
    words = ["workload.documents=d.jsonl", "workload.prompts=null", "workload.turns=2"]
    with pytest.raises(ConfigError, match=r"workload\.turns: .*got 2; use 1"):
        load_config(TINYWORLD.parent / "configs" / "sampled.yaml", words)


def test_memory_is_of_all_turns(tmp_path: Path) -> None:
    """The last prompt holds the answers before it; ``check`` must not promise half of that."""
    path = experiment(tmp_path, conversations(tmp_path))
    one, two = (load_config(path, [f"workload.turns={turns}"]) for turns in (1, 2))
    takes = [footprint(config, *sketch(config)).target_cache for config in (one, two)]
    assert takes[1] * (64 + 24) == takes[0] * (64 + 2 * 24)


# --- in a run ------------------------------------------------------------------------------


def experiment(tmp_path: Path, prompts: Path, **changes: Any) -> Path:
    """A greedy one on the tiny world, of two turns."""
    settings = {
        "run": {"name": "chat", "dir": str(tmp_path / "runs")},
        "engine": {"num_threads": 1},
        "target": {"path": str(TINYWORLD / "target")},
        "drafter": {"kind": "eagle3", "path": str(TINYWORLD / "eagle3")},
        "workload": {"prompts": str(prompts), "max_new_tokens": 24, "turns": 2},
        "arms": ["plain", "adapted"],
        "adapt": {
            "policy": {"kind": "every_n_rounds", "rounds": 4},
            "replay": {"window": 32, "anchors": 16},
            "guard": {"kind": "finite"},
        },
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def run(config: Config, record: bool = False) -> tuple[Any, dict[str, dict[str, str]]]:
    """The summary, and by arm the texts of all requests."""
    folder = RunFolder(config.run_folder)
    folder.create()
    summary = Experiment(config, record).run(folder)
    events = map(json.loads, (folder.path / "events.jsonl").read_text().splitlines())
    said = [event for event in events if event["kind"] == "request"]
    arms = groupby(sorted(said, key=lambda e: e["arm"]), key=lambda e: e["arm"])
    return summary, {arm: {e["id"]: e["text"] for e in texts} for arm, texts in arms}


def conversations(tmp_path: Path) -> Path:
    lines = [{"id": i, "messages": CHAT[1:]} for i in "ab"]
    lines[1] = {"id": "b", "conversations": SHAREGPT}
    return write_lines(tmp_path / "p.jsonl", *lines, {"id": "c", "text": "def main():\n"})


@pytest.mark.parametrize(
    "max_batch", [pytest.param(1, marks=(pytest.mark.slow, pytest.mark.long)), 2]
)
def test_arms_answer_the_same_conversations(
    tmp_path: Path, tokenizer: Any, tiny_target: Target, max_batch: int
) -> None:
    """Every turn of every conversation, the same in all arms, and each as it is by itself."""
    path = experiment(tmp_path, conversations(tmp_path))
    config = load_config(path, [f"engine.max_batch={max_batch}"])
    whole = Experiment(config).total_tokens
    summary, said = run(config)
    assert said["plain"] == said["adapted"]
    assert sorted(said["plain"]) == ["a", "a@2", "b", "b@2", "c"]
    assert summary.arms["adapted"].lossless_mismatches == 0
    assert summary.arms["adapted"].updates > 0
    assert {(arm.requests, arm.cut_conversations) for arm in summary.arms.values()} == {(5, 0)}
    assert summary.arms["plain"].tokens <= whole / 2 == 5 * 24
    first = "Manuals.\nNAME\nls - list\n"
    ids = torch.tensor([tokenizer(f"{first}{said['plain']['b']}\nNAME\ncp - copy\n")["input_ids"]])
    expected = tiny_target.model.generate(ids, max_new_tokens=24, do_sample=False)
    assert text_of(tokenizer, expected[0, ids.shape[1] :]) == said["plain"]["b@2"]


@pytest.mark.slow
def test_a_conversation_that_outgrows_the_context_ends_and_is_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    """Whether a later turn fits is known when the answer before it is there; never in silence."""
    long = {"role": "system", "content": 20 * "Manuals. "}
    lines = [{"id": "a", "messages": CHAT[1:]}, {"id": "b", "messages": [long, *CHAT[1:]]}]
    prompts = write_lines(tmp_path / "p.jsonl", *lines)
    _, request = requests_of(prompts, tokenizer, turns=2, max_new_tokens=24)
    context = len(request.later.after([]).prompt_P) + 24  # no room for the first answer
    target = tmp_path / "target"
    target.mkdir()
    for file in (TINYWORLD / "target").iterdir():
        (target / file.name).symlink_to(file)
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": context}))
    path = experiment(tmp_path, prompts, target={"path": str(target)})
    code, out, err = run_cli("run", "-c", path, "arms=[plain,frozen]")
    assert code == 0, err
    line = "Conversations that ended early, because their next turn did not fit: plain 1, frozen 1."
    assert line in out
    folder = tmp_path / "runs" / "chat"
    assert line in (folder / "report.html").read_text()
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    cut = {e["id"]: e["cut"] for e in events if e["kind"] == "request"}
    assert cut == {"a": False, "a@2": False, "b": True}


@pytest.mark.slow
def test_a_recording_has_all_turns(tmp_path: Path) -> None:
    """A later turn is recorded as a text like any other, and any draft can be judged on it."""
    path, short = experiment(tmp_path, conversations(tmp_path)), "workload.max_new_tokens=12"
    live, said = run(load_config(path, ["arms=[plain, frozen]", short]), record=True)
    trace = f"engine.trace={tmp_path / 'runs' / 'chat' / 'trace'}"
    words = ["arms=[frozen]", short, "engine.kind=trace", trace, "run.name=judged"]
    judged, again = run(load_config(path, words))
    assert again["frozen"] == said["plain"]
    assert judged.arms["frozen"].tau == live.arms["frozen"].tau


@pytest.mark.slow
@pytest.mark.long
def test_a_run_of_conversations_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Between groups no conversation is under way, whatever is asked in it."""
    path = experiment(tmp_path, conversations(tmp_path))
    whole, expected = run(load_config(path, ["run.name=whole"]))
    config = load_config(path)
    folder = RunFolder(config.run_folder)
    folder.create()
    committed = 0

    def interrupt(_arm: str, number: int) -> None:
        nonlocal committed
        committed += number
        if committed > 2 * 2 * 24 + 60:  # in the second conversation
            raise KeyboardInterrupt

    assert Experiment(config).run(folder, interrupt).run["interrupted"]
    code, _, err = run_cli("run", "-c", path, "--resume")
    assert code == 0, err
    resumed = json.loads((folder.path / "summary.json").read_text())
    for arm, figures in whole.arms.items():
        assert resumed["arms"][arm]["tau"] == figures.tau
        assert resumed["arms"][arm]["requests"] == figures.requests == len(expected[arm])


def test_chat_documents_are_said_by_all_arms(tmp_path: Path, tokenizer: Any) -> None:
    """Recorded answers at real cost, from a file: greedy draft or none, the text is theirs."""
    prompts = conversations(tmp_path)
    workload = {"documents": str(prompts), "prompt_tokens": 2}
    path = experiment(tmp_path, prompts, workload=workload)
    _, said = run(load_config(path))
    text = text_of(tokenizer, tokenizer("def main():\n")["input_ids"][2:])
    assert said["plain"] == {"a": "cp copies files\n", "b": "cp copies files\n", "c": text}
    assert said["adapted"] == said["plain"]
