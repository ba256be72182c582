"""PARD in SGLang itself: lossless, of use, and drafting what our own engine drafts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.serving import (
    Answers,
    Decode,
    accept_length,
    embedded,
    prompts,
    rounds,
    tokens,
)

ABORTED = 2

pytestmark = pytest.mark.sglang


def texts() -> list[list[int]]:
    """Prompts of different lengths, one of a single token; twice as long as a round, and shorter."""
    lengths = [None, 1, 5, 64, None, 100]
    return [text[:length] for text, length in zip(prompts(), lengths, strict=True)]


@pytest.fixture(scope="module")
def plugins(server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A search path on which the algorithm is found too, by an entry point as cosched's own are."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "frozen_pard-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: frozen_pard\nVersion: 0\n")
    entry = "[sglang.srt.plugins]\nfrozen_pard = tests.sglang.frozen_pard:register\n"
    (metadata / "entry_points.txt").write_text(entry)
    return os.pathsep.join([str(site), server_environment["PYTHONPATH"]])


@pytest.fixture
def serve(decode: Decode, plugins: str) -> Callable[..., Answers]:
    def run(
        num_steps: int = 3, variables: dict[str, str] | None = None, **settings: Any
    ) -> Answers:
        return decode(
            "float32",
            "COSCHED_PARD",
            "pard",
            texts=texts(),
            variables={"PYTHONPATH": plugins, **(variables or {})},
            num_steps=num_steps,
            **settings,
        )

    return run


@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_pard_changes_the_speed_and_not_the_text_and_drafts_as_the_embedded_engine(
    decode: Decode,
    serve: Callable[..., Answers],
    report: Callable[[str], None],
    num_steps: int,
) -> None:
    """A wrong slot, position or mask token costs acceptance before it costs anything else, so the
    number of rounds of every request is the sharp statement: our own engine counts the same."""
    plain = decode("float32", texts=texts())
    served = serve(num_steps)
    own = embedded("pard", texts(), num_steps)
    assert tokens(served) == tokens(plain)
    assert tokens(own) == tokens(plain)
    report(
        f"COSCHED_PARD, K = {num_steps}: accept length {accept_length(served):.2f}, "
        f"rounds in SGLang {rounds(served)}, embedded {rounds(own)}"
    )
    assert accept_length(served) > 1.3  # an untrained draft has 1.0
    assert rounds(served) == rounds(own)


def test_prompts_in_pieces_and_out_of_the_cache_change_nothing(
    serve: Callable[..., Answers],
) -> None:
    """The draft's cache is filled piece by piece, and shared with a later request of that prompt.

    SGLang takes ``enable_mixed_chunk`` back for this algorithm, as for STANDALONE.
    """
    whole = serve()
    pieces = serve(engine={"chunked_prefill_size": 24, "enable_mixed_chunk": True})
    assert tokens(pieces) == tokens(whole)
    assert rounds(pieces) == rounds(whole)
    again = serve(passes=2)
    assert [answer["cached"] for answer in again] == [max(len(t) - 1, 0) for t in texts()]
    assert tokens(again) == tokens(whole)
    assert rounds(again) == rounds(whole)


def test_an_abort_leaves_the_other_requests_alone(serve: Callable[..., Answers]) -> None:
    """A batch is filtered in the middle of the rounds of its requests."""
    whole, cut = serve(), serve(abort=(ABORTED, 20))
    assert 20 <= len(cut[ABORTED]["tokens"]) < 10 * len(whole[ABORTED]["tokens"])
    cut, whole = ([a for i, a in enumerate(each) if i != ABORTED] for each in (cut, whole))
    assert tokens(cut) == tokens(whole)
    assert rounds(cut) == rounds(whole)


def test_retraction_leaves_the_text_alone(serve: Callable[..., Answers]) -> None:
    """Requests lose their cache in the middle, and are prefilled again with what they have."""
    variables = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    retracted = serve(variables=variables)
    assert sum(answer["retracted"] for answer in retracted) > 3
    assert tokens(retracted) == tokens(serve())


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_captured_pass_is_the_eager_one(
    serve: Callable[..., Answers], report: Callable[[str], None], tmp_path: Path, num_steps: int
) -> None:
    """In SGLang's buffers, padded to a batch that was captured: the same logits, so the same drafts and
    the same rounds. Rows of unlike numbers are summed in unlike order: 1e-4 is ten times what is seen."""
    log = tmp_path / "replays"
    eager = serve(num_steps)
    captured = serve(num_steps, variables={"COSCHED_TEST_GRAPHS": str(log)})
    assert tokens(captured) == tokens(eager)
    assert rounds(captured) == rounds(eager)
    replays = [line.split() for line in log.read_text().splitlines()]
    sizes = {(int(captured), int(own)) for captured, own, _ in replays}
    apart = max(float(difference) for *_, difference in replays)
    report(f"K = {num_steps}: {len(replays)} replays of {sorted(sizes)}, logits {apart:.1e} apart")
    assert {captured for captured, _ in sizes} == {2, 4}
    assert any(own < captured for captured, own in sizes)
    assert len(replays) >= max(rounds(eager))
    assert apart < 1e-4
