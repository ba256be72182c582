"""What a server keeps of its clients' texts: nothing, or the share that was asked for."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from cosched.engines.sglang.worker import texts as module
from cosched.engines.sglang.worker.texts import Texts, is_recorded
from cosched.settings.sections import RecordSettings


class Kept:
    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        assert kind == "text"
        self.all.append(fields)


def request(name: str, custom: Any = None) -> Any:
    """As SGLang has one; what it has answered grows while it runs."""
    sampling = SimpleNamespace(custom_params=custom)
    return SimpleNamespace(
        rid=name, origin_input_ids=[1, 2], output_ids_through_stop=[], sampling_params=sampling
    )


def spelt(tokens: Any) -> str:
    return " ".join(map(str, tokens))


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    """The default of every server."""
    assert RecordSettings().text is False


def test_prompt_and_answer_are_kept_when_the_request_is_done() -> None:
    """Whole, once, and not before; who opts out is left out, and who says otherwise is not."""
    kept = Kept()
    texts = Texts(kept, 1.0, spelt)
    requests = [
        request("a"),
        request("b", {"cosched_record": False}),
        request("c", {"cosched_record": True}),
        request("d", {"other": False}),
    ]
    for one in requests:
        texts.began(one)
        texts.began(one)  # a prompt is run in pieces
        one.output_ids_through_stop += [7, 8]
    assert kept.all == []
    for one in (*requests, requests[0]):
        texts.finished(one.rid)
        one.output_ids_through_stop.append(9)  # SGLang may still write
    texts.close()
    assert [one["id"] for one in kept.all] == ["a", "c", "d"]
    assert kept.all[0] == {"id": "a", "prompt": "1 2", "answer": "7 8"}


def test_a_share_is_that_share_and_always_the_same_requests() -> None:
    """Of 10,000 names a tenth: five standard errors are 150. The names are fixed."""
    names = [f"request-{number}" for number in range(10_000)]
    recorded = [name for name in names if is_recorded(name, 0.1)]
    assert abs(len(recorded) - 1000) < 150
    assert recorded == [name for name in names if is_recorded(name, 0.1)]
    assert set(recorded) <= {name for name in names if is_recorded(name, 0.5)}
    assert all(is_recorded(name, 1.0) for name in names)


def test_requests_that_never_finish_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang may drop one without a word."""
    monkeypatch.setattr(module, "RUNNING", 3)
    kept = Kept()
    texts = Texts(kept, 1.0, spelt)
    for number in range(10):
        texts.began(request(str(number)))
    for number in range(10):
        texts.finished(str(number))
    texts.close()
    assert [one["id"] for one in kept.all] == ["7", "8", "9"]


def test_a_tokenizer_that_fails_loses_that_text_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It is in a thread, where an exception would be seen by nobody."""

    def decode(tokens: Any) -> str:
        if 666 in tokens:
            raise OverflowError("no such token")
        return spelt(tokens)

    kept = Kept()
    texts = Texts(kept, 1.0, decode)
    bad, good = request("bad"), request("good")
    bad.output_ids_through_stop.append(666)
    with caplog.at_level(logging.ERROR, "cosched"):
        for one in (bad, good):
            texts.began(one)
            texts.finished(one.rid)
        texts.close()
    assert [one["id"] for one in kept.all] == ["good"]
    assert "could not record the text of request bad" in caplog.text
