"""Files of prompts and documents as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosched.errors import WorkloadError
from cosched.settings.load import load_config
from cosched.workload.chat import Chat
from cosched.workload.requests import check_texts
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

# --- layouts -------------------------------------------------------------------------------


def test_layouts_may_be_mixed(tmp_path: Path, tokenizer: Any) -> None:
    """Text is taken as it is, chat through the template, in the order of the file; an answer that
    ends a conversation is left out, those before it are what was said."""
    path = write_lines(
        tmp_path / "prompts.jsonl",
        {"id": "a", "text": "NAME\nls - list", "tenant": "t"},
        {"id": "b", "messages": CHAT, "tenant": "u"},
        {"conversations": SHAREGPT},
        {"messages": SHAREGPT[:2]},
        {"id": None, "messages": CHAT[:4]},
    )
    requests = requests_of(path, tokenizer)
    assert [(r.id, r.tenant) for r in requests] == [
        *[("a", "t"), ("b", "u"), ("3", None), ("4", None), ("5", None)]
    ]
    whole = "Manuals.\nNAME\nls - list\nls lists files\nNAME\ncp - copy\n"
    texts = [text_of(tokenizer, r.prompt_P) for r in requests]
    assert texts == ["NAME\nls - list", whole, whole, "Manuals.\nNAME\nls - list\n", whole]
    assert all(r.forced_T is None and r.later is None for r in requests)


def test_questions_alone_are_answered_from_the_first_on(tmp_path: Path, tokenizer: Any) -> None:
    """As benchmarks have them: nobody has answered the first when the second is asked."""
    questions = {
        "question_id": 81,
        "category": "writing",
        "turns": ["NAME\nls", "NAME\ncp", "NAME\nmv"],
    }
    path = write_lines(tmp_path / "question.jsonl", questions)
    (once,) = requests_of(path, tokenizer)
    assert (once.id, once.later) == ("81", None)
    assert text_of(tokenizer, once.prompt_P) == "NAME\nls\n"
    tokenizer.chat_template = ENDS
    (twice,) = requests_of(path, tokenizer, turns=2)
    assert twice.later is not None
    second = twice.later.after(tokenizer("ls lists files")["input_ids"])
    assert second is not None
    assert (second.id, second.later) == ("81@2", None)
    assert "lists files" in text_of(tokenizer, second.prompt_P)
    assert "NAME\ncp" in text_of(tokenizer, second.prompt_P)
    assert "NAME\nmv" not in text_of(tokenizer, second.prompt_P)


def test_the_template_asks_for_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    """Without its generation prompt a chat model goes on with the user's message; and what else a
    message says is the template's to use."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.name }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )
    path = write_lines(tmp_path / "p.jsonl", {"messages": [{**ASKS[0], "name": "ann"}]})
    (request,) = requests_of(path, tokenizer)
    assert text_of(tokenizer, request.prompt_P) == "ann:NAME\nls - list\nanswer:"


def test_an_array_is_read_as_its_entries(tmp_path: Path, tokenizer: Any) -> None:
    """ShareGPT dumps are one JSON array, over many lines or one."""
    path = tmp_path / "dump.json"
    path.write_text(json.dumps([{"id": "x", "conversations": SHAREGPT}, {"text": "a"}], indent=1))
    assert [r.id for r in requests_of(path, tokenizer)] == ["x", "2"]
    path.write_text(json.dumps([{"text": "a"}, {"conversations": []}]))
    with pytest.raises(
        WorkloadError, match=r"prompts: entry 2 of .*dump.json has no conversations"
    ):
        requests_of(path, tokenizer)


def test_only_what_is_asked_for_is_read(tmp_path: Path, tokenizer: Any) -> None:
    """A dump of a hundred thousand conversations has bad ones, and a run takes a few."""
    path = write_lines(tmp_path / "p.jsonl", {"text": "a"}, {"text": "b"}, {"nothing": 1})
    assert [r.id for r in requests_of(path, tokenizer, max_prompts=2)] == ["1", "2"]
    with pytest.raises(WorkloadError, match=r"line 3 of .* got the keys \['nothing'\]"):
        requests_of(path, tokenizer)


