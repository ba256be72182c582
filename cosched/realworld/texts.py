"""English text of this machine, with what the target computes of it.

Answers are dear: each token is a step of the target. Of a text all tokens are one pass, and without
the variety of it a draft learns the answers by heart.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from cosched.errors import TinyWorldError
from cosched.realworld.folders import new_folder
from cosched.realworld.recorded import FEATURE_LAYERS, compute, write
from cosched.tinyworld.corpus import documents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cosched.engines.embedded.target import Target
    from cosched.realworld.recorded import Recorded

DOMAIN = "manuals"  # prose; the others are code and other languages, which are measured
LENGTH = 384  # tokens of a text
NUM_TEXTS = 192  # of a shard
GIVEN = 2  # tokens before the first that is trained on: a draft needs the features of one
CHARACTERS = 8 * LENGTH  # surely enough for so many tokens


def record_texts(
    target: Target,
    directory: Path,
    shards: int,
    number: int,
    seed: int,
    advance: Callable[[int, str], None],
) -> None:
    """Fill so many shards with crops of this machine's English text; one that is there stays.

    ``advance(tokens, message)`` is called as they come.

    Raises:
        TinyWorldError: this machine has no such text.
        RealWorldError: the folder cannot be written.
    """
    folders = [directory / f"{shard:04d}" for shard in range(shards)]
    if all(folder.exists() for folder in folders):
        return
    texts = [one.text for one in documents(DOMAIN) if len(one.text) > CHARACTERS]
    if not texts:
        raise TinyWorldError(f"no text of more than {CHARACTERS} characters among the {DOMAIN}")
    for shard, folder in enumerate(folders):
        if folder.exists():
            continue
        with new_folder(folder) as partial:
            crops = _crops(target, texts, number, seed + shard, advance)
            write(partial, FEATURE_LAYERS, crops)


def _crops(
    target: Target,
    texts: list[str],
    number: int,
    seed: int,
    advance: Callable[[int, str], None],
) -> Iterator[tuple[str, Recorded]]:
    """Crops with their rows; long texts have more of them than short ones."""
    drawn, lengths = random.Random(seed), [len(text) for text in texts]
    place = 0
    while place < number:
        (text,) = drawn.choices(texts, lengths)
        first = drawn.randrange(len(text) - CHARACTERS)
        crop = text[first : first + CHARACTERS].partition(" ")[2]
        ids = target.tokenizer(crop, add_special_tokens=False)["input_ids"][:LENGTH]
        if len(ids) < LENGTH:  # a table, mostly blanks
            continue
        yield str(place), compute(target, torch.tensor(ids), GIVEN, FEATURE_LAYERS)
        place += 1
        advance(LENGTH, "")
