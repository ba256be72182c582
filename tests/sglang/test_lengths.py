"""How many tokens SGLang drafts changes from round to round: the text does not, and nothing waits for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from cosched.engines.sglang.worker.lengths import ServedLengths
from cosched.loop.lengths import DraftLengths
from cosched.protocols import LengthSettings
from schedulers.length import Fixed
from tests.sglang.adapting import OFTEN, K, Serve, names, plainly, shifted
from tests.sglang.client import complete
from tests.sglang.server import Start
from tests.sglang.serving import Decode, tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # several engines a test

CHANGING = "drafter.length={kind: goodput, explore_share: 1.0, explore_rounds: 2}"
BY_LOAD = ("drafter.length.kind=goodput", "adapt.policy.rounds=8")


@pytest.mark.parametrize("ranks", [1, 2])
def test_lengths_change_the_speed_and_not_the_text(
    ranks: int, serve: Serve, decode: Decode, report: Callable[[str], None]
) -> None:
    """Every number of tokens comes up, none among them, while the draft learns and is published. Ranks
    have clocks of their own: had each its own number, their passes would not fit together."""
    served = serve("eagle3", *OFTEN, CHANGING, tp_size=ranks)
    assert tokens(served.answers) == tokens(plainly(decode))
    assert not served.of("failure")
    assert len(served.of("publication")) >= 20
    drafted = [row.num_drafted for row in served.rows()]
    counts = [drafted.count(number) for number in range(K + 1)]
    report(f"{ranks} ranks: rows by tokens drafted {counts}")
    assert min(counts) > 0
    assert sum(one != other for one, other in pairwise(drafted)) > 20


def test_the_draft_replays_what_sglang_served_at_changing_lengths(
    serve: Serve, report: Callable[[str], None]
) -> None:
    """Rows of rounds with few drafts, or none, stand where they belong: what is replayed from them is
    what was drafted."""
    kept = ("adapt.policy.rounds=4", "adapt.loss.rows=accepted", "adapt.replay.window=1024")
    served = serve("eagle3", *kept, CHANGING, fault="fidelity")
    assert not served.of("failure")
    losses = [event["result"]["losses"] for event in served.of("update")]
    wrong, _, _, whole = (sum(counts) for counts in zip(*losses, strict=True))
    report(f"{wrong:.0f} of {whole:.0f} drafted tokens missed")
    assert whole > 100
    assert wrong == 0
    assert len({row.num_drafted for row in served.rows()}) == K + 1


def test_load_turns_speculation_off_and_on_without_a_stall(
    serve: Serve, decode: Decode, report: Callable[[str], None]
) -> None:
    """One request alone, three more beside it, alone again. vLLM's throughput fell to a tenth where
    its length changed with the load (vllm-project/vllm issue 49548); here no change makes anybody wait,
    and behind the load the first goes on as fast as before it. A third of that is for a busy machine."""
    texts, said = shifted()[:4], [480, 48, 48, 72]
    lengths = [{"max_new_tokens": number} for number in said]
    more = {"texts": texts, "sampling": lengths, "join": 200}
    plain = decode("float32", texts=texts, sampling=lengths)
    served = serve("eagle3", *BY_LOAD, fault="length by load", more=more)
    assert tokens(served.answers) == tokens(plain)
    assert not served.of("failure")
    first = [row for row in served.rows() if row.request_id == names(texts)[0]]
    lengths_of_first = [number for number, _ in groupby(row.num_drafted for row in first)]
    assert lengths_of_first[0] == lengths_of_first[-1] == K
    assert {0, 1, K} == set(lengths_of_first)
    times = served.answers[0]["times"]
    crowd = [answer["times"] for answer in served.answers[1:]]
    before = [at for at in times[8:] if at[0] < min(at[0][0] for at in crowd)]
    after = [at for at in times if at[0] > max(at[-1][0] for at in crowd)]
    longest = max(later - sooner for (sooner, _), (later, _) in pairwise(times[8:]))
    report(
        f"alone {speed(before):.0f} tokens/s, alone again {speed(after):.0f}, longest wait "
        f"{longest * 1e3:.0f} ms, lengths {lengths_of_first}"
    )
    assert speed(after) > speed(before) / 3
    assert longest < 2


def speed(times: list[list[float]]) -> float:
    """Tokens a second between the first and the last look."""
    (began, few), (ended, many) = times[0], times[-1]
    return (many - few) / (ended - began)


def test_a_policy_that_breaks_ends_neither_server_nor_learning(
    serve: Serve, decode: Decode
) -> None:
    """Its lengths do: from then on all are drafted that can be."""
    served = serve("eagle3", *OFTEN, "drafter.length.kind=goodput", fault="length")
    assert tokens(served.answers) == tokens(plainly(decode))
    assert not served.of("failure")
    assert served.of("publication")
    drafted = [row.num_drafted for row in served.rows()]
    assert set(drafted[:20]) == set(range(K + 1))
    assert set(drafted[60:]) == {K}


def test_ours_answers_all_that_sglang_asks_a_policy() -> None:
    """SGLang's worker would fail at the first question that ours does not know."""
    from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController, AdaptiveSpecPolicy

    ours = ServedLengths(DraftLengths(Fixed(LengthSettings(kind="fixed")), K), (1, K), K)
    asked = [name for name in vars(AdaptiveSpecPolicy) if not name.startswith("_")]
    assert len(asked) >= 5
    assert [name for name in asked if not hasattr(ours, name)] == []
    worker = SimpleNamespace(speculative_num_steps=K, built=[], applied=[])
    worker.build_adaptive_runtime_state = lambda **state: worker.built.append(state) or state
    worker.apply_runtime_state = worker.applied.append
    controller = AdaptiveController(worker, ours)
    controller.register(SimpleNamespace(speculative_num_steps=K))
    controller.init_states([1, 8])
    assert worker.built == [
        {
            "speculative_num_steps": 1,
            "speculative_num_draft_tokens": 2,
            "cuda_graph_bs": [1, 8],
        }
    ]
    ours.settle(1)
    controller.activate_step_by_batch(8)
    controller.on_verify_complete([1, 0], 2)
    assert worker.applied[1:] == worker.built


def test_an_operator_sees_how_many_tokens_are_drafted(start: Start) -> None:
    """In the status, and on SGLang's page of metrics."""
    server = start("drafter.length.kind=goodput", "--enable-metrics")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        for number in range(3):
            complete(client, number)
    status = server.settled()
    counts = status["rounds_by_drafted"]
    assert all(counts[:2])  # which are tried first
    assert sum(counts) == status["rounds"]
    page: Any = server.get("/metrics")
    shown = re.findall(r'^cosched_rounds_by_drafted_total\{.*tokens="(\d+)"\} (\S+)$', page, re.M)
    assert {int(number): float(count) for number, count in shown} == dict(enumerate(counts))
    assert "Switch adaptive runtime state" not in server.log.read_text()
