"""What handing rows to a side-car costs: 512 rows of Qwen3-8B with EAGLE-3's features, on this machine.

    python benchmarks/bench_sidecar.py

No model is run. A server's queue and link give rounds of 512 rows in bfloat16 (features 3 x 4096, hidden states
4096: 16.8 MB) to a trainer's socket in a second process, which does with them what the service does: reads
them and collects them into a replay buffer. Shown are, as medians and 90th percentiles,
    copied    what decoding waits for: the copy into the queue
    there     from the begin of that copy until the trainer's answer has come back, the rows being collected
once through shared memory and once through the socket, with a key and without.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cosched.loop.replay import ReplayBuffer, ReplayLimits
from cosched.records import Segment, VerifyRound
from cosched.sidecar.link import Link, Serving, as_tensor
from cosched.sidecar.messages import FromServer, Hello, Rounds, RowForm, Taken, Welcome
from cosched.sidecar.queue import RoundQueue
from cosched.sidecar.rows import Packer, size_of, unpack
from cosched.sidecar.slots import mapped
from cosched.sidecar.sockets import listening
from cosched.sidecar.wire import Codec

ROWS, HIDDEN, LAYERS, VOCAB = 512, 4096, 3, 151_936
FORM = RowForm(LAYERS * HIDDEN, HIDDEN, "bfloat16", "bfloat16")
ROUNDS, WARM = 60, 10


def make_buffer() -> ReplayBuffer:
    row = HIDDEN * 2
    limits = ReplayLimits(ROWS, 32, 3, 1 << 20, 1 << 30, LAYERS * row, row)
    return ReplayBuffer(limits, "delayed", None)


def trainer(address: str, key: bytes | None, shares: bool) -> None:
    """Welcome one server and collect its rounds, until it is killed."""
    torch.set_num_threads(1)
    socket, codec = listening(address, size_of(ROWS, FORM)), Codec[Any](key, FromServer)
    buffer, slots = make_buffer(), None
    while True:
        identity, *frames = socket.recv_multipart(copy=False)
        message, payload = codec.decode([frame.buffer for frame in frames])
        if isinstance(message, Hello):
            assert message.memory is not None
            name, slots = message.server, mapped(message.memory, 1 << 40) if shares else None
            answer = Welcome(to=name, trainer="t", shared=slots is not None)
        elif isinstance(message, Rounds):
            bytes_ = (
                as_tensor(payload) if slots is None else slots[message.slot or 0][: message.size]
            )
            buffer.collect(unpack(message, bytes_, FORM, VOCAB, "s"))
            answer = Taken(
                to=name, number=message.number, version=0, updates=0, skipped_steps=0, loss=None
            )
        else:
            continue
        socket.send_multipart([identity.bytes, *codec.encode(answer)])


def make_round(start: int) -> VerifyRound:
    segment = Segment(
        "request",
        start,
        torch.randint(VOCAB, (ROWS + 1,)),
        torch.randn(ROWS, LAYERS * HIDDEN).bfloat16(),
        torch.randn(ROWS, HIDDEN).bfloat16(),
    )
    return VerifyRound((segment,), (), (), 0.0, 0.0, 1)


def measure(key: bytes | None, shares: bool) -> tuple[list[float], list[float]]:
    """Milliseconds of each round: copied, and there."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{Path(folder) / 's'}"
        process = multiprocessing.get_context("spawn").Process(
            target=trainer, args=(address, key, shares), daemon=True
        )
        process.start()
        queue = RoundQueue(Packer(FORM, ROWS, with_blocks=False), 16, size_of(ROWS, FORM))
        hello = Hello(
            server="", draft="", settings={}, window=None, acceptance="", num_draft_tokens=3,
            form=FORM, version=0, checksum="", as_loaded=True,
        )  # fmt: skip
        link = Link(address, key, hello, queue, {}, Serving(0, "", True, dict), 60.0)
        rounds = [make_round(number * ROWS) for number in range(4)]
        copied: list[float] = []
        there: list[float] = []
        for number in range(ROUNDS + WARM):
            started = time.perf_counter()
            link.offer(rounds[number % 4], 0)
            copied.append(1000 * (time.perf_counter() - started))
            while link.taken is None or link.taken.number <= number:
                time.sleep(0.0001)
            there.append(1000 * (time.perf_counter() - started))
        link.close()
        process.kill()
        process.join()
    return copied[WARM:], there[WARM:]


def main() -> None:
    torch.set_num_threads(1)
    print(f"{ROWS} rows, {size_of(ROWS, FORM) / 1e6:.1f} MB a slot; ms: median (90th percentile)")
    for key, named in ((None, "no key"), (b"k" * 32, "key")):
        for shares, way in ((True, "shared memory"), (False, "socket")):
            figures = [
                f"{statistics.median(one):.2f} ({statistics.quantiles(one, n=10)[-1]:.2f})"
                for one in measure(key, shares)
            ]
            print(f"{way:14} {named:7} copied {figures[0]:16} there {figures[1]}")


if __name__ == "__main__":
    main()
