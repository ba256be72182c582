"""Drafts that learn inside SGLang: the text stays the target's, the draft gets better, and what
breaks stops the learning and not the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.sglang.adapting import LENGTH, OFTEN, SHAPES, K, names, plainly, shifted
from tests.sglang.serving import Decode, rounds, tokens

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]  # several engines a test

STOCK = {"eagle3": "EAGLE3", "dflash": "DFLASH"}


@pytest.mark.parametrize("kind", SHAPES)
def test_adapting_changes_the_speed_and_not_the_text(
    kind: str, serve: Any, decode: Decode, report: Callable[[str], None]
) -> None:
    """Four requests at once of different lengths, over twenty publications: the text is that of no
    speculation, the draft is better than the frozen one where the text is new, and no bit of the
    target has changed."""
    texts = shifted()
    plain = plainly(decode)
    frozen = serve(kind, "adapt.policy.kind=never")
    adapted = serve(kind, *OFTEN)
    assert tokens(frozen.answers) == tokens(plain)
    assert tokens(adapted.answers) == tokens(plain)
    versions = [event["version"] for event in adapted.of("publication")]
    assert [version["version"] for version in versions] == list(range(1, len(versions) + 1))
    assert len(versions) >= 20
    assert len({version["target_checksum"] for version in versions}) == 1
    assert len({version["draft_checksum"] for version in versions}) == len(versions)
    before, after = frozen.figures(texts), adapted.figures(texts)
    report(
        f"{kind}: tau {before.tau:.3f} -> {after.tau:.3f}, novel {before.tau_novel:.3f} -> "
        f"{after.tau_novel:.3f}, {len(versions)} versions, repeats {after.repeat_fraction:.2f}"
    )
    assert after.tau_novel > before.tau_novel > 1


@pytest.mark.parametrize("kind", STOCK)
def test_watching_changes_nothing(kind: str, serve: Any, decode: Decode) -> None:
    """Our worker that never publishes drafts as SGLang's own does: as many rounds a request."""
    stock = decode("float32", STOCK[kind], kind, texts=shifted(), num_tokens=LENGTH, **SHAPES[kind])
    assert rounds(serve(kind, "adapt.policy.kind=never").answers) == rounds(stock)
    watching = serve(kind, "adapt.policy.rounds=1000000")
    assert rounds(watching.answers) == rounds(stock)
    assert Counter(event["kind"] for event in watching.events).keys() == {"round"}


@pytest.mark.parametrize(
    ("fault", "publications", "reason"),
    [
        ("trainer", 2, "RuntimeError: the trainer broke"),
        ("checksum", 2, "PublicationError: publication 3 undone"),
        ("tap", None, "IndexError: the tap broke"),
    ],
)
def test_what_breaks_stops_the_learning_and_not_the_server(
    fault: str, publications: int | None, reason: str, serve: Any, decode: Decode
) -> None:
    """SGLang ends its whole engine if a worker raises."""
    served = serve("eagle3", *OFTEN, fault=fault)
    assert tokens(served.answers) == tokens(plainly(decode))
    failures = served.of("failure")
    assert len(failures) == 1
    assert failures[0]["reason"].startswith(reason)
    if publications is not None:
        assert len(served.of("publication")) == publications


def test_steps_that_are_not_finite_are_skipped(serve: Any, decode: Decode) -> None:
    served = serve("eagle3", *OFTEN, fault="gradient")
    assert tokens(served.answers) == tokens(plainly(decode))
    skipped = [event["result"]["num_skipped"] for event in served.of("update")]
    assert skipped[:5] == [0, 0, 1, 1, 0]
    assert len(served.of("publication")) == len(skipped) - 2
    assert not served.of("failure")


def test_starving_is_said_once(serve: Any, decode: Decode) -> None:
    served = serve("eagle3", *OFTEN, fault="starve")
    assert tokens(served.answers) == tokens(plainly(decode))
    assert len(served.of("warning")) == 1
    assert not served.of("update")


