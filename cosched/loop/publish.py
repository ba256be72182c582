"""Publication: new draft weights into the serving parameters' own storage, proven by checksums."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cosched.errors import PublicationError
from cosched.loop.checksum import checksum, fold, fold_together, read, sliced
from cosched.loop.copies import Copies
from cosched.records import WeightVersion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from cosched.loop.checksum import Folded


@dataclass(frozen=True, slots=True)
class Serving:
    """The weights that serve, as their runtime holds them.

    ``draft`` names views of the runtime's own storage as the drafter's network names them;
    ``target`` is all that must never change. A runtime that shards gives ``share``, this process's
    part of a whole tensor, and ``agree``, whether all processes hold the same text. One that
    derives something from the draft's weights makes it anew in ``refresh``, and in ``as_loaded`` may
    take up again what it had derived from the weights as loaded, which serve then.
    """

    draft: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    share: Callable[[str, Tensor], Tensor] = lambda _name, whole: whole
    agree: Callable[[str], bool] | None = None
    refresh: Callable[[], None] = lambda: None
    as_loaded: Callable[[], None] = lambda: None


class InPlacePublisher:
    """Copies weights into the serving draft and proves that nothing else changed.

    A publication copies into the same storage (CUDA graphs keep their pointers), then compares the
    draft's checksum with the candidate's. Of the target it checks that no tensor was written to
    since the start, and the checksum of a slice of its bits, each time of the next one, so that
    ``target_check_every`` publications go through all of it (0: none does). For all checksums
    together it waits for the device once. If anything is wrong the
    draft's last good weights are put back and an error is raised. ``first`` are the draft's whole
    weights as loaded, which serve now; they and the newest ``keep`` versions can be served again.

    Raises:
        PublicationError: a tensor of the draft is the target's, or serves other weights than
            ``first``.
    """

    def __init__(
        self,
        serving: Serving,
        first: Mapping[str, Tensor],
        target_check_every: int = 1,
        keep: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.version = 0
        self._serving = serving
        self._first = first
        self._keep = keep
        self._clock = clock
        self._kept: dict[int, dict[str, Tensor]] = {}
        shared = {tensor.data_ptr() for tensor in serving.target.values()}
        aliases = [name for name, t in serving.draft.items() if t.data_ptr() in shared]
        if aliases:
            raise PublicationError(
                f"the draft's {', '.join(aliases)} are the target's own storage; publishing them "
                f"would change what the target says"
            )
        for name, tensor in serving.draft.items():
            if not torch.equal(tensor, self._part(name, first[name])):  # host waits for the device
                raise PublicationError(f"the serving draft's {name} is not that of its checkpoint")
        self._slices = sliced(serving.target, target_check_every) if target_check_every else []
        self.slice_checksums = read(*map(fold_together, self._slices))  # host waits for the device
        self._target_writes = self._writes_to_target()

    @classmethod
    def of_modules(
        cls,
        draft: nn.Module,
        target: nn.Module,
        target_check_every: int = 1,
        keep: int = 1,
        as_loaded: Callable[[], None] = lambda: None,
        agree: Callable[[str], bool] | None = None,
    ) -> InPlacePublisher:
        """For a draft and a target that are modules of this process, under their own names."""
        unchanging, own = dict(target.state_dict()), dict(draft.named_parameters())
        serving = Serving(own, unchanging, agree=agree, as_loaded=as_loaded)
        first = {name: p.detach().clone() for name, p in serving.draft.items()}
        return cls(serving, first, target_check_every, keep)

    @property
    def kept(self) -> tuple[int, ...]:
        """The versions that can be served again, beside the draft as loaded."""
        return tuple(sorted(self._kept))

    def target_checksum(self) -> str:
        """Of all of it, by which a later run knows it again; reads it through."""
        return checksum(self._serving.target)

    def draft_checksum(self) -> str:
        """Of the draft as it serves, as a publication tells it."""
        return checksum(self._serving.draft)

    @property
    def whole(self) -> Mapping[str, Tensor]:
        """Shapes and types of all tensors of the draft, of which this process may serve parts; no values."""
        return {
            name: torch.empty_like(self._first[name], dtype=own.dtype, device="meta")
            for name, own in self._serving.draft.items()
        }

    @property
    def served(self) -> Mapping[str, Tensor]:
        """The storage that serves, by the names that a publication has; nobody else writes to it."""
        return self._serving.draft

    def _writes_to_target(self) -> list[int]:
        """How often each tensor was written in place, as autograd counts it: free to ask."""
        return [tensor._version for tensor in self._serving.target.values()]

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """What this process serves of a whole tensor, in the serving type."""
        return self._serving.share(name, whole).to(self._serving.draft[name].dtype)

    def _whole(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of the draft with these weights, of which this process serves a part."""
        return {
            name: weights.get(name, self._first[name]).to(own.dtype)
            for name, own in self._serving.draft.items()
        }

    def state(self) -> dict[str, Tensor]:
        """The weights that serve, where they are not those loaded."""
        kept = self._kept.get(self.version, {})
        return {f"version.{self.version}.{name}": weight.clone() for name, weight in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Serve the weights of a ``state()`` under the version they had.

        Raises:
            PublicationError: the state has not that version.
        """
        if version == 0:
            return
        start = f"version.{version}."
        weights = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        if not weights:
            raise PublicationError(f"there are no weights of version {version} to go on with")
        self.publish(weights, version)

    def weights_of(self, version: int) -> Mapping[str, Tensor]:
        """The weights that every publication names, as they served under ``version``.

        Raises:
            PublicationError: it never served, or is no longer kept.
        """
        if version in self._kept:
            return self._kept[version]
        if version != 0:
            known = ", ".join(map(str, [0, *self._kept]))
            raise PublicationError(f"version {version} is not kept; there are {known}")
        return self._first

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor], version: int | None = None) -> WeightVersion:
        """Serve ``weights`` from now on; parameters that it does not name stay.

        They serve as the next version, or as that which somebody else has made of them.

        Raises:
            PublicationError: a name or shape is foreign, or a checksum is wrong (then undone).
        """
        started = self._clock()
        draft = self._serving.draft
        for name, new in weights.items():
            if name not in draft or self._first[name].shape != new.shape:
                raise PublicationError(
                    f"the serving draft has no {name} of shape {list(new.shape)}"
                )
        parts = {name: self._part(name, new) for name, new in weights.items()}
        expected = fold({name: parts.get(name, old) for name, old in draft.items()})
        _write(draft, parts)
        self._serving.refresh()
        number = self.version % len(self._slices) if self._slices else None
        draft_checksum = self._prove(weights, expected, number)
        if weights is self._first:
            self._serving.as_loaded()
        self.version = self.version + 1 if version is None else version
        self._remember(weights)
        return WeightVersion(
            version=self.version,
            draft_checksum=draft_checksum,
            target_checksum=None if number is None else self.slice_checksums[number],
            seconds=self._clock() - started,
        )

    def _remember(self, weights: Mapping[str, Tensor]) -> None:
        """Keep what serves now, in the storage of the version that is forgotten for it."""
        storage: dict[str, Tensor] = {}
        kept = sorted(self._kept)
        for version in kept[: max(0, len(kept) - self._keep + 1)]:
            storage = self._kept.pop(version)
        for name, new in weights.items():
            if name not in storage:
                storage[name] = torch.empty_like(new, dtype=self._serving.draft[name].dtype)
        _write(storage, weights)
        self._kept[self.version] = storage

    def _prove(self, weights: Mapping[str, Tensor], expected: Folded, number: int | None) -> str:
        """The checksum of the whole draft that serves now; ``number`` is the target's slice to look at.

        Raises:
            PublicationError: it is wrong, or the target was written to; the publication is undone.
        """
        serving = self._serving
        agree, folded = serving.agree, [expected, fold(serving.draft)]
        if agree is not None:
            folded.append(fold(self._whole(weights)))
        if number is not None:
            folded.append(fold_together(self._slices[number]))
        meant, found, *others = read(*folded)
        wrong = ""
        if found != meant:
            wrong = f"the draft's checksum is {found}, not {meant}"
        elif agree is not None and not agree(others[0]):
            wrong = "the ranks were given different weights"
        elif self._writes_to_target() != self._target_writes:
            wrong = "a tensor of the target was written to"
        elif number is not None and others[-1] != (was := self.slice_checksums[number]):
            part = f"part {number + 1} of {len(self._slices)} of the target"
            wrong = f"the checksum of {part} became {others[-1]}, it was {was}"
        if not wrong:
            return meant if agree is None else others[0]
        last_good = {**self._first, **self._kept.get(self.version, {})}
        _write(serving.draft, {name: self._part(name, last_good[name]) for name in weights})
        self._serving.refresh()
        raise PublicationError(f"publication {self.version + 1} undone: {wrong}")


def _write(storage: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    copies = Copies()
    for name, value in values.items():
        copies.add(storage[name], value)
    copies.make()
