"""What the comparisons share: drafts that show every mistake, texts to run them on, one measure.

Letters: R texts, C rows of a text, N anchors, K drafted tokens, B slots, A rounds, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from cosched.engines.embedded.target import Target
from cosched.records import Segment
from cosched.tinyworld.distill import crops_to_batch
from drafters.checkpoint import Checkpoint
from drafters.config import small_layer
from drafters.dflash import DFlashConfig, DFlashDrafter
from drafters.eagle3 import Eagle3Config, Eagle3Drafter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cosched.records import SignalBatch
    from drafters.config import DecoderConfig

Schedule = tuple[tuple[int, ...], ...]

STEPS = 3
LENGTH = 14
SCHEDULES_AB = (
    ((1,), (3,), (4,), (9,), (10,)),
    ((1, 2), (3, 4), (4, 7), (9, 8), (10, 10)),
)
"""Anchors of every slot in each round while serving, alone and in a batch: one to five rows arrive
between two rounds."""

MASK = 1
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}
"""A window that cuts off context from the first row of a block, and more from each later one."""

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
"""Scalings of the rotation that show at once: texts are short, and so is what was trained on."""

TOLERANCE = 5e-6
"""Relative, in float32: implementations that agree sum in different orders, which makes up to
1.5e-6; the smallest of the mistakes in test_mutations.py makes 4e-2."""


def make_target() -> Target:
    """A random Qwen3 of three layers whose features differ from layer to layer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return Target(model)


def layer_keys(target: Target, model_type: str) -> dict[str, Any]:
    """A layer in which mixed-up widths show: 4 heads of 16 over a width of 32, 2 of keys.

    ``rope_theta`` is not the default, so a reader that misses it shows as well.
    """
    return {**small_layer(target, model_type), "rope_theta": 1e6, "rms_norm_eps": 1e-5}


def make_eagle3(target: Target, folder: Path, form: str, **options: Any) -> Eagle3Drafter:
    """A random head with half of the target's vocabulary, written and loaded again."""
    options = {"model_type": "llama", "draft_vocab_size": 40, **options}
    keys = layer_keys(target, options.pop("model_type"))
    config = Eagle3Config(**keys, feature_layers=[0, 1, 2], **options)
    return write_draft(Eagle3Drafter, config, target, folder, form)


def make_dflash(target: Target, folder: Path, form: str, **options: Any) -> DFlashDrafter:
    """A random block drafter of two layers, written and loaded again."""
    config = DFlashConfig(
        **layer_keys(target, "qwen3"),
        num_hidden_layers=2,
        num_target_layers=target.num_layers,
        block_size=STEPS + 1,
        mask_token_id=MASK,
        feature_layers=[0, 2],
        **options,
    )
    return write_draft(DFlashDrafter, config, target, folder, form)


def write_draft(cls: Any, config: DecoderConfig, target: Target, folder: Path, form: str) -> Any:
    """A random draft of a family, written in that format and loaded again."""
    torch.manual_seed(7)
    network = cls.initialise(config, target, STEPS).network()
    scatter_vectors(network)
    if getattr(network, "lm_head", None) is not None and "d2t" in network.state_dict():
        choose_vocabulary(network)
    tensors = dict(network.state_dict())
    cls.formats.write(Checkpoint(config, tensors, form), folder, form)
    return load_draft(cls, folder, target)


def load_draft(cls: Any, folder: Path, target: Target) -> Any:
    """The draft of a folder, as ``cosched run`` would load it."""
    settings = cls.Settings(kind="parity", path=str(folder), num_draft_tokens=STEPS)
    return cls.load(settings, target)


@torch.no_grad()
def scatter_vectors(network: nn.Module) -> None:
    """Norm weights and biases away from one and zero, where two that are swapped look alike."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.6 * torch.rand_like(parameter) - 0.3)


def choose_vocabulary(network: Any) -> None:
    """A random subset of the target's tokens, in order."""
    size, whole = len(network.d2t), len(network.t2d)
    ids = torch.randperm(whole)[:size].sort().values
    network.d2t.copy_(ids - torch.arange(size))
    network.t2d.zero_()[ids] = True


def make_batch(target: Target, drafter: Any) -> SignalBatch:
    """Two random texts with every anchor that has a whole path behind it; anchor n is n + 1."""
    generator = torch.Generator().manual_seed(11)
    ids_RT = torch.randint(2, target.vocab_size, (2, LENGTH), generator=generator)
    anchors_RN = torch.arange(1, LENGTH - STEPS).expand(2, -1)
    return crops_to_batch(target, drafter, ids_RT, anchors_RN, STEPS)


def served_logits(drafter: Any, batch: SignalBatch, schedule_AB: Schedule) -> Tensor:
    """``[B, A, K, V]`` of the rounds, which draft the text whatever the logits say."""
    num_slots = len(schedule_AB[0])
    state = drafter.new_state(num_slots, LENGTH, None)
    rounds, seen_B = [], (0,) * num_slots
    for anchors_B in schedule_AB:
        for slot, (seen, anchor) in enumerate(zip(seen_B, anchors_B, strict=True)):
            features = None if batch.features_RCF is None else batch.features_RCF[slot, seen:anchor]
            tokens = batch.tokens_RC1[slot, seen : anchor + 1]
            drafter.observe(state, slot, Segment("parity", seen, tokens, features, None))
        paths_BK = torch.stack([batch.paths_RNK[b, a - 1] for b, a in enumerate(anchors_B)])
        proposal = drafter.propose(
            state, num_slots, lambda k, _, paths=paths_BK: paths[:, k], drafter.num_draft_tokens
        )
        rounds.append(proposal.logits_BKV)
        seen_B = anchors_B
    logits_BAKV, ids = torch.stack(rounds, 1), drafter.target_ids()
    return logits_BAKV if ids is None else logits_BAKV[..., ids]


def at_schedule(logits_RNKV: Tensor, schedule_AB: Schedule) -> Tensor:
    """``[B, A, K, V]``: of rows at all anchors those that ``served_logits`` serves."""
    anchors_BA = torch.tensor(schedule_AB).T
    return torch.stack([rows[at - 1] for rows, at in zip(logits_RNKV, anchors_BA, strict=False)])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """``max |a - b| / max |b|``; infinite where a value is no number."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).detach().abs().max() / theirs.detach().abs().max()
    return error.nan_to_num(torch.inf).item()


def assert_same_logits(drafter: Any, target: Target, peer: Callable[[SignalBatch], Tensor]) -> None:
    """``peer(batch)`` gives what replay gives, and what serving gives."""
    batch = make_batch(target, drafter)
    theirs = peer(batch)
    errors = [relative_error(drafter.replay(batch), theirs)]
    errors += [
        relative_error(served_logits(drafter, batch, schedule), at_schedule(theirs, schedule))
        for schedule in SCHEDULES_AB
    ]
    assert max(errors) < TOLERANCE, f"replay, and serving alone and in a batch: {errors}"
