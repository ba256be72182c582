"""``cosched top``: its frame, where it looks, and what it says where there is nothing to see."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from cosched.engines.sglang.worker.operator import Status
from cosched.errors import ControlError, RunFolderError
from cosched.records import RoundRow, Verdict, WeightVersion
from cosched.telemetry.run_folder import EventLog
from cosched.top.frame import frame, spark
from cosched.top.sources import Run, Server
from cosched.top.watch import watch
from tests.helpers.cli import run_cli
from tests.helpers.serving import STATUS, busy

WIDTH = 80


def text_of(status: Status, width: int = WIDTH) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frame("http://x", status, (2.0, 2.2, 2.1)))
    return console.export_text()


def test_the_frame_has_what_an_operator_looks_for() -> None:
    """Readable without colours, in a terminal of eighty columns."""
    text = text_of(busy())
    assert max(map(len, text.splitlines())) <= WIDTH
    for expected in (
        "ALARM  place: place 3 is accepted in 4% of 400 times",
        "learning  draft version 3",
        "2.00 (+12% on it)",
        "41.2 ms, 3 running, 2 waiting",
        "accepted, newest 344",
        "256-511",
        "0 (as loaded)",
        "4, 0 refused, 0 rolled back, loss 0.100",
        "+0.120 tokens a round ± 0.050",
        "1.00 of 1.60",
        "1.5 s of 6.5 s that requests waited for learning",
        "1 MB of 256 MB, 1,024 rows",
        "3.0 GB host",
    ):
        assert expected in text, text


def test_a_status_that_knows_next_to_nothing_is_shown() -> None:
    """A server that has just come up, without a guard that scores."""
    none = msgspec.structs.replace(
        STATUS, draft_seconds=0.0, verify_seconds=0.0, update_seconds=0.0, publish_seconds=0.0,
        acceptance_length=None, last_loss=None, rounds=0,
    )  # fmt: skip
    text = text_of(none)
    assert "\u2013, 0 rounds" in text
    assert "exposed" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapting": False}, "not learning"),
        ({"adapting": False, "failure": "broken"}, "training stopped"),
        ({}, "  learning"),
    ],
)
def test_it_says_whether_the_draft_learns(changes: dict, said: str) -> None:
    """Off by hand and stopped for good are two things."""
    assert said in text_of(msgspec.structs.replace(STATUS, **changes))


def test_a_line_of_lengths_goes_from_the_least_to_the_greatest() -> None:
    """One of a single length would say nothing."""
    assert spark((1.0, 2.0, 3.0)) == "▁▅█ 1.00\u20133.00"
    assert spark((2.0, 2.0)) == "▁▁ 2.00\u20132.00"
    assert spark((2.0,)) == ""


# --- a server -------------------------------------------------------------------------------


@contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    """A web server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_one_frame_of_a_server_for_scripts() -> None:
    """Over HTTP, through the command line: what the server says arrives whole, nested figures too."""
    with answering(200, msgspec.json.encode(busy())) as url:
        assert Server(url, None).look() == busy()
        code, output = run_cli("top", "--once", "--url", url)[:2]
    assert code == 0
    assert "accepted, newest" in output


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (404, b"{}", "was this server started with cosched serve"),
        (200, b"<html>", "does not answer in JSON"),
        (200, b'{"ok": true}', "not one of this version"),
        (401, b"", "wants its --api-key"),
        (403, b'{"error": "clients of its own machine only"}', "of its own machine only"),
    ],
)
def test_a_server_where_cosched_is_not_active_is_said_plainly(
    code: int, body: bytes, said: str
) -> None:
    """Plain SGLang, another web server, another version, one with a key: each has one message."""
    with answering(code, body) as url, pytest.raises(ControlError, match=said):
        Server(url, None).look()


def test_nobody_there_is_one_message_and_no_frame() -> None:
    """And an exit code that a script can see."""
    code, *said = run_cli("top", "--once", "--url", "http://127.0.0.1:1")
    assert code == 1
    assert "does not answer" in "".join(said)


class Faltering:
    """A source that answers, then does not, then does again; then the user has seen enough."""

    name = "x"

    def __init__(self) -> None:
        self.looks = 0

    def look(self) -> Status:
        self.looks += 1
        if self.looks == 2:
            raise ControlError("http://x does not answer [now]")
        return STATUS

    def sleep(self, _seconds: float) -> None:
        if self.looks == 3:
            raise KeyboardInterrupt


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    """The last frame stays, with what is wrong above it; Ctrl-C is how one leaves."""
    source = Faltering()
    path = tmp_path / "screen"
    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=True, width=WIDTH)
        watch(source, console, 1.0, source.sleep, once=False)
    assert source.looks == 3
    assert "does not answer [now]" in path.read_text(encoding="utf-8")


# --- a run ----------------------------------------------------------------------------------


def write_run(folder: Path, rounds: int) -> None:
    log = EventLog()
    log.open(folder / "events.jsonl", buffered=False)
    events = log.for_arm("adapted")
    for number in range(rounds):
        events.emit("round", row=RoundRow("r", number, number // 300, 3, 2, 3))
    events.emit("update", round=1, result={"losses": [2.0, 1.5]})
    scores = {"candidate_score": 2.5, "serving_score": 3.0, "loaded_score": 2.0}
    events.emit("verdict", round=1, verdict=Verdict("wait", "not known yet", **scores))
    events.emit("publication", round=1, version=WeightVersion(1, "00", None, 0.1))
    log.for_arm("frozen").emit("round", row=RoundRow("r", 0, 0, 3, 0, 1))
    log.close()


def test_a_run_is_read_on_where_it_was_left(tmp_path: Path) -> None:
    """Each look takes what is new; a line that is being written is left for the next."""
    write_run(tmp_path, 400)
    path = tmp_path / "events.jsonl"
    source = Run(tmp_path, "adapted")
    status = source.look()
    assert (status.rounds, status.updates, status.draft_version) == (400, 1, 1)
    assert (status.last_loss, status.refused_updates) == (1.5, 1)
    assert status.frozen_acceptance_length == pytest.approx(3.0 * 2 / 3)
    line = json.dumps(
        {
            "kind": "round",
            "arm": "adapted",
            "row": msgspec.to_builtins(RoundRow("r", 0, 1, 3, 0, 1)),
        }
    )
    with path.open("a") as file:
        file.write(line[:30])
    assert source.look().rounds == 400
    with path.open("a") as file:
        file.write(f"{line[30:]}\nnonsense\n")
    assert source.look().rounds == 401
    code, output = run_cli("top", "--once", str(tmp_path))[:2]
    assert code == 0
    assert "401 rounds" in output


def test_an_arm_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    """As is a folder without events."""
    write_run(tmp_path, 1)
    with pytest.raises(RunFolderError, match="'plain' yet; there are adapted, frozen"):
        Run(tmp_path, "plain").look()
    with pytest.raises(RunFolderError, match="cannot be read"):
        Run(tmp_path / "nowhere", "adapted").look()