def test_updates_in_the_background_change_no_text(serve: Any, decode: Decode) -> None:
    """A thread trains while the engine decodes; what it published depends on the machine's speed."""
    served = serve("eagle3", *OFTEN, "adapt.trainer.background=true")
    assert tokens(served.answers) == tokens(plainly(decode))
    updates, publications = len(served.of("update")), len(served.of("publication"))
    assert updates > 3
    assert updates - publications in {0, 1}  # the engine may be closed between the two
    assert not served.of("failure")


def test_an_idle_server_trains_if_the_policy_says_so(serve: Any) -> None:
    """After the last request, and on what it left behind."""
    served = serve(
        "eagle3", "adapt.policy.rounds=1000000", "adapt.policy.idle_steps=2",
        "adapt.replay.keep_finished=true", more={"linger": 3},
    )  # fmt: skip
    (update,) = served.of("update")
    last = max(number for number, event in enumerate(served.events) if event["kind"] == "round")
    assert served.events.index(update) > last
    assert update["result"]["num_steps"] == 2


def test_two_ranks_serve_and_learn_as_one(serve: Any, report: Callable[[str], None]) -> None:
    """ZeRO 1 over the tensor-parallel group, each rank on its share of the anchors: the same text,
    the same losses, and after every publication both ranks have the same weights (the publisher
    compares them, and stops if not). One request after the other: which of four join first is chance,
    and with it what an update learns from."""
    one, two = (serve("eagle3", *OFTEN, max_running_requests=1, tp_size=ranks) for ranks in (1, 2))
    assert tokens(one.answers) == tokens(two.answers)
    assert not two.of("failure")
    losses = [[e["result"]["losses"][0] for e in served.of("update")] for served in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # sums of shares round differently
    assert len(two.of("publication")) == len(one.of("publication")) >= 20
    report(f"rounds with one rank {sum(rounds(one.answers))}, two {sum(rounds(two.answers))}")


@pytest.mark.parametrize(
    ("fault", "publications", "reason"),
    [
        ("ranks", 2, "PublicationError: publication 3 undone: the ranks were given different"),
        ("rank", None, "another rank stopped training"),
    ],
)
def test_ranks_stop_learning_together(
    fault: str, publications: int | None, reason: str, serve: Any, decode: Decode
) -> None:
    """A rank that went on alone would wait for the other for ever."""
    served = serve("eagle3", *OFTEN, fault=fault, tp_size=2)
    assert tokens(served.answers) == tokens(plainly(decode))
    (failure,) = served.of("failure")
    assert failure["reason"].startswith(reason)
    if publications is not None:
        assert len(served.of("publication")) == publications


@pytest.mark.parametrize(("false_publish", "tp_size"), [("0.999", 1), ("0.05", 2)])
def test_a_guard_judges_what_would_serve(
    false_publish: str, tp_size: int, serve: Any, decode: Decode, report: Callable[[str], None]
) -> None:
    """On rows that no update has seen, and all ranks alike: those that judged differently would publish
    different drafts, and stop. What serves stays until there is evidence, here hardly any or
    as much as usual."""
    guard = f"adapt.guard={{kind: shadow, anchors: 16, false_publish: {false_publish}}}"
    # Whose first steps do not cost acceptance: some of the first seven candidates are better.
    gentle = "adapt.loss={kind: jensen_shannon, rows: delayed}"
    served = serve("eagle3", *OFTEN, gentle, guard, tp_size=tp_size)
    assert tokens(served.answers) == tokens(plainly(decode))
    assert not served.of("failure")
    verdicts = [event["verdict"] for event in served.of("verdict")]
    scored = [verdict for verdict in verdicts if verdict["candidate_score"]]
    assert len(scored) > 10
    scores = [verdict["serving_score"] for verdict in scored]
    assert all(1 <= score <= K + 1 for score in scores)  # the bounds where all rows are alike
    assert len(set(scores)) > 5
    published = [verdict["action"] for verdict in verdicts].count("publish")
    assert len(served.of("publication")) == published + len(served.of("rollback"))
    first = [verdict["action"] for verdict in scored[:7]]
    assert ("publish" in first) is (false_publish == "0.999")
    report(f"{tp_size} ranks, rate {false_publish}: {published} of {len(scored)} published")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_policy_sees_what_learning_costs(
    share: float, serve: Any, decode: Decode, report: Callable[[str], None]
) -> None:
    """``earned`` beside the guard that scores, which are the defaults: it makes trials, and no more of them than it may.
    The guard's pauses are short, as the answers are."""
    policy = f"adapt.policy={{kind: earned, rounds: 4, trial_updates: 2, explore_share: {share}}}"
    served = serve("eagle3", policy, "adapt.guard={kind: shadow, check_rounds: 1}")
    assert tokens(served.answers) == tokens(plainly(decode))
    assert not served.of("failure")
    updates, judged = len(served.of("update")), len(served.of("verdict"))
    assert (updates > 20) if share else (updates < 10)
    assert judged >= updates
    report(
        f"a share of {share} for trials: {updates} updates, {len(served.of('publication'))} served"
    )


@pytest.mark.parametrize("max_queued", [0, 100])
def test_a_policy_sees_who_waits(max_queued: int, serve: Any) -> None:
    """With two places for four requests, ``slack`` holds back until the last has found one."""
    served = serve(
        "eagle3", "adapt.policy.kind=slack", f"adapt.policy.max_queued={max_queued}",
        "adapt.policy.budget_ms=1000", "adapt.policy.max_time_share=1", max_running_requests=2,
    )  # fmt: skip
    order = [
        event["row"]["request_id"] if event["kind"] == "round" else event["kind"]
        for event in served.events
    ]
    last_begins = max(order.index(name) for name in names(shifted()))
    assert order.count("update") > 4
    assert ("update" in order[:last_begins]) == (max_queued > 0)


SERVED = ("adapt.policy.rounds=4", "adapt.loss.rows=accepted", "adapt.replay.window=1024")


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("how", ["whole", "in pieces, one aborted", "cached, some retracted"])
def test_the_draft_replays_what_sglang_served(
    kind: str, how: str, serve: Any, decode: Decode, report: Callable[[str], None]
) -> None:
    """The trainer's draft, given what the taps kept, drafts the very tokens that SGLang's did: a row,
    feature or position out of place shows at once. Rows of a cached prefix were not seen with their
    request, so a draft that looks back at them can only come near."""
    settings: dict[str, Any] = {
        "whole": {},
        "in pieces, one aborted": {"chunked_prefill_size": 24, "more": {"abort": (2, 40)}},
        "cached, some retracted": {"more": {"passes": 2}, "retract": True},
    }[how]
    served = serve(kind, *SERVED, fault="fidelity", **settings)
    plain = plainly(decode)
    for number, (answer, expected) in enumerate(zip(served.answers, plain, strict=True)):
        length = min(len(answer["tokens"]), len(expected["tokens"]))
        assert length, number
        assert answer["tokens"][:length] == expected["tokens"][:length], number
    assert not served.of("failure")
    assert not served.of("publication")
    results = [event["result"] for event in served.of("update")]
    rows = sum(result["num_rows"] for result in results)
    wrong, missed, agreed, whole = (
        sum(counts) for counts in zip(*(result["losses"] for result in results), strict=True)
    )
    report(
        f"{kind}, {how}: of {rows} drafted tokens {missed:.0f} missed, {wrong:.0f} of the "
        f"{whole:.0f} whose request was seen whole; teacher {agreed / rows:.2f}"
    )
    assert whole > 100
    assert wrong == 0
    assert missed < rows / 2
    if how == "cached, some retracted":
        assert max(answer["cached"] for answer in served.answers) > 20
        assert sum(answer["retracted"] for answer in served.answers) > 3
