"""What an experiment will take in memory, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from cosched.memory.footprint import Footprint

DASH = "\u2013"  # an en dash
ADDED = "on top of the target"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def footprint_table(footprint: Footprint, in_sglang: bool = False) -> Table:
    """One line for each thing that takes memory, with what it comes from.

    ``in_sglang`` adds what SGLang's share of the memory does not hold.
    """
    table = Table(title="memory", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what")
    table.add_column("takes", justify="right")
    table.add_column("because")
    for what, takes, why in footprint_rows(footprint):
        if what == ADDED:
            table.add_section()
        table.add_row(what, DASH if takes is None else in_units(takes), why)
    if in_sglang:
        beside = in_units(footprint.beside_sglang)
        table.add_row("of it beside SGLang", beside, "outside of mem_fraction_static")
    return table


def footprint_rows(footprint: Footprint) -> list[tuple[str, int | None, str]]:
    """What takes memory, how many bytes (None: not known), and what they come from; the sum last."""
    known = footprint.num_target_parameters
    draft, trained = footprint.num_draft_parameters, footprint.num_trained
    per_token = in_units(footprint.cache_bytes_per_token)
    return [
        (
            "target weights",
            footprint.target,
            f"{known:,} parameters" if known else "no weights yet",
        ),
        ("target KV cache", footprint.target_cache, "of every running request"),
        ("draft weights", footprint.draft, f"{draft:,} parameters"),
        ("its adapters", footprint.serving_adapters, "one for each tenant or running request"),
        ("draft KV cache", footprint.draft_cache, f"{per_token} a token, of every running request"),
        ("draft's store", footprint.draft_store, "what a drafter without a network learns"),
        ("draft that learns", footprint.trainer_copy, "all of it, in float32"),
        ("its first weights", footprint.first_weights, f"{trained:,} trained, to reset to"),
        ("merged weights", footprint.merged, "adapters merged in, while they are published"),
        ("earlier versions", footprint.last_good, "to undo a publication, or roll back"),
        ("ZeRO masters", footprint.masters, "8 bytes a trained parameter (none in stage 0)"),
        ("Adam moments", footprint.moments, "8 bytes a trained parameter"),
        ("draft before the update", footprint.reference, "where the loss compares with it"),
        ("trials", footprint.trials, "the state before, and the best so far (adapt.objective)"),
        ("rows of the target's head", footprint.words, "of the draft's words"),
        (
            "a micro-step",
            footprint.step,
            "activations, logits (adapt.memory.chunk_rows) and gradients at once",
        ),
        ("captured micro-steps", footprint.graphs, "graphs (adapt.trainer.cuda_graph), for good"),
        ("scores of drafts", footprint.scores, "likewise; the larger of the two adds"),
        ("process that trains", footprint.process, "itself, and what both sides see"),
        (
            "replay buffer",
            footprint.replay,
            f"{in_units(footprint.feature_bytes_per_token)} of features and "
            f"{in_units(footprint.teacher_bytes_per_row)} of teacher a token",
        ),
        (ADDED, footprint.added, "what decoding takes for a moment comes on top"),
    ]


def in_units(number: int) -> str:
    """Bytes in the largest unit that leaves at least one."""
    value, unit = float(number), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {UNITS[unit]}" if value < 1000 else f"{value:.0f} {UNITS[unit]}"
