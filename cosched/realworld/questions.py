"""The questions on whose answers the drafts are trained: topics times forms, in our own words.

Everyday chat in English. Code, other languages, tables and very long texts are left out on purpose:
they are the traffic that the drafts have to get used to. The held-out topics, in the same forms,
are the chat at home (``realworld/prompts/chat.jsonl``). Topics and forms are in ``questions.json``.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["subject", "activity"]  # "Explain comets." and "Explain baking bread."


@dataclass(frozen=True, slots=True)
class Topic:
    """What is asked about, and what it is compared with: a neighbour of its own group."""

    name: str
    neighbour: str
    kind: Kind


def _topics(part: str) -> tuple[Topic, ...]:
    return tuple(
        Topic(name, names[(place + 1) % len(names)], group["kind"])
        for group in _DATA[part].values()
        for names in [group["topics"]]
        for place, name in enumerate(names)
    )


_DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
FORMS: tuple[str, ...] = tuple(_DATA["forms"])
TRAINING_TOPICS = _topics("training")
HELD_OUT_TOPICS = _topics("held_out")  # never asked about in training


def training_questions() -> tuple[tuple[str, str], ...]:
    """Every training topic in every form, as (id, question), in an order that never changes.

    The order is shuffled, so that any first part of it is a fair sample of topics and forms.
    """
    questions = [
        (f"{form}-{_slug(topic.name)}", _ask(form, topic, place))
        for place, topic in enumerate(TRAINING_TOPICS)
        for form in FORMS
    ]
    random.Random(0).shuffle(questions)
    return tuple(questions)


def _ask(form: str, topic: Topic, place: int) -> str:
    """The form's wordings take turns over the topics, and do not move together over the forms."""
    wordings = _DATA["forms"][form][topic.kind]
    wording = wordings[(place + FORMS.index(form)) % len(wordings)]
    return wording.format(topic=topic.name, other=topic.neighbour)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
