"""``cosched serve`` with the real SGLang on a CPU: its API over loopback, while the draft learns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.sglang.client import complete, prompt
from tests.sglang.server import CONFIG, PATIENCE, Server, Start
from tests.sglang.serving import ROOT, WORLD, Decode

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def server(start_shared: Start) -> Server:
    """One for all tests that only ask; it learns often. Its processes are started as a user's are."""
    settings = ("adapt.policy.rounds=8", "adapt.publish.keep=2", "--enable-metrics")
    return start_shared(*settings, COSCHED_TEST_SPAWN="1")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as made:
        yield made


# --- what users of the API see --------------------------------------------------------------


def test_four_requests_at_once_and_again_say_the_same(
    server: Server, client: openai.OpenAI
) -> None:
    """The draft learns meanwhile; greedy text is the target's, whichever draft proposed it."""
    before = server.get("/cosched/status")
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda number: complete(client, number), range(4)))
        again = list(pool.map(lambda number: complete(client, number), range(4)))
    assert first == again
    after = server.get("/cosched/status")
    assert after["updates"] > before["updates"]
    assert after["draft_version"] > before["draft_version"]
    assert after["failure"] is None
    assert after["warning"] is None


LENGTHS = (64, 112, 160, 208)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_every_drafter_says_what_the_target_says(
    kind: str, request: pytest.FixtureRequest, start: Start, decode: Decode
) -> None:
    """Four requests at once of different lengths and a fifth that is given up, again and again over
    twenty publications: every text is that of an engine without speculation."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "target")
    texts = [tokenizer(prompt(number))["input_ids"] for number in range(4)]
    plain = decode("float32", texts=texts, num_tokens=max(LENGTHS))
    expected = [
        tokenizer.decode(answer["tokens"][:length])
        for answer, length in zip(plain, LENGTHS, strict=True)
    ]
    if kind == "eagle3":
        server = request.getfixturevalue("server")
    else:
        server = start(f"drafter.kind={kind}", "adapt.policy.rounds=4")
    first = server.get("/cosched/status")["draft_version"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        for _ in range(8):
            stream = client.completions.create(
                model="tiny", prompt=prompt(5), max_tokens=2000, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            with ThreadPoolExecutor(4) as pool:
                answers = pool.map(lambda n: complete(client, n, LENGTHS[n]), range(4))
                for _ in zip(range(12), stream, strict=False):
                    pass
                stream.close()
                assert list(answers) == expected
            status = server.get("/cosched/status")
            if status["draft_version"] >= first + 20:
                break
    assert status["draft_version"] >= first + 20
    assert status["failure"] is None
    assert status["acceptance_length"] > 1.2
    if kind != "eagle3":
        assert server.stop() == 0


def test_a_streamed_chat_is_the_chat(client: openai.OpenAI) -> None:
    """Piece by piece or whole, with the tokenizer's own template."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Write a function."}],
        "max_tokens": 48,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        piece.choices[0].delta.content or ""
        for piece in client.chat.completions.create(stream=True, **asked)
    ]
    assert len(pieces) > 4
    assert "".join(pieces) == whole


