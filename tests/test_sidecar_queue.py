"""Shared memory and the queue of rounds: bounded, and what is dropped is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from cosched.records import IDLE_TICK, VerifyRound
from cosched.sidecar.queue import RoundQueue
from cosched.sidecar.rows import Packer, unpack
from cosched.sidecar.slots import Slots, mapped
from cosched.sidecar.wire import FrameError
from tests.helpers.sidecar_rows import FORM, VOCAB, make_queue, make_round


def test_shared_memory_is_seen_by_who_maps_it() -> None:
    """Bytes that the one writes the other reads, in the slot that they are in."""
    slots = Slots("me", 3, 100)
    seen = mapped(slots.memory, 1 << 20)
    assert seen is not None
    slots.tensors[2][:4] = torch.arange(4, dtype=torch.uint8)
    assert seen[2][:4].tolist() == [0, 1, 2, 3]
    assert not seen[1].any()


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"name": "another"}, False),
        ({"pid": 1 << 29}, False),
        ({"descriptor": 1 << 19}, False),
        ({"slots": 4}, True),
        ({"slot_bytes": 1 << 40}, True),
    ],
)
def test_memory_that_is_not_what_is_said_is_not_mapped(
    change: dict[str, Any], refused: bool
) -> None:
    """Another process's file is left alone; a wrong size would end the trainer with a bus error."""
    slots = Slots("me", 3, 100)
    memory = msgspec.structs.replace(slots.memory, **change)
    if refused:
        with pytest.raises(FrameError):
            mapped(memory, 1 << 20)
    else:
        assert mapped(memory, 1 << 20) is None


def test_the_oldest_round_goes_where_there_is_no_room_and_its_end_is_not_forgotten() -> None:
    """Four slots, six rounds: two are dropped and counted; a request that ended in one of them has ended."""
    queue = make_queue(slots=4)
    for number in range(6):
        queue.put(make_round(name=f"r{number}", finished=number == 0), version=0)
    assert queue.dropped == 2
    names: list[tuple[str, ...]] = []
    while (found := queue.next()) is not None:
        message, bytes_ = found
        names.append((*(one.request_id for one in message.segments), *message.finished))
        assert unpack(message, bytes_, FORM, VOCAB, "me")
    assert names == [("r2",), ("r3",), ("r4", "r0"), ("r5",)]


def test_a_trainer_that_answers_nothing_has_the_rows_that_it_was_given() -> None:
    """What was sent may be being read: its slots are not written to until that is answered."""
    queue = make_queue(slots=2)
    for number in range(2):
        queue.put(make_round(name=f"r{number}"), version=0)
    first, bytes_ = queue.next() or pytest.fail("nothing waits")
    assert queue.next() is not None
    before = bytes_.clone()
    queue.put(make_round(rows=3), version=0)
    assert (queue.dropped, queue.next()) == (1, None)
    assert torch.equal(bytes_, before)
    queue.answered(first.number)
    queue.put(make_round(rows=3), version=0)
    assert queue.next() is not None


def test_all_begins_anew_in_other_memory() -> None:
    """A trainer that hung reads on in the old one, under a name that nobody has any more."""
    queue = make_queue()
    queue.put(make_round(), version=0)
    old, (_, bytes_) = queue.memory, queue.next() or pytest.fail("nothing waits")
    before = bytes_.clone()
    queue.begin_anew()
    queue.put(make_round(rows=3), version=0)
    assert queue.memory.name != old.name
    assert queue.dropped == 1
    assert torch.equal(bytes_, before)


def test_a_round_that_no_slot_holds_is_dropped() -> None:
    """It cannot be waited for until there is room."""
    queue = RoundQueue(Packer(FORM, 1 << 20, with_blocks=True), 4, 4096)
    queue.put(make_round(rows=4000), version=0)
    assert (queue.dropped, queue.next()) == (1, None)
    queue.put(IDLE_TICK, version=0)
    assert queue.next() is not None


def test_a_prefill_of_more_prompts_than_a_slot_holds_goes_prompt_by_prompt() -> None:
    """A busy server's prompts are run together, and none of those came to the trainer; its time and
    what ended in it are told once."""
    queue = make_queue(slots=32)
    whole = make_round(rows=8)
    names = [f"r{number}" for number in range(20)]
    segments = tuple(replace(whole.segments[0], request_id=name) for name in names)
    queue.put(replace(whole, segments=segments, blocks=(), finished=("r1",)), version=3)
    assert queue.dropped == 0
    read: list[VerifyRound] = []
    while (found := queue.next()) is not None:
        read.append(unpack(*found, FORM, VOCAB, "me"))
        assert found[0].version == 3
    assert [[one.request_id for one in round_.segments] for round_ in read] == [
        [f"me/{name}"] for name in names
    ]
    assert [round_.finished for round_ in read] == [()] * 19 + [("me/r1",)]
    assert sum(round_.verify_seconds for round_ in read) == whole.verify_seconds
    for round_ in read:
        assert torch.equal(round_.segments[0].tokens_R1, whole.segments[0].tokens_R1)
