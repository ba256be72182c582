"""A head that drafts trees: every row is what a chain along its path would give, and the likeliest paths grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec import ValidationError, convert

from cosched.engines.embedded.choosing import Best, Drawn, Led
from cosched.engines.embedded.target import Target
from cosched.engines.embedded.trees import Forest
from cosched.engines.embedded.verification import SamplingParams
from cosched.engines.embedded.verifiers import SamplingVerifier
from cosched.errors import ConfigError
from cosched.runs.experiment import Experiment
from cosched.settings.load import load_config
from cosched.testing.harness import Watcher, decode, make_coscheduler, make_engine, make_requests
from cosched.testing.sampling import FALSE_ALARM, VOCABULARY, p_values, sampling_target
from cosched.testing.specimen import Feeder, make_texts
from drafters.eagle3 import Eagle3Drafter, Eagle3Settings
from tests.helpers.drafts import make_drafter
from tests.helpers.experiments import new_folder, write
from tests.helpers.trees import rows_of

LENGTHS = [9, 31, 22]


def with_layers(target: Target, key: str) -> Eagle3Drafter:
    torch.manual_seed(1)
    drafter = Eagle3Drafter.examples(target, 3)[key]
    drafter.network().requires_grad_(False)
    return drafter


@pytest.mark.parametrize("key", ["plain", "two layers", "reduced vocabulary"])
@pytest.mark.parametrize("window", [None, 12, 2])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_is_what_a_chain_along_its_path_would_give(
    target: Target, key: str, window: int | None, drawn: bool
) -> None:
    """Logits of every row of trees of four tokens a level, held against chains led along each path."""
    drafter = with_layers(target, key)
    texts = make_texts(target, drafter, len(LENGTHS), 40)
    feeder = Feeder(drafter, texts, window)
    feeder.observe(LENGTHS)
    choose = Best()
    if drawn:
        uniforms_BU = torch.rand(3, 25, generator=torch.Generator().manual_seed(0)).double()
        choose = Drawn(SamplingParams(1.0), uniforms_BU, replacement=False)
    proposal = drafter.draft_trees(4).propose(feeder.state, 3, choose, 3)
    assert proposal.tokens_BK.shape == (3, 12)
    assert proposal.logits_BKV.shape[:2] == (3, 9)
    depths = {tuple(tree.depths) for tree in Forest.of(proposal).trees}
    assert depths == {(0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)}
    ids_BS = torch.cat((torch.zeros(3, 1, dtype=torch.int64), proposal.tokens_BK), 1)
    drafter.draft_trees(1)
    for row in range(9):
        paths = [rows_of(tuple(parents), row) for parents in proposal.parents_BK.tolist()]
        path_BK = torch.stack([ids_BS[b, path[1:]] for b, path in enumerate(paths)])
        alone = Feeder(drafter, texts, window)
        alone.observe(LENGTHS)
        depth = len(paths[0])  # all trees have a row of one number at one depth
        led_BK = torch.cat((path_BK, path_BK.new_zeros(3, 1)), 1)
        chain = drafter.propose(alone.state, 3, Led(led_BK), depth)
        ours, theirs = proposal.logits_BKV[:, row], chain.logits_BKV[:, -1]
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # sums in another order


def test_the_likeliest_paths_grow(target: Target) -> None:
    """Of two levels the best tokens are those of an exhaustive search, the likeliest first."""
    drafter, width = make_drafter(target), 3
    texts = make_texts(target, drafter, 1, 40)
    feeder = Feeder(drafter, texts)
    feeder.observe([20])
    tree = drafter.draft_trees(width).propose(feeder.state, 1, Best(), 2)
    said_RV = tree.logits_BKV[0].log_softmax(-1)
    first = said_RV[0].topk(width)
    assert tree.tokens_BK[0, :width].tolist() == first.indices.tolist()
    paths = (first.values[:, None] + said_RV[1:]).flatten().topk(width).indices
    assert (tree.parents_BK[0, width:] - 1).tolist() == (paths // target.vocab_size).tolist()
    assert tree.tokens_BK[0, width:].tolist() == (paths % target.vocab_size).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tree_rule", ["recursive", "k_sequential"])
@pytest.mark.parametrize("acceptance", ["sampled", "target_only"])
@pytest.mark.parametrize("sampling", [SamplingParams(1.0), SamplingParams(0.7, top_p=0.8)])
def test_sampled_text_follows_the_target(sampling, acceptance, tree_rule) -> None:
    """With trees that are drawn, by either rule, and with the draft's best tokens, while it learns."""
    target = sampling_target()
    drafter = make_drafter(target, num_draft_tokens=2).draft_trees(2)
    teacher = make_coscheduler(target, drafter, every=4, lr=3e-3)
    verifier = SamplingVerifier(sampling, acceptance, tree_rule)
    found = p_values(target, drafter, verifier, sampling, teacher, 1000)
    assert min(found) > FALSE_ALARM
    assert drafter.num_tree_tokens == 4 < VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [1, 3])
