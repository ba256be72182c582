"""Publication: new draft weights into the serving parameters' own storage, proven by checksums."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cosched.errors import PublicationError
from cosched.records import WeightVersion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """64-bit checksum of names, shapes, dtypes and every bit of the values, in hexadecimal.

    Each row of a tensor is folded on its device; the folds are hashed in order on the host, so a
    changed bit shows, and so does a row in the wrong place.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        bits = tensor.detach().view(_BITS[tensor.element_size()])
        folds = torch.hash_tensor(bits, dim=-1) if bits.ndim > 1 else bits
        digest.update(folds.cpu().contiguous().numpy().tobytes())  # host waits for the device
    return digest.hexdigest()[:16]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class InPlacePublisher:
    """Copies weights into the serving draft and proves that nothing else changed.

    A publication copies into the same storage (CUDA graphs keep their pointers), then compares the
    draft's checksum with the candidate's. Of the target it checks that no tensor was written to
    since the start, and on every ``target_check_every``-th publication (0: never) the checksum of
    all its bits. If anything is wrong the draft's last good weights are put back and an error is
    raised.
    """

    def __init__(
        self,
        serving: nn.Module,
        target: nn.Module,
        target_check_every: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.version = 0
        self._serving = dict(serving.named_parameters())
        self._target = target
        self._target_check_every = target_check_every
        self._clock = clock
        shared = {p.data_ptr() for p in target.parameters()}
        aliases = [name for name, p in self._serving.items() if p.data_ptr() in shared]
        if aliases:
            raise PublicationError(
                f"the draft's {', '.join(aliases)} are the target's own storage; publishing them "
                f"would change what the target says"
            )
        self.target_checksum = self._checksum_of_target()
        self._target_writes = self._writes_to_target()
        self._last_good = {name: p.detach().clone() for name, p in self._serving.items()}

    def _checksum_of_target(self) -> str:
        return checksum(dict(self._target.state_dict()))

    def _writes_to_target(self) -> list[int]:
        """How often each tensor was written in place, as autograd counts it: free to ask."""
        return [p._version for p in self._target.parameters()]

    def resume(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Serve the weights of an earlier run under the version they had."""
        self.publish(weights)
        self.version = version

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor]) -> WeightVersion:
        """Serve ``weights`` from now on; parameters that it does not name stay.

        Raises:
            PublicationError: a name or shape is foreign, or a checksum is wrong (then undone).
        """
        started = self._clock()
        for name, new in weights.items():
            if name not in self._serving or self._serving[name].shape != new.shape:
                raise PublicationError(
                    f"the serving draft has no {name} of shape {list(new.shape)}"
                )
        expected = checksum(
            {
                name: weights[name].to(old.dtype) if name in weights else old
                for name, old in self._serving.items()
            }
        )
        for name, new in weights.items():
            self._serving[name].copy_(new)
        every = self._target_check_every
        checks_target = every > 0 and (self.version + 1) % every == 0
        self._prove(expected, checks_target)
        for name in weights:
            self._last_good[name].copy_(self._serving[name])
        self.version += 1
        return WeightVersion(
            version=self.version,
            draft_checksum=expected,
            target_checksum=self.target_checksum if checks_target else None,
            seconds=self._clock() - started,
        )

    def _prove(self, expected: str, checks_target: bool) -> None:
        wrong = ""
        if (found := checksum(self._serving)) != expected:
            wrong = f"the draft's checksum is {found}, not {expected}"
        elif self._writes_to_target() != self._target_writes:
            wrong = "a tensor of the target was written to"
        elif checks_target and (found := self._checksum_of_target()) != self.target_checksum:
            wrong = f"the target's checksum became {found}, it was {self.target_checksum}"
        if not wrong:
            return
        for name, old in self._last_good.items():
            self._serving[name].copy_(old)
        raise PublicationError(f"publication {self.version + 1} undone: {wrong}")
