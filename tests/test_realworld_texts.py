"""What drafts of the real world are trained on and what they are measured on never meet."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from cosched.realworld.questions import (
    FORMS,
    HELD_OUT_TOPICS,
    TRAINING_TOPICS,
    training_questions,
)
from tests.helpers.paths import ROOT

SMALL_WORDS = {"a", "an", "the", "of", "in", "on", "to", "for", "with", "without", "and", "your"}
VERBS = {"making", "going"}  # of which topics are many


def _words(topics: list[str]) -> set[str]:
    words = {word for topic in topics for word in re.findall(r"[a-z]+", topic.lower())}
    return {word.removesuffix("s") for word in words - SMALL_WORDS - VERBS}


def test_every_topic_is_asked_about_in_every_form_once() -> None:
    questions = training_questions()
    assert len(questions) == len(TRAINING_TOPICS) * len(FORMS) >= 2800
    assert len({name for name, _ in questions}) == len(questions)
    assert len({text for _, text in questions}) == len(questions)
    assert not any("{" in text for _, text in questions)


def test_the_order_of_the_questions_never_changes() -> None:
    """An interrupted generation of answers goes on where it stopped: by place in this order."""
    assert training_questions() == training_questions()
    assert [name for name, _ in training_questions()[:3]] == [
        "list-smartphones",
        "opinion-sharing-a-flat-with-strangers",
        "explain-medicinal-herbs",
    ]


def test_held_out_topics_share_no_word_with_training() -> None:
    """Otherwise "chat at home" would be judged on what the drafts were trained."""
    trained = _words([topic.name for topic in TRAINING_TOPICS])
    held_out = _words([topic.name for topic in HELD_OUT_TOPICS])
    assert len(HELD_OUT_TOPICS) == 40
    assert not sorted(trained & held_out)


def test_no_training_question_asks_for_what_is_measured_as_shifted_traffic() -> None:
    """Code, other languages, formats and very long answers are what a draft has to adapt to."""
    shifted = re.compile(
        r"\b(python|programs?|code|functions?|in (german|french|spanish|italian)|tables?|json|yaml"
        r"|csv|html|markdown|shell|chapters?|in detail|(long|longer|detailed) \w+)\b",
        re.IGNORECASE,
    )
    assert not [text for _, text in training_questions() if shifted.search(text)]


@pytest.mark.parametrize(
    ("name", "count"), [("chat", 40), ("long", 24), ("languages", 32), ("formats", 24)]
)
def test_prompts_are_chat_of_our_own_without_near_duplicates(name: str, count: int) -> None:
    """Two prompts that share most of their words would count one answer twice."""
    prompts = _prompts(name)
    assert len(prompts) == count
    sets = [set(re.findall(r"\w+", text.lower())) for text in prompts.values()]
    for one, other in itertools.combinations(sets, 2):
        assert len(one & other) <= 0.6 * len(one | other)


def test_chat_at_home_asks_about_every_held_out_topic() -> None:
    """Chat differs from what the drafts were trained by its topics, and by nothing else."""
    text = " ".join(_prompts("chat").values()).lower()
    missing = [t.name for t in HELD_OUT_TOPICS if t.name.removesuffix("s").lower() not in text]
    assert not missing
    assert not set(_prompts("chat").values()) & {text for _, text in training_questions()}


def _prompts(name: str) -> dict[str, str]:
    prompts: dict[str, str] = {}
    for line in (ROOT / "realworld" / "prompts" / f"{name}.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        (message,) = record["messages"]
        assert set(record) == {"id", "messages"}
        assert message["role"] == "user"
        assert record["id"] not in prompts
        prompts[record["id"]] = message["content"]
    return prompts
