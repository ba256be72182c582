"""Watching a real server: its metrics, its screen, and what it keeps of texts."""

from __future__ import annotations

import json
import re
import stat
from typing import Any

import openai
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosched.engines.sglang.operators.metrics import METRICS
from tests.sglang.client import complete, prompt
from tests.sglang.server import Server, Start, until

pytestmark = pytest.mark.sglang

SERIES = re.compile(r"^(cosched_\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def server(start_shared: Start) -> Server:
    """It learns often under a guard that scores, records texts, and draws its curves."""
    return start_shared(
        "adapt.policy.rounds=8",
        "adapt.guard={kind: shadow, anchors: 16, false_publish: 0.5}",
        "record.text=true",
        "run.trackers=[tensorboard]",
        "--enable-metrics",
    )


@pytest.fixture(scope="module")
def asked(server: Server) -> dict[str, Any]:
    """Some requests, one of which is not to be recorded; the status and the page afterwards."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        answers = [complete(client, number, 160) for number in range(3)]
        secret = client.completions.create(
            model="tiny", prompt=prompt(4), max_tokens=NUM_TOKENS, temperature=0,
            extra_body={"custom_params": {"cosched_record": False}, "ignore_eos": True},
        )  # fmt: skip
    return {
        "answers": answers,
        "secret": secret.choices[0].text,
        "status": server.settled(),
        "page": server.get("/metrics"),
    }


def test_metrics_by_place_depth_and_version_are_on_the_page(asked: dict[str, Any]) -> None:
    """As the status has them; every name is one that the documentation lists."""
    figures = asked["status"]["figures"]
    shown: dict[str, dict[str, float]] = {}
    for name, labels, value in SERIES.findall(asked["page"]):
        own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        del own["model_name"]
        shown.setdefault(name, {})[next(iter(own.values()), "")] = float(value)
    assert shown.keys() <= {one.shown_as for one in METRICS}
    places = {str(k): place["accepted"] for k, place in enumerate(figures["total"]["places"], 1)}
    assert shown["cosched_accepted_drafts_total"] == places
    assert len(places) == 3
    depths = {f"{one['start']}-{one['end'] - 1}": one["rounds"] for one in figures["depths"]}
    assert shown["cosched_request_rounds_total"] == depths
    assert set(depths) == {"0-63", "64-127", "128-255"}
    assert shown["cosched_version_number"]["loaded"] == 0
    assert shown["cosched_resident_memory_bytes"][""] > 1e8
    assert shown["cosched_replay_limit_bytes"][""] == 268435456
    assert set(shown["cosched_guard_log_wealth"]) == {"better", "worse"}


def test_rounds_of_a_request_are_counted_once(asked: dict[str, Any]) -> None:
    """Committed tokens are those of the answers, without the first of each, which is the prompt's, and
    with up to a block more that the end of an answer has cut off."""
    figures = asked["status"]["figures"]
    committed = sum(one["committed"] for one in figures["depths"])
    answered = 3 * 159 + NUM_TOKENS - 1
    assert answered <= committed <= answered + 4 * 4
    rounds = sum(one["rounds"] for one in figures["depths"])
    assert rounds == figures["total"]["rounds"] == figures["total"]["places"][0]["reached"]
    assert (
        sum(one["rounds"] for one in figures["versions"]) <= rounds
    )  # the newest versions are kept


def test_one_frame_in_a_terminal(server: Server, asked: dict[str, Any]) -> None:
    """What a user types, from another process."""
    told = server.command("top", "--once", "--url", server.url)
    assert told.returncode == 0, told.stderr
    assert f"draft version {asked['status']['draft_version']}" in told.stdout
    for expected in ("accepted, newest", "64-127", "0 (as loaded)", "guard: better", "exposed"):
        assert expected in told.stdout, told.stdout


def test_texts_are_recorded_but_for_one(server: Server, asked: dict[str, Any]) -> None:
    """Each prompt with its answer, for the server's user alone, in the folder of the start; the history
    beside it has none of it."""
    (folder,) = (server.runs / "serve_tiny_cpu").iterdir()
    path = folder / "texts.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = lines[-3:]  # SGLang warms up with requests of its own
    assert [line["prompt"] for line in lines] == [prompt(number) for number in range(3)]
    for line, answer in zip(lines, asked["answers"], strict=True):
        assert line["answer"] == answer
        assert line["time"] > 1.7e9
    history = (folder / "events.jsonl").read_text()
    assert asked["secret"][:24] not in path.read_text()
    assert asked["answers"][0][:24] not in history


def test_curves_are_in_the_folder_of_the_start(server: Server, asked: dict[str, Any]) -> None:
    """As TensorBoard reads them, some seconds later: of the rounds, updates and looks that the status has."""
    (folder,) = (server.runs / "serve_tiny_cpu").iterdir()
    events = EventAccumulator(str(folder / "tensorboard" / folder.name))
    status = asked["status"]

    def drawn(name: str) -> list[Any]:
        events.Reload()
        return events.Scalars(name) if name in events.Tags()["scalars"] else []

    losses = until(lambda: len(found := drawn("update/loss")) >= status["updates"] and found)
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    learnt = [line["result"]["losses"][0] for line in lines if line["kind"] == "update"]
    assert [one.value for one in losses] == pytest.approx(learnt[: len(losses)], rel=1e-6)
    assert drawn("guard/better")
    for name in ("acceptance/length", "acceptance/place_3", "speed/tokens_per_s"):
        assert drawn(name)[-1].step <= status["figures"]["total"]["rounds"]
    assert drawn("draft/version")[-1].value <= status["draft_version"]
    assert drawn("speed/exposed_s")[-1].value > 0