def test_greedy_text_is_the_targets_while_it_learns(target: Target, max_batch: int) -> None:
    """Across publications, and more is accepted than of a chain."""
    requests = make_requests(target, count=4, prompt=6, new=60)
    plain = decode(make_engine(target, None, requests), requests)
    accepted = []
    for top_k in (1, 4):
        drafter = make_drafter(target).draft_trees(top_k)
        teacher = Watcher(make_coscheduler(target, drafter, every=3, rows="all", lr=3e-3))
        engine = make_engine(target, drafter, requests, max_batch, observer=teacher)
        assert decode(engine, requests) == plain
        blocks = [block for round_ in teacher.rounds for block in round_.blocks]
        accepted.append(sum(block.num_accepted for block in blocks) / len(blocks))
        assert teacher.version > 5
    assert accepted[1] > accepted[0]


def test_settings_make_trees_and_copies_keep_them(target: Target, tmp_path: Path) -> None:
    """``top_k`` is read for what is loaded and sketched, and refused below one; SGLang takes them."""
    make_drafter(target).save(tmp_path / "draft")
    settings = Eagle3Settings(kind="eagle3", path=str(tmp_path / "draft"), top_k=4)
    for drafter in (
        Eagle3Drafter.load(settings, target),
        Eagle3Drafter.load(settings, target).clone(torch.float32),
        Eagle3Drafter.sketch(settings, target),
    ):
        assert (drafter.num_draft_tokens, drafter.num_tree_tokens) == (3, 12)
        assert not any("top_k" in reason for reason in drafter.not_for_sglang())
    with pytest.raises(ValidationError, match="top_k"):
        convert({"kind": "eagle3", "path": "", "top_k": 0}, Eagle3Settings)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_with_trees_and_what_it_refuses(
    settings: dict, tmp_path: Path, tinyworld: Path
) -> None:
    """Greedy text of the tiny world is plain decoding's in all arms; what a tree cannot have is named."""
    settings["drafter"] |= {"top_k": 3}
    settings["arms"] = ["plain", "frozen", "frozen+window", "adapted"]
    path = write(tmp_path, settings)
    config = load_config(path)
    summary = Experiment(config).run(new_folder(config))
    assert {arm.lossless_mismatches for arm in summary.arms.values()} == {0}
    assert summary.arms["frozen"].tau > 1.2
    documents = tinyworld / "documents" / "translated.jsonl"
    for overrides, message in (
        (["engine.exact=true"], r"engine\.exact: drafter drafts trees"),
        ([f"workload.documents={documents}", "workload.prompts=null"], r"workload\.documents: a tree"),
    ):  # fmt: skip
        config = load_config(path, [*overrides, f"run.name=refused{len(overrides)}"])
        with pytest.raises(ConfigError, match=message):
            Experiment(config).run(new_folder(config))
