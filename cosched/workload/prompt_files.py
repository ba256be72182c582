"""Files of prompts and documents: JSON lines, or one JSON array, of text, OpenAI chat, ShareGPT and questions."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from cosched.errors import WorkloadError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYOUTS = ("text", "messages", "conversations", "turns")
EXPECTED = (
    '{"text": …}, {"messages": [{"role": …, "content": …}, …]}, '
    '{"conversations": [{"from": …, "value": …}, …]} or {"turns": ["…", …]}'
)
SPELLINGS = (("role", "content"), ("from", "value"))
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",  # this and the next two are in the published ShareGPT dump
    "bing": "assistant",
    "bard": "assistant",
}

Message = dict[str, Any]
"""``role`` (system, user or assistant) and ``content``, and whatever else the file says of it."""
Messages = tuple[Message, ...]


class Line(NamedTuple):
    """What a line says: ``text``, or the ``messages`` of a chat, of which ``text`` is None.

    ``unanswered`` messages are the user's questions alone, of which no answer is in the file.
    ``where`` it stands, with the key that names the file, begins what is said of it to its user.
    ``source`` is its file's name, where there are several.
    """

    id: str
    tenant: str | None
    text: str | None
    messages: Messages
    where: str
    source: str | None = None
    unanswered: bool = False


def read_lines(path: Path, key: str, most: int | None = None) -> list[Line]:
    """The first ``most`` lines of a file, or entries of its array; the others are not looked at.

    Raises:
        WorkloadError: no file, nothing in it, an entry of no known layout, an id twice, a tenant
            that is no name; the message names the key, the line and the file.
    """
    lines: dict[str, Line] = {}
    for where, number, record in islice(_records(path, key), most):
        line = _line(record, number, where)
        if line.id in lines:
            raise WorkloadError(f"{key}: the id {line.id!r} stands twice in {path}")
        lines[line.id] = line
    if not lines:
        raise WorkloadError(f"{key}: {path} has no prompt in it")
    return list(lines.values())


def _records(path: Path, key: str) -> Iterator[tuple[str, int, Any]]:
    """Where each record stands, its number from 1 on, and the record."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WorkloadError(f"{key}: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{key}: {path} is not UTF-8: {error}") from error
    if content.lstrip().startswith("["):
        try:
            records = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise WorkloadError(
                f"{key}: {path} begins as a JSON array and is none: {error}"
            ) from error
        for number, record in enumerate(records, 1):
            yield f"{key}: entry {number} of {path}", number, record
        return
    for number, line in enumerate(content.split("\n"), 1):  # text may have other line breaks in it
        if not line.strip():
            continue
        where = f"{key}: line {number} of {path}"
        try:
            yield where, number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"{where} is not JSON: {error}") from error


def _line(record: Any, number: int, where: str) -> Line:
    if not isinstance(record, dict):
        raise WorkloadError(f"{where} is no object, got {_short(record)}; expected {EXPECTED}")
    found = [name for name in LAYOUTS if name in record]
    if len(found) != 1:
        which = " and ".join(found) or "no text and no messages"
        raise WorkloadError(
            f"{where} has {which}, got the keys {list(record)}; expected one of {EXPECTED}"
        )
    if record.get("tools"):
        raise WorkloadError(f"{where} has tools, which are not given to the target; leave them out")
    tenant = record.get("tenant")
    if not isinstance(tenant, str | None):
        raise WorkloadError(f"{where} has the tenant {tenant!r}; expected a name")
    (layout,) = found
    name = record.get("question_id" if layout == "turns" and "id" not in record else "id")
    name = str(number if name is None else name)
    if layout == "text":
        text = record["text"]
        if not isinstance(text, str) or not text:
            raise WorkloadError(f"{where} has no text, got {_short(text)}; expected a string")
        return Line(name, tenant, text, (), where)
    messages = record[layout]
    if not isinstance(messages, list) or not messages:
        raise WorkloadError(
            f"{where} has no {layout}, got {_short(messages)}; expected a list of them"
        )
    if layout == "turns":
        questions = tuple(_question(one, where) for one in messages)
        return Line(name, tenant, None, questions, where, unanswered=True)
    return Line(name, tenant, None, tuple(_message(one, where) for one in messages), where)


def _question(raw: Any, where: str) -> Message:
    if not isinstance(raw, str) or not raw:
        raise WorkloadError(f"{where} has the turn {_short(raw)}; expected a string")
    return {"role": "user", "content": raw}


def _message(raw: Any, where: str) -> Message:
    """A message under the names of OpenAI's chat, whichever spelling it has."""
    for role_key, content_key in SPELLINGS:
        if isinstance(raw, dict) and role_key in raw and content_key in raw:
            role, content = raw[role_key], raw[content_key]
            break
    else:
        spellings = " or ".join(f"{{{role!r}, {content!r}}}" for role, content in SPELLINGS)
        raise WorkloadError(f"{where} has the message {_short(raw)}; expected {spellings}")
    if not isinstance(role, str) or role not in ROLES:
        raise WorkloadError(
            f"{where} has a message of {role!r}; allowed for {role_key}: {', '.join(ROLES)}"
        )
    if not isinstance(content, str):
        raise WorkloadError(
            f"{where} has a message of {role!r} with {content_key} {_short(content)}; expected a "
            f"string (parts, images and tool calls are not read)"
        )
    rest = {name: value for name, value in raw.items() if name not in (role_key, content_key)}
    return {"role": ROLES[role], "content": content, **rest}


def _short(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most - 1]}…"
