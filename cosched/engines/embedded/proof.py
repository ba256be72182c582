"""That the engine's own logits are those of the model's plain forward pass, on a text that tells.

The engine hides positions itself, and has an attention of its own. A model may do more than both
know of: see only the last positions, cap its scores, have sinks. Such a model would run, and be
wrong only behind some position; so it is tried, once, before anything is decoded.

Letters: T rows of a text, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cosched.engines.embedded import attention
from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from cosched.engines.embedded.target import Target

BLOCK = 8  # rows of the text that are verified in one pass, as drafts are
SHORT = 48
EAGER = 1024  # a longer text is not computed with whole tables of scores
# Float32 sums in another order; half precision also rounds between layers, in both ways: two correct
# engines differ by up to 0.02 of the largest logit there.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF = 0.04


@torch.no_grad()
def prove(target: Target, longest: int) -> float:
    """Compare the last rows of a random text, longer than a window that is shorter than ``longest``.

    Returns by how much the logits differ, as a part of the largest.

    Raises:
        CheckpointError: the engine cannot run this model, or runs it wrongly.
    """
    length = max(SHORT, (target.window or 0) + 2 * BLOCK)
    length = max(2 * BLOCK, min(length, longest, target.max_length))
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(target.vocab_size, (1, length), generator=generator).to(target.device)
    try:
        ours, plain = _as_served(target, ids_1T), _plainly(target, ids_1T)
    except Exception as error:  # from inside a model that somebody else wrote
        raise CheckpointError(
            f"target.path: {target.path} cannot be run by the embedded engine "
            f"({type(error).__name__}: {error}); serve it with SGLang"
        ) from error
    largest = float(plain.abs().max().clamp(min=1e-12))
    apart = float((ours - plain).abs().max()) / largest
    if not apart <= TOLERANCE.get(target.dtype, HALF):
        raise CheckpointError(
            f"target.path: the embedded engine's logits of {target.path} differ from the model's own "
            f"by {apart * largest:.3g} (the largest is {largest:.3g}) on a text of {length} tokens: it "
            f"has an attention that this engine does not compute; serve it with SGLang"
        )
    return apart


def _as_served(target: Target, ids_1T: Tensor) -> Tensor:
    """The last rows' logits ``[BLOCK, V]`` as a prompt and a verification give them."""
    length = ids_1T.shape[1]
    cache, at_1T = target.new_cache(1, length), torch.arange(length, device=target.device)[None]
    before = length - BLOCK
    target.forward(ids_1T[:, :before], at_1T[:, :before], cache, num_logits=1)
    return target.forward(ids_1T[:, before:], at_1T[:, before:], cache).logits_BTV[0]


def _plainly(target: Target, ids_1T: Tensor) -> Tensor:
    """The same, in one pass of the model with the attention that transformers has for it."""
    model = target.model
    model.set_attn_implementation("eager" if ids_1T.shape[1] <= EAGER else "sdpa")
    try:
        output = model(input_ids=ids_1T, use_cache=False, logits_to_keep=BLOCK)
    finally:
        model.set_attn_implementation(attention.NAME)
    return output.logits[0].float()
