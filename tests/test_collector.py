"""From what a worker inside SGLang saw to rounds: order, places in the text, who has finished."""

from __future__ import annotations

from dataclasses import replace

from cosched.engines.sglang.worker.collector import Prompt, RoundCollector
from cosched.records import RoundRow, VerifyRound
from tests.helpers.verified import WIDTH, K, prompt, verified


def texts(rounds: list[VerifyRound]) -> list[tuple[str, int, list[int]]]:
    return [(s.request_id, s.start, s.tokens_R1.tolist()) for r in rounds for s in r.segments]


def test_segments_say_at_which_temperature_their_request_samples() -> None:
    """That of the prompt's and of each round's, so that a request let into the buffer late has its own."""
    collector = RoundCollector()
    greedy, warm = prompt("a", 0, 4, 4), replace(prompt("b", 0, 3, 3), temperature=0.7)
    greedy = replace(greedy, temperature=0.0)
    collector.prefilled((greedy, warm))
    collector.verified(verified("a", "b"))
    rounds = list(collector.counted([1, 1]))
    assert [s.temperature for s in rounds[-1].segments] == [0.0, 0.7]


def test_rounds_come_in_order_and_go_on_where_the_text_is() -> None:
    """Counts arrive later than what they count; chunks of a prompt come before its first round."""
    rows: list[RoundRow] = []
    collector = RoundCollector(rows.append)
    collector.prefilled((prompt("a", 0, 4, 6), prompt("b", 0, 3, 3)))
    collector.prefilled((prompt("a", 4, 2, 6),))
    collector.verified(verified("a", "b", anchor=6))
    collector.verified(verified("a", "b", anchor=9))
    first = list(collector.counted([2, 0]))
    assert texts(first) == [
        ("a", 0, [0, 1, 2, 3, 4]),
        ("b", 0, [0, 1, 2, 3]),
        ("a", 4, [4, 5, 6]),
        ("a", 6, [6, 7, 8, 9]),  # two drafts stood, and one token more
        ("b", 3, [6, 7]),
    ]
    second = list(collector.counted([3, 1]))
    assert texts(second) == [("a", 9, [9, 10, 11, 12, 13]), ("b", 4, [9, 10, 11])]
    (round_,) = second
    assert round_.num_committed == 6
    assert (round_.draft_seconds, round_.verify_seconds, round_.num_running) == (0.25, 0.5, 2)
    assert [block.path_K.tolist() for block in round_.blocks] == [[10, 11, 12]] * 2
    assert round_.blocks[1].teacher_KX is not None
    assert round_.blocks[1].teacher_KX.shape == (K, WIDTH)
    places = [(row.request_id, row.position, row.num_accepted, row.num_committed) for row in rows]
    assert places == [("a", 1, 2, 3), ("b", 1, 0, 1), ("a", 4, 3, 4), ("b", 2, 1, 2)]


def test_a_request_that_is_gone_leaves_the_others_in_place() -> None:
    """With overlapped scheduling one round more of it is under way; it is counted out once."""
    collector = RoundCollector()
    collector.prefilled((prompt("a", 0, 2, 2), prompt("b", 0, 5, 5)))
    collector.verified(verified("a", "b"))
    collector.verified(verified("a", "b"))
    list(collector.counted([1, 1]))
    collector.finish("a")
    collector.finish("a")
    (round_,) = collector.counted([3, 0])
    assert [block.request_id for block in round_.blocks] == ["b"]
    assert round_.finished == ("a",)
    collector.verified(verified("b"))
    (later,) = collector.counted([0])
    assert (later.finished, later.segments[0].start) == ((), 8)


def test_a_request_that_is_run_again_starts_where_its_cache_ends() -> None:
    """Retracted, and prefilled with what it had said so far."""
    collector = RoundCollector()
    collector.prefilled((prompt("a", 0, 4, 4),))
    collector.verified(verified("a"))
    list(collector.counted([2]))
    collector.prefilled((prompt("a", 3, 4, 4),))
    collector.verified(verified("a"))
    rounds = list(collector.counted([0]))
    assert [(name, start) for name, start, _ in texts(rounds)] == [("a", 3), ("a", 7)]


def test_unwatched_rounds_are_counted_and_hold_nothing() -> None:
    collector = RoundCollector()
    collector.prefilled((Prompt("a", 0, 4, 4, None),))
    collector.verified(verified("a", watched=False))
    prefill, round_ = collector.counted([1])
    assert prefill.segments == round_.segments == ()
    assert round_.num_committed == 2
    assert round_.blocks[0].teacher_KX is None


def test_a_round_says_how_much_is_left_and_who_waits() -> None:
    """What policies plan with; where one request has no limit, nobody knows."""
    collector = RoundCollector()
    collector.num_queued = 5
    a, b = prompt("a", 0, 4, 4), prompt("b", 0, 5, 5)
    collector.prefilled((replace(a, max_length=14), replace(b, max_length=7)))
    collector.verified(verified("a", "b"))
    prefill, round_ = collector.counted([2, 0])
    assert (prefill.tokens_left, round_.tokens_left) == (9 + 1, 6 + 0)
    assert round_.num_queued == 5
    collector.prefilled((prompt("c", 0, 4, 4),))
    collector.verified(verified("a", "c"))
    *_, last = collector.counted([0, 0])
    assert last.tokens_left is None


def test_a_prompt_that_nothing_follows_is_dropped_and_its_neighbours_stay() -> None:
    """One that ends with its prompt is drafted for at most in a round that was under way."""
    collector = RoundCollector()
    collector.prefilled((prompt("a", 0, 4, 4), prompt("b", 0, 3, 3)))
    collector.prefilled((prompt("c", 0, 2, 2),))
    collector.verified(verified("a", "b", "c"))
    assert collector.requests == {"a", "b", "c"}
    collector.finish("a")
    collector.finish("c")
    assert collector.requests == {"b"}
    rounds = list(collector.counted([1, 1, 1]))
    assert [name for name, _, _ in texts(rounds)] == ["b", "b"]
    assert [block.request_id for block in rounds[-1].blocks] == ["b"]
    assert not any(round_.finished for round_ in rounds)
    assert not collector.idle().finished
    collector.finish("b")
    last = collector.idle()
    assert (last.finished, last.blocks, last.num_running) == (("b",), (), 0)
    assert not collector.idle().finished


def test_counts_go_to_the_round_that_they_are_of() -> None:
    """By order alone, one round whose counts never came shifted all that followed: each was taught with
    the acceptance of another. What was lost ends its requests, whose places are not known any more."""
    collector = RoundCollector()
    collector.prefilled((prompt("a", 0, 4, 4), prompt("b", 0, 3, 3)))
    collector.verified(verified("a", iteration=7))  # never counted
    collector.verified(verified("b", iteration=8))
    rounds = list(collector.counted([2], iteration=8))
    assert [block.request_id for round_ in rounds for block in round_.blocks] == ["b"]
    assert rounds[-1].blocks[0].num_accepted == 2
    assert [name for round_ in rounds for name in round_.finished] == ["a"]
    assert list(collector.counted([1], iteration=9)) == []  # of one that nobody watched
    collector.verified(verified("b", iteration=10))
    assert list(collector.counted([1], iteration=9)) == []
    (last,) = collector.counted([1], iteration=10)
    assert last.segments[0].start == 6
