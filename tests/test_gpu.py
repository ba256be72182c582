"""The same statements on a CUDA device; `benchmarks/gpu_check.sh` runs them."""

from __future__ import annotations

import pytest
import torch

from cosched.engines.embedded.request import GenerationRequest
from cosched.engines.embedded.target import Target
from cosched.registry import DRAFTERS
from cosched.testing.harness import (
    decode,
    make_coscheduler,
    make_engine,
    make_requests,
    make_target,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "pard"])
def test_greedy_equals_plain_on_cuda(kind: str, adapted: bool, max_batch: int) -> None:
    """Token for token in float32, with updates and publications on the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Target(make_target().model.to("cuda"))
    requests = [
        GenerationRequest(r.id, r.prompt_P.to("cuda"), r.max_new_tokens)
        for r in make_requests(target, count=4, prompt=7, new=256)
    ]
    plain = decode(make_engine(target, None, requests, max_batch), requests)
    drafter = next(iter(DRAFTERS.get(kind).examples(target, 3).values()))
    drafter.network().to("cuda").requires_grad_(False)
    drafter = drafter.clone(torch.float32)  # vocabulary maps are read where the weights are
    observer = make_coscheduler(target, drafter, every=10, lr=3e-3) if adapted else None
    engine = make_engine(target, drafter, requests, max_batch, observer=observer)
    before = target.checksum()
    assert decode(engine, requests) == plain
    assert target.checksum() == before
    if observer is not None:
        assert observer.version >= 10
