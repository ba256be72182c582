"""What of PARD a CPU server does not show: overlapped scheduling, and what is refused."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cosched.errors import ConfigError

pytestmark = pytest.mark.sglang

K, MASK = 3, 9
DRAFT_VOCABULARY, TARGET_VOCABULARY = 12, 10


@pytest.fixture(scope="module")
def algorithm() -> Any:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import get_spec

    from tests.sglang.frozen_pard import register

    if get_spec("COSCHED_PARD") is None:
        register()
    return SpeculativeAlgorithm.from_string("cosched_pard")


@pytest.mark.parametrize("builtin", ["STANDALONE", "EAGLE3", "DFLASH"])
def test_an_adapted_algorithm_answers_every_question_like_the_built_in_one(builtin: str) -> None:
    """SGLang's class for registered algorithms says no, or (0.5.20) lacks the method."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from cosched.engines.sglang.worker.as_builtin import adapted_algorithm

    member = SpeculativeAlgorithm[builtin]
    ours = adapted_algorithm(builtin)(name="OURS", factory=lambda _: None, supports_overlap=True)
    asked = 0
    for name, function in vars(SpeculativeAlgorithm).items():
        if inspect.isfunction(function) and len(inspect.signature(function).parameters) == 1:
            assert getattr(ours, name)() == getattr(member, name)(), name
            asked += 1
    assert asked > 15
    assert ours.is_speculative()
    assert ours.name == "OURS"


def test_the_server_is_told_how_wide_the_drafts_pass_is(algorithm: Any) -> None:
    """Backends size their buffers by it: a draft's pass is wider than a verification."""
    assert algorithm.get_num_tokens_per_req_for_target_verify(K + 1, is_draft_worker=False) == K + 1
    assert algorithm.get_num_tokens_per_req_for_target_verify(K + 1, is_draft_worker=True) == 2 * K
    arguments = SimpleNamespace(speculative_num_draft_tokens=K + 1, speculative_adaptive=False)
    assert algorithm.resolve_max_speculative_num_draft_tokens(arguments) == 2 * K


class Runner:
    """A draft that says of row i of request b the token that the test wants there."""

    def __init__(self, device: str) -> None:
        self.device = device
        config = SimpleNamespace(pard_token=MASK)
        self.model_config = SimpleNamespace(hf_config=config, vocab_size=DRAFT_VOCABULARY)

    def forward(self, batch: Any) -> Any:
        self.batch = batch
        num_rows = len(batch.input_ids)
        logits = torch.zeros(num_rows, DRAFT_VOCABULARY, device=self.device)
        says = (torch.arange(num_rows, device=self.device) % (2 * K))[:, None]
        logits = logits.scatter(1, says, 1.0)
        logits[:, TARGET_VOCABULARY:] = 2.0  # ids that the target lacks: never drafted
        return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits))


def draft_worker(device: str) -> Any:
    from cosched.engines.sglang.worker.pard import PardDraftWorker

    worker = object.__new__(PardDraftWorker)
    worker.device, worker.speculative_num_steps = device, K
    worker.draft_runner = Runner(device)
    target = SimpleNamespace(vocab_size=TARGET_VOCABULARY)
    worker.target_worker = SimpleNamespace(model_runner=SimpleNamespace(model_config=target))
    table = 100 * torch.arange(3)[:, None] + torch.arange(30)
    worker.req_to_token_pool = SimpleNamespace(req_to_token=table.int().to(device))
    return worker


def a_round(device: str, translator: Any = None) -> tuple[Any, Any, torch.Tensor]:
    """Two requests: one committed 3 tokens (its text is 14 long now), one committed 1 (of 6)."""
    from sglang.srt.speculative.eagle_info import EagleDraftInput

    worker = draft_worker(device)
    worker.draft_runner.kv_index_translator = translator
    predicted = torch.tensor([5, 6, 7, 1, 4, 1, 1, 1], dtype=torch.int32, device=device)
    result = SimpleNamespace(
        next_draft_input=EagleDraftInput(bonus_tokens=predicted[[2, 4]]),
        next_token_ids=predicted,
        accept_lens=torch.tensor([3, 1], dtype=torch.int32, device=device),
    )
    worker._draft_extend_for_decode(None, result)
    batch = SimpleNamespace(
        spec_info=result.next_draft_input,
        seq_lens=torch.tensor([13, 5], device=device),
        seq_lens_cpu=None,
        seq_lens_sum=None,
        req_pool_indices=torch.tensor([2, 1], device=device),
        spec_algorithm=None,
    )
    return worker, batch, worker._propose(batch)


