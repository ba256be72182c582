"""What `cosched plan` takes from a run's rounds and events."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cosched.plan.behaviour import Observed
from cosched.plan.recorded import read_arms

TEXT = 4000  # tokens of a request


def rounds_of(chance_at, rng: np.random.Generator, updates_every: int = 0) -> np.ndarray:
    """Rounds of one request: each commits 1 to 4 tokens, an update behind so many of them."""
    rows, position, learnt = [], 1, 0
    while position < TEXT:
        tau = chance_at(position, learnt)
        committed = 1 + rng.binomial(3, (tau - 1) / 3)
        rows.append((position, min(committed, TEXT - position), learnt))
        position += committed
        if updates_every and len(rows) % updates_every == 0:
            learnt += 1
    return np.array(rows)


def observed(gain: float, scale: float, number: int = 12) -> Observed:
    rng = np.random.default_rng(0)

    def frozen(position: int, _learnt: int) -> float:
        return 2.2 if position < 1024 else 1.8

    def learning(position: int, learnt: int) -> float:
        return frozen(position, 0) * (1 - gain * np.expm1(-learnt / scale))

    names = [str(n) for n in range(number)]
    return Observed(
        {name: rounds_of(frozen, rng) for name in names},
        {name: rounds_of(learning, rng, 32) for name in names},
        most_tokens=4,
    )


def test_a_planted_curve_is_found() -> None:
    """+25 % with a scale of 10 updates, on text that the frozen draft finds harder behind 1,024 tokens."""
    found = observed(0.25, 10.0).fit()
    assert found.gain == pytest.approx(0.25, abs=0.02)
    assert found.scale == pytest.approx(10.0, rel=0.3)
    assert found.tau_at[3] == pytest.approx(2.2, abs=0.1)
    assert found.tau_at[6] == pytest.approx(1.8, abs=0.1)
    assert found.lengths == pytest.approx(np.full(12, TEXT))
    early, late = found.tau(np.array([300, 3000]), np.array([0.0, 1000.0]))
    assert (early, late) == pytest.approx((2.2, 1.8 * 1.25), abs=0.1)


def test_what_learns_nothing_adds_nothing_and_more_is_not_made_up() -> None:
    """The same rounds in both arms: no gain. Beyond the last number of updates that was seen nothing is added."""
    assert observed(0.0, 10.0).fit().gain == pytest.approx(0.0, abs=0.02)
    found = observed(0.3, 1000.0).fit()  # it has not come far when the text ends
    assert found.most_updates < 100
    last, beyond = found.factor(np.array([found.most_updates, 1e6]))
    assert last == beyond < 1.08


def test_requests_drawn_anew_give_other_figures_near_those_of_all() -> None:
    """A repeat is made of some requests twice and of others not at all."""
    seen = observed(0.25, 10.0)
    other = seen.fit(np.array([0, 0, 1, 2, 3, 3, 3, 5, 8, 9, 9, 11]))
    assert other.gain != seen.fit().gain
    assert other.gain == pytest.approx(0.25, abs=0.04)


def lines(*events: dict) -> str:
    return "".join(json.dumps({"arm": "a", "round": 0, **event}) + "\n" for event in events)


def update(skipped: int = 0) -> dict:
    return {
        "kind": "update",
        "result": {"seconds": 0.5, "num_steps": 1, "num_skipped": skipped, "losses": []},
    }


def publication(version: int) -> dict:
    return {"kind": "publication", "version": {"version": version, "seconds": 0.1}}


def verdict(action: str, to: int | None = None) -> dict:
    return {"kind": "verdict", "verdict": {"action": action, "to": to}}


def test_versions_are_known_by_the_updates_that_are_in_them(tmp_path: Path) -> None:
    """A guard that waits, a step that was skipped, a rollback to the draft as loaded and to a version, a reset."""
    (tmp_path / "events.jsonl").write_text(
        lines(
            update(), verdict("wait"), update(), verdict("publish"), publication(1),
            update(skipped=1), update(), verdict("publish"), publication(2),
            verdict("roll_back", 0), {"kind": "rollback", "to": 0}, publication(3),
            update(), verdict("publish"), publication(4),
            {"kind": "rollback", "to": 2}, publication(5), update(), publication(6),
            {"kind": "reset"}, {"kind": "rollback", "to": 0}, publication(7),
        )
        + '{"kind": "upda'
    )  # fmt: skip
    learning = read_arms(tmp_path)["a"].learning
    assert learning.contained == {0: 0, 1: 2, 2: 3, 3: 0, 4: 1, 5: 3, 6: 4, 7: 0}
    assert learning.updates == 6
    assert learning.published == 4


def test_groups_have_the_rounds_of_their_longest_request(tmp_path: Path) -> None:
    """Two at once, 3 and 5 rounds: the engine did 5, of 1.6 requests; a request's rounds follow its turn."""

    def row(name: str, position: int) -> dict:
        figures = {"draft_version": 0, "num_drafted": 3, "num_accepted": 1, "num_committed": 2}
        return {"kind": "round", "row": {"request_id": name, "position": position, **figures}}

    def turn(group: int) -> dict:
        stages = {"prefill": 0.1, "draft": 0.2, "verify": 0.5}
        return {
            "kind": "turn",
            "turn": {"group": group, "tokens": 8, "seconds": 1.0, "stages": stages},
        }

    (tmp_path / "events.jsonl").write_text(
        lines(
            turn(1), *(row("x", 1 + 2 * n) for n in range(3)),
            turn(1), *(row("y", 1 + 2 * n) for n in range(5)),
            turn(2), *(row("z", 1 + 2 * n) for n in range(4)),
        )
    )  # fmt: skip
    arm = read_arms(tmp_path)["a"]
    assert [group.batches(2) for group in arm.groups.values()] == [5, 4]
    assert arm.batches(2) == 9
    assert arm.seconds("prefill") == pytest.approx(0.3)
    assert arm.seconds("other") == pytest.approx(0.6)
    assert arm.num_tokens == 24
