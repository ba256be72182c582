"""Texts with what the target computed of them, on disk: shards of safetensors.

Kept beside the tokens, the target's rows spare training the target's forward pass, in every epoch and
for every drafter.

Letters: T tokens of a text, F fused feature width, H hidden width.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from cosched.engines.embedded.target import Target

FEATURE_LAYERS = (1, 8, 14, 20, 26)
"""What is kept; a draft names the ones it wants. EAGLE-3's are the first, third and last."""

LAST_HIDDEN = -1
"""The state behind the last layer and the final norm, as a layer to be read."""

KEPT = torch.bfloat16


class Recorded(NamedTuple):
    """A text: rows ``[T - 1]`` of all tokens but the last, which has none.

    The first ``num_prompt`` tokens were given to the target, the others are what it is followed on.
    """

    tokens_T: Tensor
    num_prompt: int
    features_TF: Tensor
    hidden_TH: Tensor


def compute(target: Target, tokens_T: Tensor, num_prompt: int, layers: tuple[int, ...]) -> Recorded:
    """A text with what the target computes of it in one pass."""
    length = len(tokens_T) - 1
    captured = tuple(target.num_layers if layer == LAST_HIDDEN else layer for layer in layers)
    cache, at_1T = target.new_cache(1, length), torch.arange(length)[None]
    rows = target.forward(tokens_T[None, :-1], at_1T, cache, captured, num_logits=1)
    assert rows.features_BTF is not None
    return Recorded(tokens_T, num_prompt, rows.features_BTF[0], rows.hidden_BTH[0])


def write(
    folder: Path, layers: tuple[int, ...], texts: Iterable[tuple[str, Recorded]], **about: object
) -> None:
    """Fill the folder of a shard; features are those of ``layers``, texts come with an id."""
    tensors, described = dict[str, Tensor](), list[dict[str, object]]()
    for place, (name, text) in enumerate(texts):
        described.append({"id": name, "prompt": text.num_prompt})
        tensors[f"{place}.tokens"] = text.tokens_T.to(torch.int32)
        tensors[f"{place}.features"] = text.features_TF.to(KEPT).contiguous()
        tensors[f"{place}.hidden"] = text.hidden_TH.to(KEPT).contiguous()
    save_file(tensors, folder / "rows.safetensors")
    whole = {"layers": layers, **about, "answers": described}
    (folder / "answers.json").write_text(json.dumps(whole), encoding="utf-8")


def read(directory: Path, layers: tuple[int, ...]) -> Iterator[Recorded]:
    """Every text that is there, shard by shard, with the features of some of its layers.

    ``LAST_HIDDEN`` may be one of them.
    """
    for folder in sorted(directory.glob("[0-9]*")):
        about = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        kept = list(about["layers"])
        with safe_open(folder / "rows.safetensors", "pt") as stored:
            for place, text in enumerate(about["answers"]):
                hidden = stored.get_tensor(f"{place}.hidden")
                features = stored.get_tensor(f"{place}.features").unflatten(-1, (len(kept), -1))
                chosen = [
                    hidden if layer == LAST_HIDDEN else features[:, kept.index(layer)]
                    for layer in layers
                ]
                tokens = stored.get_tensor(f"{place}.tokens").long()
                yield Recorded(tokens, text["prompt"], torch.cat(chosen, -1), hidden)
