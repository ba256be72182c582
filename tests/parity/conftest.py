"""What must be said before the peers are imported, and the target that all drafts are for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.parity import shims

if TYPE_CHECKING:
    from pathlib import Path

    from cosched.engines.embedded.target import Target

# One thread: small tensors, and the same order of summation on every machine. No torch.compile,
# which some peers ask for at import. Triton kernels run as Python. SGLang takes its CPU paths.
os.environ.update(
    OMP_NUM_THREADS="1",
    TORCHDYNAMO_DISABLE="1",
    TRITON_INTERPRET="1",
    SGLANG_USE_CPU_ENGINE="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    THP_MEM_ALLOC_ENABLE="1",
)
shims.install()


@pytest.fixture(scope="session")
def target() -> Target:
    from tests.parity.world import make_target

    return make_target()


@pytest.fixture(scope="session")
def target_folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target in transformers' format, for peers that want its embedding or its shape."""
    folder = tmp_path_factory.mktemp("target")
    target.model.save_pretrained(folder)
    return folder
