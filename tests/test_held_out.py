"""Rows that no update has had: what is held out, given as evidence, and trained later."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.records import SignalBatch
from tests.helpers.rounds import ROW, numbered_round


@settings(max_examples=100, deadline=None)
@given(
    st.lists(ROW, max_size=40),
    st.integers(12, 30),
    st.integers(1, 5),
    st.sampled_from(["delayed", "accepted", "all"]),
)
def test_what_is_held_out_was_in_no_sample(steps, window, held_out, rows) -> None:
    """No row of a held-out path has been trained before, whatever arrives; rows name their place."""
    buffer = ReplayBuffer(
        ReplayLimits(window, 8, 2, 1000, 1 << 20, 12, 12), rows, None, held_out=held_out
    )
    ends: dict[int, int] = {}
    trained: set[float] = set()
    for request, count, teacher, finished, gap in steps:
        start = ends.get(request, 1000 * request) + (7 if gap else 0)
        ends[request] = start + count
        buffer.collect(numbered_round(request, start, count, teacher, finished))
        if finished:
            ends[request] += 100  # its name is used again, and its places are not
        sample = buffer.sample()
        trained |= places(sample)
        out = places(buffer.held_out(held_out))
        assert not out & trained
        if sample is not None and rows == "delayed":
            assert out  # what is trained can be judged


def places(batch: SignalBatch | None) -> set[float]:
    if batch is None:
        return set()
    return set(batch.teacher_RNKX[..., 0][batch.weights_RNK > 0].tolist())


def test_held_out_rows_are_the_newest_and_are_taught_later() -> None:
    """Nothing is lost: the rows that judge an update are in the sample of the next one."""
    buffer = ReplayBuffer(
        ReplayLimits(64, 100, 2, 1000, 1 << 20, 12, 12), "delayed", None, held_out=4
    )
    buffer.collect(numbered_round(0, 0, 20, True, False))
    first = places(buffer.sample())
    assert places(buffer.held_out(4)) == {15.0, 16.0, 17.0, 18.0, 19.0}
    assert first == set(map(float, range(1, 15)))
    buffer.collect(numbered_round(0, 20, 20, True, False))
    assert places(buffer.held_out(100)) == set(map(float, range(15, 40)))
    assert places(buffer.sample()) == set(map(float, range(1, 35)))


def test_evidence_is_given_once() -> None:
    """Rows that have judged a draft do not judge again; to look into a fall they still do."""
    buffer = ReplayBuffer(
        ReplayLimits(64, 100, 2, 1000, 1 << 20, 12, 12), "delayed", None, held_out=8
    )
    buffer.collect(numbered_round(0, 0, 20, True, False))
    buffer.sample()
    assert buffer.held_out(8, once=True, at_least=9) is None  # and nothing has been given by it
    assert anchors(buffer.held_out(8, once=True, at_least=8)) == list(range(11, 19))
    assert buffer.held_out(8, once=True) is None
    assert anchors(buffer.held_out(8)) == list(range(11, 19))
    buffer.collect(numbered_round(0, 20, 3, True, False))
    assert anchors(buffer.held_out(8, once=True)) == [19, 20, 21]


def anchors(batch: SignalBatch | None) -> list[int]:
    assert batch is not None
    return (batch.starts_R[0] + batch.anchors_RN[0]).tolist()