def test_the_rows_of_a_pass() -> None:
    """Committed tokens, masks, padding; slots and positions follow the text, padding has slot 0."""
    worker, batch, drafted = a_round("cpu")
    seen = worker.draft_runner.batch
    assert batch.spec_info.topk_index.tolist() == [[5, 6, 7, MASK], [4, MASK, MASK, MASK]]
    assert seen.input_ids.tolist() == [5, 6, 7, 9, 9, 9, 4, 9, 9, 9, 9, 9]
    assert seen.seq_lens.tolist() == [11, 5]
    assert seen.positions.tolist() == [11, 12, 13, 14, 15, 15, 5, 6, 7, 7, 7, 7]
    assert seen.out_cache_loc.tolist() == [211, 212, 213, 214, 215, 0, 105, 106, 107, 0, 0, 0]
    assert drafted.tolist() == [[2, 3, 4], [0, 1, 2]]  # the rows of the last token and the masks


def test_a_pass_writes_the_rows_that_the_drafts_pool_knows() -> None:
    """SGLang translates rows for a pool that counts them in a way of its own, but only in batches that
    it has made; a batch of ours would write over what other requests keep."""

    def translate(batch: Any) -> None:
        batch.out_cache_loc = batch.out_cache_loc + 1000

    worker, _, _ = a_round("cpu", SimpleNamespace(bind_own_plan=translate))
    seen = worker.draft_runner.batch
    assert seen.out_cache_loc.tolist()[:6] == [1211, 1212, 1213, 1214, 1215, 1000]


def test_a_round_never_asks_the_device_for_a_value() -> None:
    """On the meta device there are no values: ``item``, ``tolist`` or ``cpu`` would raise. With
    overlapped scheduling each of them would stall the server for a whole forward pass."""
    _, _, drafted = a_round("meta")
    assert drafted.shape == (2, K)


def test_overlapped_scheduling_relays_what_a_round_committed(
    algorithm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay is by request and made for one token a request; ours are K + 1 wide."""
    from sglang.srt.managers.overlap_utils import RelayPayload
    from sglang.srt.speculative import spec_utils
    from sglang.srt.speculative.eagle_info import EagleDraftInput

    settings = SimpleNamespace(speculative_algorithm="COSCHED_PARD", enable_multi_layer_eagle=False)
    monkeypatch.setattr(spec_utils, "get_spec", lambda: settings)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)  # a CPU has no streams
    worker, batch, _ = a_round("cpu")
    relay = algorithm.create_future_map(torch.device("cpu"), worker.req_to_token_pool)
    relay.stash(batch.req_pool_indices, RelayPayload.from_draft_input(batch.spec_info))
    turned = torch.tensor([1, 2])
    later = SimpleNamespace(spec_info=EagleDraftInput(future_indices=turned))
    relay._resolve_spec_extras(later)
    assert later.spec_info.topk_index.tolist() == batch.spec_info.topk_index.flip(0).tolist()
    assert later.spec_info.topk_p.tolist() == batch.spec_info.topk_p.flip(0).tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pard_token": 1, "spd_type": "pard2"}, "is a PARD-2 checkpoint"),
        ({"pard_token": 1, "pard2": True}, "is a PARD-2 checkpoint"),
        ({}, "no pard_token"),
        ({"pard_token": 12}, "pard_token 12, which its vocabulary of 12 lacks"),
    ],
)
def test_other_drafts_are_refused(config: dict[str, Any], message: str) -> None:
    """PARD-2 without its features, or masks that are ordinary tokens, would draft nonsense."""
    from cosched.engines.sglang.worker.pard_algorithm import mask_token

    with pytest.raises(ConfigError, match=message):
        mask_token(SimpleNamespace(vocab_size=DRAFT_VOCABULARY, **config), "draft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative_draft_model_path": None}, "needs --speculative-draft-model-path"),
        ({"speculative_eagle_topk": 4}, "drafts one chain"),
        ({"speculative_num_steps": 3, "speculative_num_draft_tokens": 3}, "steps \\+ 1"),
        ({"speculative_num_draft_tokens": 1}, "one token or more"),
        ({"enable_dp_attention": True}, "enable-dp-attention"),
        ({"attn_dp_size": 2}, "attn-dp-size"),
    ],
)
def test_other_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    """SGLang checks some of them by STANDALONE's name, which ours is not."""
    from cosched.engines.sglang.worker.pard_algorithm import settle_arguments

    arguments = {
        "speculative_draft_model_path": "draft",
        "enable_dp_attention": False,
        "speculative_eagle_topk": None,
        "speculative_num_steps": None,
        "speculative_num_draft_tokens": None,
    }
    with pytest.raises(ConfigError, match=message):
        settle_arguments(SimpleNamespace(**arguments | settings))


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    """A mask token of the draft's own is no harm; a token under another id is."""
    from cosched.engines.sglang.worker.pard import check_vocabularies

    check_vocabularies({"a": 0, "b": 1, "<mask>": 2}, {"a": 0, "b": 1, "c": 2}, "draft")
    check_vocabularies(None, {"a": 0}, "draft")
    with pytest.raises(ConfigError, match="differ in their ids"):
        check_vocabularies({"a": 1, "b": 0}, {"a": 0, "b": 1}, "draft")
