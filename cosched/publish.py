"""Publication: new draft weights into the serving parameters' own storage, proven by checksums."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cosched.errors import PublicationError
from cosched.records import WeightVersion


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Order-independent 64-bit checksum of names, shapes, dtypes and every bit of the values."""
    total = 0
    for name, tensor in tensors.items():
        bits = int(torch.hash_tensor(_as_bits(tensor)).item())  # host waits for the device
        total ^= hash_words(name, str(tensor.dtype), str(list(tensor.shape)), str(bits))
    return f"{total:016x}"


def hash_words(*words: str) -> int:
    """64 bits of SHA-256 over the words, the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8], "big")


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_bits(tensor: Tensor) -> Tensor:
    """The values as integers that depend on their place, so that a swap shows too."""
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()]).to(torch.int64)
    return bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)


class InPlacePublisher:
    """Copies weights into the serving draft and proves that nothing else changed.

    Every publication copies under the same storage (CUDA graphs keep their pointers), compares the
    draft's checksum with the candidate's, and the target's with what it was at the start. If
    either differs the draft's last good weights are put back and an error is raised.
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
        self._target_checksum = self._checksum_of_target()
        self._last_good = {name: p.detach().clone() for name, p in self._serving.items()}

    def _checksum_of_target(self) -> str:
        return checksum(dict(self._target.state_dict()))

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor]) -> WeightVersion:
        """Serve ``weights`` from now on; parameters that it does not name stay.

        Raises:
            PublicationError: a name or shape is foreign, or a checksum is wrong (then undone).
        """
        started = self._clock()
        for name, new in weights.items():
            if name not in self._serving or self._serving[name].shape != new.shape:
                raise PublicationError(f"the serving draft has no {name} of shape {list(new.shape)}")
        expected = checksum(
            {
                name: weights[name].to(old.dtype) if name in weights else old
                for name, old in self._serving.items()
            }
        )
        for name, new in weights.items():
            self._serving[name].copy_(new)
        self._prove(expected)
        for name in weights:
            self._last_good[name].copy_(self._serving[name])
        self.version += 1
        return WeightVersion(
            version=self.version,
            draft_checksum=expected,
            target_checksum=self._target_checksum if self._checks_target else None,
            seconds=self._clock() - started,
        )

    @property
    def _checks_target(self) -> bool:
        return bool(self._target_check_every) and self.version % self._target_check_every == 0

    def _prove(self, expected: str) -> None:
        found = checksum(self._serving)
        wrong = f"the draft's checksum is {found}, not {expected}" if found != expected else ""
        if self._checks_target and (now := self._checksum_of_target()) != self._target_checksum:
            wrong = f"the target's checksum became {now}, it was {self._target_checksum}"
        if not wrong:
            return
        for name, old in self._last_good.items():
            self._serving[name].copy_(old)
        raise PublicationError(f"publication {self.version + 1} undone: {wrong}")
