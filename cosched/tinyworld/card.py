"""The model card of the tiny world, from what was measured while it was built."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cosched.tinyworld.corpus import sources
from cosched.tinyworld.pretrain import MIX, Stage

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(slots=True)
class CardFacts:
    """Figures of the card: losses in nats per token, acceptance as sum of min(p, q)."""

    seconds_target: float
    threads: int
    stages: tuple[Stage, ...]
    machine: str
    losses: dict[str, list[float]]
    edges: tuple[int, ...]
    checksum: str
    drafts: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_card(directory: Path, facts: CardFacts) -> None:
    """Write ``README.md`` into the tiny world's folder."""
    lines = [
        "# The tiny world",
        "",
        "A small target and its drafts for tests, demonstrations and experiments on a laptop. They",
        "predict manuals and Python code badly on purpose of size; they are no product.",
        "",
        "Built by `cosched tinyworld build` from text of the machine it ran on:",
        "",
        "| domain | share of training | from |",
        "| --- | --- | --- |",
        *(
            f"| {domain} | {share:.0%} | {', '.join(sorted({_shown(s.root) for s in sources()[domain]}))} |"
            for domain, share in MIX.items()
        ),
        "",
        "Every twentieth file (by a hash of its path) was held out; prompts, documents and all",
        "figures below come from held-out files. The excerpts in `prompts/` and `documents/` name",
        "their source and stay under its licence (PSF for the Python library, the Vim licence,",
        "Artistic or GPL for the Perl pods, and the licences named in each manual page).",
        "",
        f"## Target: `target/` (Qwen3ForCausalLM, bfloat16, checksum in float32 `{facts.checksum}`)",
        "",
        "16 layers of width 192, four query and two key-value heads of 64, 2048 byte-level BPE",
        "tokens, 4096 positions: deep and narrow, so that verifying a block costs about one step.",
        f"Trained in {facts.seconds_target / 60:.0f} minutes on {facts.threads} CPU threads "
        f"({facts.machine}):",
        "",
        "| layers | crop length | tokens |",
        "| --- | --- | --- |",
        *(f"| {s.num_layers} | {s.length} | {s.tokens:,} |" for s in facts.stages),
        "",
        "Held-out loss in nats per token by position:",
        "",
        _row(["domain", *_spans(facts.edges)]),
        _row(["---"] * len(facts.edges)),
        *(_row([d, *(f"{x:.2f}" for x in v)]) for d, v in facts.losses.items()),
    ]
    for name, draft in facts.drafts.items():
        lines += draft_section(name, draft, facts.edges[:5])
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draft_section(name: str, draft: dict[str, Any], edges: tuple[int, ...]) -> list[str]:
    """What one draft is and what it reached."""
    return [
        "",
        f"## Draft: `{name}/`",
        "",
        f"{draft['parameters']:,} parameters, taught with forward KL on {draft['tokens']:,} tokens of",
        f"**code only**, in crops of 256, in {draft['seconds'] / 60:.0f} minutes. Chance that drafted "
        "token 1, 2, 3 is accepted on",
        "held-out text (sum of min(p, q), the text itself as the path):",
        "",
        _row(["domain", *_spans(edges)]),
        _row(["---"] * len(edges)),
        *(
            _row([domain, *(" / ".join(f"{x:.2f}" for x in bucket) for bucket in buckets)])
            for domain, buckets in draft["acceptance"].items()
        ),
    ]


def _shown(root: Path) -> str:
    return "the Python standard library" if "python" in str(root).lower() else str(root)


def _spans(edges: tuple[int, ...]) -> list[str]:
    return [f"{a}-{b}" for a, b in itertools.pairwise(edges)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
