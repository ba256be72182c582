"""Reduced draft vocabularies: which target token each draft token is.

``d2t[i]`` is the target's id less i (an offset, in every public format), ``t2d[v]`` says whether
target token v can be drafted at all. Letters: V target vocabulary, U draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosched.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cosched.protocols import TargetInfo


def target_ids(d2t_U: Tensor) -> Tensor:
    """Target token of each draft token ``[U]``."""
    return d2t_U + torch.arange(len(d2t_U), device=d2t_U.device)


def spread_mapping(draft_vocab_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """``d2t`` and ``t2d`` of a draft that nobody has chosen tokens for: every n-th of the target."""
    at_U = torch.arange(draft_vocab_size)
    ids = at_U * vocab_size // draft_vocab_size
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[ids] = True
    return ids - at_U, t2d_V


def complete_maps(
    tensors: dict[str, Tensor], draft_vocab_size: int | None, vocab_size: int
) -> dict[str, Tensor]:
    """A head's tensors with the maps that some exporters leave out.

    ``t2d`` follows from ``d2t``; without both, a head over the whole vocabulary drafts the target's
    own ids. What no map follows from is left missing.
    """
    if draft_vocab_size is None or "t2d" in tensors:
        return tensors
    d2t_U = tensors.get("d2t")
    if d2t_U is None:
        if draft_vocab_size != vocab_size:
            return tensors
        d2t_U = torch.zeros(vocab_size, dtype=torch.int64)
    if d2t_U.ndim != 1:
        return tensors
    ids = target_ids(d2t_U).long()
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[ids[(ids >= 0) & (ids < vocab_size)]] = True  # others are refused with the map
    return {**tensors, "d2t": d2t_U, "t2d": t2d_V}


def without_identity(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors without maps that map every token to itself: a head that is not there has none."""
    d2t_U = tensors.get("d2t")
    if d2t_U is not None and bool((d2t_U != 0).any()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in {"d2t", "t2d"}}


class OwnHead(nn.Module):
    """A network that may have a head of its own, over all of the target's tokens or over some.

    Head and maps are None where it borrows the target's.
    """

    lm_head: nn.Linear | None
    d2t: Tensor | None
    t2d: Tensor | None

    def make_head(self, width: int, draft_vocab_size: int | None, vocab_size: int) -> None:
        """Register head and maps at this place among the network's tensors."""
        self.lm_head = d2t = t2d = None
        if draft_vocab_size is not None:
            self.lm_head = nn.Linear(width, draft_vocab_size, bias=False)
            d2t, t2d = spread_mapping(draft_vocab_size, vocab_size)
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)


def check_mapping(d2t_U: Tensor, t2d_V: Tensor, where: object) -> None:
    """Make sure that both maps say the same and stay inside the target's vocabulary.

    Raises:
        CheckpointError: a draft token is no target token, two are the same, or ``t2d`` disagrees.
    """
    if d2t_U.is_floating_point() or d2t_U.dtype == torch.bool:
        raise CheckpointError(f"d2t of {where} is {d2t_U.dtype}, expected integers")
    ids, size = target_ids(d2t_U), len(t2d_V)
    check_within(d2t_U, size, where)
    said = torch.zeros(size, dtype=torch.bool, device=ids.device)
    said[ids] = True
    if int(said.sum()) != len(ids):
        raise CheckpointError(f"d2t of {where} has two draft tokens for one target token")
    # A map of the whole vocabulary is often left as all False or all True.
    if len(ids) < size and not torch.equal(said, t2d_V.bool()):
        different = int((said != t2d_V.bool()).sum())
        raise CheckpointError(f"d2t and t2d of {where} disagree on {different} target tokens")


def check_within(d2t_U: Tensor, vocab_size: int, where: object) -> None:
    """Make sure that every draft token is a token of that many.

    Raises:
        CheckpointError: one is not.
    """
    ids = target_ids(d2t_U)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise CheckpointError(
            f"d2t of {where} points at tokens {int(ids.min())} to {int(ids.max())}, "
            f"the target's vocabulary has {vocab_size}"
        )


def partial_ids(d2t_U: Tensor | None, vocab_size: int) -> Tensor | None:
    """Target token of each draft token ``[U]``; None where the two vocabularies are one."""
    if d2t_U is None:
        return None
    ids = target_ids(d2t_U)
    # A sketch has no values to look at; what counts there is how many they are.
    whole = len(ids) == vocab_size and (d2t_U.is_meta or bool((d2t_U == 0).all()))
    return None if whole else ids


def over_target(logits: Tensor, ids_U: Tensor | None, vocab_size: int) -> Tensor:
    """Float32 logits over the target's vocabulary; what the draft cannot say is -inf."""
    logits = logits.float()
    if ids_U is None:
        return logits
    full = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
    return full.index_copy_(-1, ids_U, logits)


def logits_of(head: nn.Module, states: Tensor, tokens_W: Tensor | None) -> Tensor:
    """What a head gives ``[..., V]``, or of it some tokens ``[..., W]``, without making the others."""
    if tokens_W is None:
        return head(states)
    if not isinstance(head, nn.Linear):
        return head(states)[..., tokens_W]
    bias = cast("Tensor | None", head.bias)
    return F.linear(states, head.weight[tokens_W], None if bias is None else bias[tokens_W])


def check_vocabularies(
    vocab_size: int, drafted: int | None, target: TargetInfo, directory: Path
) -> None:
    """Make sure that two tables of unlike length are one vocabulary, padded in two ways.

    Then the tokenizer uses no id that either table lacks. ``drafted`` is how many tokens a head of
    the draft's own has, if it has one.

    Raises:
        CheckpointError: it uses one, there is no tokenizer to tell, or the head drafts more tokens
            than the target has.
    """
    if vocab_size == target.vocab_size:
        return
    sizes = f"the draft {directory} has vocab_size {vocab_size}, the target has {target.vocab_size}"
    known = target.token_ids()
    if not known:
        raise CheckpointError(
            f"{sizes}: where the target brings no tokenizer, nobody can say whether only their "
            f"padding differs; this draft was trained for another target"
        )
    used = 1 + max(known.values())
    if used > min(vocab_size, target.vocab_size):
        raise CheckpointError(
            f"{sizes}, and the target's tokenizer uses ids up to {used - 1}: more than their "
            f"padding differs; this draft was trained for another target"
        )
    if drafted is not None and drafted > target.vocab_size:
        raise CheckpointError(
            f"{sizes}: its head of {drafted} tokens would draft some that the target lacks"
        )


def check_tokenizers(
    draft: Mapping[str, int], target: Mapping[str, int] | None, directory: Path
) -> None:
    """Make sure that a draft that brings a tokenizer brings the target's.

    Tokens that only the draft has (its mask) and only the target has are no harm; a token that
    both have under different ids is.

    Raises:
        CheckpointError: a token has another id in the draft than in the target.
    """
    if target is None:
        return
    shared = draft.keys() & target.keys()
    wrong = sorted(token for token in shared if draft[token] != target[token])
    if wrong or not shared:
        example = (
            f"for one, {wrong[0]!r} is {draft[wrong[0]]} in the draft's and {target[wrong[0]]} in "
            f"the target's"
            if wrong
            else "they share no token"
        )
        raise CheckpointError(
            f"the draft {directory} has another tokenizer than the target: {len(wrong)} of "
            f"{len(target)} tokens have other ids ({example})"
        )
