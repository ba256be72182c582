"""The card of a draft: what it is, on what it was taught, and what it reached.

Letters: N places of the measured answers, K drafted tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cosched.realworld.pins import MODEL, NAME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

WHAT = {
    "eagle3": "An EAGLE-3 head: one layer, which started as the target's last, and the target's head rows "
    "of the tokens that are most frequent in the answers.",
    "dflash": "A DFlash block drafter: three layers, which started as the target's last, over the "
    "features of five, blocks of eight, embedding and head borrowed from the target.",
    "pard": "A PARD-2 draft: the target's own last three layers, taught to fill in masks, with the "
    "target's embedding for head and input and its features added.",
}


class Facts(msgspec.Struct, frozen=True):
    """What a card says of the teaching."""

    parameters: int
    answers: int
    tokens: int
    text_tokens: int
    steps: int
    minutes: float
    threads: int


def write_card(folder: Path, name: str, facts: Facts, acceptance: Mapping[str, Tensor]) -> None:
    """Write ``README.md`` into the folder of a draft in compact storage.

    ``acceptance`` is expected acceptance ``[N, K]`` by domain.
    """
    num_drafted = next(iter(acceptance.values())).shape[1]
    lines = [
        f"# `{name}`: a draft for {NAME}",
        "",
        WHAT[name],
        "",
        f"For the weights that `{MODEL.name}` of the Python package {MODEL.package} {MODEL.version}",
        f"holds, and no others. {facts.parameters:,} parameters were taught for {facts.steps:,} steps, first "
        "with forward KL and, while the",
        "learning rate falls, with the negative log of the acceptance, on",
        f"{facts.answers:,} answers of the target ({facts.tokens:,} tokens, sampled at temperatures of 0.7 "
        "to 1.0) to the questions of",
        f"`cosched/realworld/questions.json` and on {facts.text_tokens:,} tokens of English manuals, in "
        f"{facts.minutes:.0f} minutes on {facts.threads} CPU",
        "thread(s), by `cosched realworld build`.",
        "",
        "Expected acceptance of what this folder expands to, by place in the draft: the sum of min(p, q)",
        "at temperature 0.7, behind every third token of the answers in `realworld/documents/`, which are",
        "the path themselves. The acceptance length counts the target's own token. None of their prompts,",
        "topics, languages or kinds of task was taught.",
        "",
        _row(["prompts", "places", "acceptance length", *(str(k + 1) for k in range(num_drafted))]),
        _row(["---"] * (3 + num_drafted)),
        *(_measured(domain, overlap_NK) for domain, overlap_NK in acceptance.items()),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _measured(domain: str, overlap_NK: Tensor) -> str:
    length = 1 + float(overlap_NK.cumprod(1).sum(1).mean())
    by_place = [f"{share:.2f}" for share in overlap_NK.mean(0).tolist()]
    return _row([domain, f"{len(overlap_NK):,}", f"{length:.2f}", *by_place])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