def test_only_a_line_feed_ends_a_line(tmp_path: Path, tokenizer: Any) -> None:
    """JSON may have U+2028 and U+0085 in a string, where str.splitlines would cut it."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\r\n\n{"text": "d"}\n', encoding="utf-8-sig")
    texts = [text_of(tokenizer, r.prompt_P) for r in requests_of(path, tokenizer)]
    assert texts == ["a\u2028b\u0085c", "d"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1", "begins as a JSON array and is none"),
        ("{", "line 1 of .* is not JSON"),
        ({"turns": ["a", 3]}, "line 1 of .* has the turn 3; expected a string"),
        ({"turns": []}, r"line 1 of .* has no turns, got \[\]; expected a list"),
        ("3", "line 1 of .* is no object, got 3; expected .*text.*messages.*conversations"),
        ({}, "line 1 of .* has no text and no messages, got the keys \\[\\]; expected"),
        (
            {"text": "a", "messages": ASKS},
            "has text and messages, got the keys .*; expected one of",
        ),
        ({"text": 3}, "has no text, got 3"),
        ({"messages": {}}, r"has no messages, got \{\}"),
        ({"messages": ["hi"]}, "has the message \"hi\"; expected {'role', 'content'} or {'from'"),
        ({"messages": [{"role": "user"}]}, "has the message .*expected"),
        ({"messages": [{"role": "tool", "content": ""}]}, "of 'tool'; allowed for role: system"),
        ({"messages": [{"from": ["x"], "value": ""}]}, r"of \['x'\]; allowed for from"),
        ({"messages": [{"role": "user", "content": [{}]}]}, r"content \[\{\}\]; expected a string"),
        ({"messages": ASKS, "tools": [{}]}, "has tools"),
        ({"messages": CHAT[2:3]}, "has no message of the user's"),
        ({"messages": CHAT[1:2] + CHAT[:1]}, "has a message of 'system' behind the last"),
        ({"text": "a", "tenant": 3}, "has the tenant 3; expected a name"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    """Key, line, file, what came and what is allowed: found by ``check``, without a tokenizer."""
    path = tmp_path / "p.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    words = [f"workload.prompts={path}"]
    with pytest.raises(WorkloadError, match=f"workload.prompts: .*{says}"):
        check_texts(load_config(TINYWORLD.parent / "configs" / "sampled.yaml", words))


def test_a_file_that_is_not_utf8(tmp_path: Path, tokenizer: Any) -> None:
    """It was a traceback."""
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(WorkloadError, match=r"workload.prompts: .*p.jsonl is not UTF-8"):
        requests_of(tmp_path / "p.jsonl", tokenizer)


def test_a_target_without_a_template_says_what_to_do(tmp_path: Path, tokenizer: Any) -> None:
    """Text goes without one; chat names its line. So does a chat that the template refuses."""
    path = write_lines(tmp_path / "p.jsonl", {"text": "a"}, {"messages": ASKS})
    tokenizer.chat_template = None
    assert len(requests_of(path, tokenizer, max_prompts=1)) == 1
    with pytest.raises(WorkloadError, match=r"line 2 of .*p.jsonl is chat, .*target has no chat"):
        requests_of(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(WorkloadError, match=r"line 2 of .* refuses it: roles must alternate"):
        requests_of(path, tokenizer)


# --- documents -----------------------------------------------------------------------------


def test_the_last_answer_of_a_chat_is_said(tmp_path: Path, tokenizer: Any) -> None:
    """The prompt is what asks for it, whatever ``prompt_tokens`` is; text is cut there as before."""
    path = write_lines(
        tmp_path / "d.jsonl",
        {"messages": [*CHAT, *ASKS]},
        {"conversations": SHAREGPT},
        {"text": "a text of several tokens"},
    )
    requests = requests_of(path, tokenizer, "documents", prompt_tokens=2)
    asked = "Manuals.\nNAME\nls - list\nls lists files\nNAME\ncp - copy\n"
    for request in requests[:2]:
        assert text_of(tokenizer, request.prompt_P) == asked
        assert text_of(tokenizer, request.forced_T) == f"{asked}cp copies files\n"
        assert request.max_length == len(request.forced_T)
    assert len(requests[2].prompt_P) == 2
    short = requests_of(path, tokenizer, "documents", prompt_tokens=2, max_new_tokens=3)
    assert [len(r.forced_T) - len(r.prompt_P) for r in short] == [3, 3, 3]


def test_an_answer_ends_where_its_target_stops(tmp_path: Path, tokenizer: Any) -> None:
    """Templates put a line break behind the end of a turn, which no target says."""
    tokenizer.chat_template = ENDS
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT[1:3]})
    (request,) = requests_of(path, tokenizer, "documents")
    answer = request.forced_T[len(request.prompt_P) :]
    assert text_of(tokenizer, request.prompt_P).endswith("<|endoftext|>\n")
    assert text_of(tokenizer, answer) == "ls lists files<|endoftext|>"


def test_an_answer_begins_with_a_token_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    """Where prompt and answer would share a token, the target had to begin the answer without it."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pair = [{"role": "user", "content": "retu"}, {"role": "assistant", "content": "rn value"}]
    path = write_lines(tmp_path / "d.jsonl", {"messages": pair})
    (request,) = requests_of(path, tokenizer, "documents")
    chat = Chat(tokenizer)
    assert chat.ids("return value")[: len(chat.ids("retu"))] != chat.ids("retu")  # they would
    assert request.prompt_P.tolist() == chat.ids("retu")
    assert request.forced_T.tolist() == [*chat.ids("retu"), *chat.ids("rn value")]


def test_a_template_that_rewrites_the_question_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """What was asked with must be the beginning of what was answered, or other text is judged."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    path = write_lines(tmp_path / "d.jsonl", {"messages": CHAT})
    with pytest.raises(WorkloadError, match=r"line 1 of .*<think>.*give it as"):
        requests_of(path, tokenizer, "documents")


def test_documents_need_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "d.jsonl", {"messages": ASKS})
    with pytest.raises(WorkloadError, match=r"workload.documents: line 1 .* has no answer"):
        requests_of(path, tokenizer, "documents")
    silent = {"role": "assistant", "content": " "}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    write_lines(path, {"messages": [*ASKS, silent]})
    with pytest.raises(WorkloadError, match=r"line 1 .* nothing is left of its answer"):
        requests_of(path, tokenizer, "documents")