def test_a_request_that_is_given_up_leaves_the_others_alone(
    server: Server, client: openai.OpenAI
) -> None:
    """Its rows are dropped in the middle of a round; the neighbour's text stays what it was."""
    alone = complete(client, 5, 200)
    stream = client.completions.create(
        model="tiny",
        prompt=prompt(6),
        max_tokens=2000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(complete, client, 5, 200)
        for _ in zip(range(10), stream, strict=False):
            pass
        stream.close()
        assert beside.result() == alone
    until = time.monotonic() + 30
    while server.get("/v1/loads")["loads"][0]["num_running_reqs"]:
        assert time.monotonic() < until, "the aborted request still runs"
        time.sleep(0.2)
    assert server.get("/cosched/status")["failure"] is None


def test_what_ends_at_once_and_idling_leave_the_learning_as_it_was(
    start: Start, tmp_path: Path
) -> None:
    """SGLang tells its worker nothing of a request that ends with its prompt: forty of one token, or a
    minute of health checks, left hardly an anchor to requests that ran. Idle ticks were charged as
    training."""
    events = tmp_path / "events.jsonl"
    server = start("adapt.policy.rounds=4", COSCHED_EVENTS=str(events))

    def newest_rows() -> int:
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        return [line["result"]["num_rows"] for line in lines if line["kind"] == "update"][-1]

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        complete(client, 0, 160)
        rows = newest_rows()
        assert rows > 60
        for number in range(40):
            complete(client, number % 8, 1)
        for path in ("/health_generate", "/health", "/health_generate"):
            assert server.call(path)[0] == 200
        complete(client, 1, 160)
        assert newest_rows() == rows
    before = server.get("/cosched/status")
    time.sleep(2)
    after = server.get("/cosched/status")
    assert after["updates"] == before["updates"] > 0
    assert after["update_seconds"] == before["update_seconds"] > 0
    assert server.stop() == 0


# --- what operators see ---------------------------------------------------------------------


def test_off_stops_learning_and_on_resumes_it(server: Server, client: openai.OpenAI) -> None:
    """While off, rounds are counted and the draft stays as it is."""
    code, off = server.call("/cosched/off", {})
    assert (code, off["adapting"]) == (200, False)
    complete(client, 0)
    still = server.get("/cosched/status")
    assert still["rounds"] > off["rounds"]
    assert still["draft_version"] == off["draft_version"]
    assert server.call("/cosched/on", {})[1]["adapting"] is True
    complete(client, 0, 200)
    assert server.get("/cosched/status")["draft_version"] > off["draft_version"]


def test_a_rollback_serves_an_earlier_version_as_the_next_one(server: Server) -> None:
    """The draft as it was loaded is always kept; what is not kept is refused, and nothing done."""
    before = server.get("/cosched/status")["draft_version"]
    code, after = server.call("/cosched/rollback", {"version": 0})
    assert (code, after["draft_version"]) == (200, before + 1)
    code, refusal = server.call("/cosched/rollback", {"version": 100000})
    assert code == 409
    assert "100000" in refusal["error"]
    code, refusal = server.call("/cosched/rollback", {})
    assert code == 400
    assert server.get("/cosched/status")["draft_version"] == before + 1


def test_the_command_line_controls_the_server(server: Server) -> None:
    """The same verbs, with messages instead of codes."""
    told = server.command("control", "status", "--url", server.url)
    assert told.returncode == 0, told.stderr
    assert re.search(r"draft_version +\d+", told.stdout)
    refused = server.command("control", "rollback", "100000", "--url", server.url)
    assert refused.returncode == 1
    assert "100000" in refused.stderr
    told = server.command("doctor", "-c", CONFIG, "--url", server.url)
    assert told.returncode == 0, told.stdout + told.stderr
    names = re.search(r"the plugin takes hold: (.+)", told.stdout)
    assert names
    assert {"COSCHED_EAGLE3", "COSCHED_DFLASH"} <= set(names[1].split(", "))
    assert "tinyworld/eagle3 can be served" in told.stdout
    assert re.search(r"version \d+, \d+ rounds, \d+ updates", told.stdout)


def test_metrics_and_server_info_carry_the_same_figures(
    server: Server, client: openai.OpenAI
) -> None:
    """Counters and gauges are on SGLang's page, once: rank 0 alone shows them."""
    complete(client, 1)
    status = server.settled()
    metrics = server.get("/metrics")
    shown = dict(re.findall(r"^cosched_(\w+)\{[^}]*\} (\S+)$", metrics, re.MULTILINE))
    assert float(shown["draft_version"]) == status["draft_version"] > 0
    assert float(shown["rounds_total"]) == status["rounds"]
    assert float(shown["updates_total"]) == status["updates"]
    assert float(shown["evicted_requests_total"]) == status["evicted_requests"]
    assert float(shown["adapting"]) == 1
    assert float(shown["failed"]) == 0
    seconds = dict(re.findall(r'cosched_time_seconds_total\{kind="(\w+)"[^}]*\} (\S+)', metrics))
    for kind, value in seconds.items():
        assert float(value) == pytest.approx(status[f"{kind}_seconds"])
    assert len(seconds) == 6
    assert float(shown["rollbacks_total"]) == status["rollbacks"] > 0
    assert float(shown["refused_updates_total"]) == status["refused_updates"]
    assert metrics.count("\ncosched_draft_version{") == 1
    (state,) = server.get("/server_info")["internal_states"]
    assert state["cosched"]["updates"] == status["updates"]


@pytest.fixture(scope="module")
def saved(server: Server) -> Path:
    """The draft that the server has by now, as a checkpoint."""
    code, answer = server.call("/cosched/save", {"path": "monday"})
    assert code == 200, answer
    return Path(answer["path"])


def test_a_draft_is_saved_below_the_run_folder_only(server: Server, saved: Path) -> None:
    """A caller gives a name; nothing is replaced."""
    (run,) = (server.runs / "serve_tiny_cpu").iterdir()
    assert saved.is_absolute()
    assert saved.resolve() == run / "checkpoints" / "monday"
    assert [path.name for path in saved.parent.iterdir()] == ["monday"]
    assert server.call("/cosched/save", {"path": "monday"})[0] == 409
    assert server.call("/cosched/save", {"path": str(run / "x")})[0] == 400
    assert server.call("/cosched/save", {"path": "../x"})[0] == 400


# --- an engine inside another program, and the saved draft -----------------------------------

ENGINE = """
import json, sys
from cosched.engines.sglang.launcher.launch import engine
if __name__ == "__main__":
    draft, folder, prompt = sys.argv[1:]
    made = engine("configs/serve_tiny_cpu.yaml", [f"drafter.path={draft}"], log_level="error")
    params = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
    text = made.generate(prompt, params)["text"]
    status = made.cosched.off()
    made.cosched.save(folder)
    made.shutdown()
    print(json.dumps({"text": text, "rounds": status.rounds, "adapting": status.adapting}))
"""


def test_an_embedded_engine_serves_a_saved_draft(
    saved: Path,
    client: openai.OpenAI,
    tmp_path: Path,
    bare_environment: dict[str, str],
) -> None:
    """What one server learned is where the next begins; without HTTP, a socket controls it."""
    script = tmp_path / "embed.py"
    script.write_text(ENGINE)
    process = subprocess.run(
        [sys.executable, str(script), str(saved), str(tmp_path / "kept"), prompt(2)],
        env=bare_environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr[-8000:]
    told = json.loads(process.stdout.splitlines()[-1])
    assert told["text"] == complete(client, 2, 64)
    assert told["rounds"] > 0
    assert told["adapting"] is False
    assert (tmp_path / "kept" / "config.json").exists()


# --- the end --------------------------------------------------------------------------------


def test_the_server_stops_when_it_is_told_to(server: Server, client: openai.OpenAI) -> None:
    """SIGTERM is how supervisors stop it: no error code, no processes, no folder left behind."""
    complete(client, 0, 8)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    pids = children.read_text().split()
    left = private_folders(pids)
    assert left
    assert server.stop() == 0, server.log.read_text()[-4000:]
    until = time.monotonic() + 10
    while running := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < until, running
        time.sleep(0.2)
    assert not [folder for folder in left if folder.exists()]


def runs(pid: str) -> bool:
    """Whether it does; what nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def private_folders(pids: list[str]) -> set[Path]:
    """Those that these processes were started with."""
    found: set[Path] = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"COSCHED_RUN="):
                found.add(Path(entry.partition(b"=")[2].decode()))
    return found
