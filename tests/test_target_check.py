"""That the target stays as it is: each publication reads a slice of it, and some of them all of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from cosched.errors import PublicationError
from cosched.loop import publish
from cosched.loop.checksum import Folded, fold_together, sliced
from cosched.loop.publish import InPlacePublisher
from cosched.testing.harness import make_target
from tests.helpers.drafts import make_drafter

NEW = {"norm.weight": torch.full((32,), 0.5)}


def make_publisher(every: int) -> tuple[InPlacePublisher, dict[str, Tensor]]:
    """With the target whose tensors it looks at."""
    target = make_target(seed=9)
    network = make_drafter(target).network()
    publisher = InPlacePublisher.of_modules(network, target.model, target_check_every=every)
    return publisher, dict(target.model.state_dict())


def publications_until_found(publisher: InPlacePublisher, most: int) -> int:
    for number in range(1, most + 1):
        version = publisher.version
        with suppress(PublicationError):
            publisher.publish(NEW)
        if publisher.version == version:
            return number
    raise AssertionError(f"nothing was found in {most} publications")


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_bit_flipped_anywhere_is_found_in_time(every: int) -> None:
    """A write through ``.data``, which no counter sees, into any tensor of the target, at its begin, in
    its middle and at its end, is found within so many publications, whichever slice comes next."""
    publisher, tensors = make_publisher(every)
    took: list[int] = []
    for turn, tensor in enumerate(tensors.values()):
        bits = tensor.data.view(-1).view(torch.int32)
        for place in (0, len(bits) // 2, -1):
            publisher.publish(NEW)  # of a sound target
            bits[place] ^= 1 << turn % 31
            took.append(publications_until_found(publisher, every))
            bits[place] ^= 1 << turn % 31
    assert len(took) > 30
    assert (max(took) > 1) == (every > 1)  # a slice is not all of it
    for _ in range(every):
        publisher.publish(NEW)


def test_slices_have_all_rows_once_and_as_many_bytes() -> None:
    """To a row, whatever the shapes; of more slices than there are rows some have none."""
    tensors = {
        "a": torch.arange(40.0).view(10, 4),
        "none": torch.empty(0, 3),
        "b": torch.arange(7),
        "number": torch.tensor(3.0),
        "one row": torch.ones(1, 8),
    }
    for number in (1, 2, 3, 5, 100):
        parts = sliced(tensors, number)
        assert len(parts) == number
        rows = [(key, few) for part in parts for key, few in part.items()]
        for name, tensor in tensors.items():
            own = [few.flatten() for key, few in rows if key.startswith(f"{name} from")]
            assert torch.equal(torch.cat(own) if own else tensor.flatten(), tensor.flatten())
        share = sum(tensor.nbytes for tensor in tensors.values()) / number
        longest_row = 32
        for part in parts:
            assert sum(few.nbytes for few in part.values()) < share + longest_row + 1


def test_all_of_the_target_is_read_once_at_the_start_and_then_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was read twice, 16 GB each time, and then as a whole with every 16th publication."""
    sizes: list[int] = []

    def counted(tensors: Mapping[str, Tensor]) -> Folded:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        return fold_together(tensors)

    monkeypatch.setattr(publish, "fold_together", counted)
    publisher, tensors = make_publisher(4)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(sizes) == whole
    sizes.clear()
    for _ in range(4):
        publisher.publish(NEW)
    assert sum(sizes) == whole
    assert max(sizes) < whole / 3


def test_nothing_of_the_target_is_read_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "fold_together", lambda _tensors: pytest.fail("it was read"))
    publisher, _ = make_publisher(0)
    assert publisher.publish(NEW).target_checksum is None
