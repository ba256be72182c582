"""What to keep in mind when reading a run: decay, repetition, losslessness, and how it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosched.report.findings import NO_INTERVAL, is_replay
from cosched.report.table import DASH, compared_requests, percent

if TYPE_CHECKING:
    from cosched.telemetry.metrics import Bucket, RunSummary

MIN_ROUNDS = 50  # a bucket with fewer rounds is too noisy to speak about
LOOPING = 0.3  # repeat fraction from which the headline is mostly about loops


def span(bucket: Bucket) -> str:
    """The positions of a bucket, ``512-1k`` with a dash."""
    return DASH.join(
        f"{edge // 1024}k" if edge >= 1024 and edge % 1024 == 0 else str(edge)
        for edge in (bucket.start, bucket.end)
    )


def decay_lines(summary: RunSummary) -> list[str]:
    """How τ changed from the first to the last generated positions with enough rounds."""
    lines: list[str] = []
    for name, arm in summary.arms.items():
        solid = [bucket for bucket in arm.tau_by_position if bucket.rounds >= MIN_ROUNDS]
        if not arm.position_acceptance or len(solid) < 2:
            continue
        first, last = solid[0], solid[-1]
        lines.append(
            f"{name}: {first.tau:.2f} at positions {span(first)}, {last.tau:.2f} at {span(last)} "
            f"({percent(last.tau / first.tau - 1, signed=True)})"
        )
    return lines


def length_lines(summary: RunSummary) -> list[str]:
    """How many tokens were drafted, of each arm that did not always draft as many."""
    lines: list[str] = []
    for name, arm in summary.arms.items():
        shares = {k: n / arm.rounds for k, n in enumerate(arm.rounds_by_drafted) if n}
        if len(shares) > 1:
            listed = ", ".join(f"{k} in {percent(share)}" for k, share in shares.items())
            lines.append(
                f"{name} drafted {arm.drafted_per_round:.2f} tokens a round: {listed} of its rounds."
            )
    return lines


def repetition_lines(summary: RunSummary) -> list[str]:
    """How much of the text is loops, and what remains of each arm without them."""
    done = {name: arm for name, arm in summary.arms.items() if arm.tokens}
    if not done:
        return []
    shares = {name: percent(arm.repeat_fraction) for name, arm in done.items()}
    if len(set(shares.values())) == 1:
        lines = [f"{next(iter(shares.values()))} of the text is repetition, in every arm."]
    else:
        listed = ", ".join(f"{name} {share}" for name, share in shares.items())
        lines = [f"Share of the text that is repetition: {listed}."]
    both = ", ".join(
        f"{name} {arm.tau:.2f} and {'none' if arm.tau_novel is None else f'{arm.tau_novel:.2f}'}"
        for name, arm in done.items()
        if arm.position_acceptance
    )
    if both:
        lines.append(f"τ overall and on novel positions: {both}.")
    if max(arm.repeat_fraction for arm in done.values()) >= LOOPING:
        lines.append(
            "That is much: the figures on all positions are in good part about loops. Trust the "
            "novel ones."
        )
    return lines


def interval_line(summary: RunSummary) -> str:
    """What the brackets behind a ratio of speeds mean; empty where there is no such ratio."""
    measured = [arm for arm in summary.arms.values() if arm.tokens_per_s]
    if len(measured) < 2:
        return ""
    number = max(len(arm.parts) for arm in measured)
    if not number:
        return NO_INTERVAL
    when = "at nearly the same time in all arms, so that a slow machine is slow in all"
    if summary.run.get("engine") == "sglang":
        when = (
            "but not at the same time: arms in SGLang run one after the other, and a machine that "
            "became faster or slower in between is not in the interval"
        )
    line = (
        "In brackets behind a ratio of speeds is its 95\u00a0% interval, a jackknife over "
        f"{number} parts of the text, {when}. "
    )
    if summary.run.get("parts_of") == "requests":
        return line + "A part is one or several whole groups of requests."
    return (
        line
        + "A part is a stretch of a request: the interval tells what the clock and these texts "
        "leave open, not what other texts would bring."
    )


def lossless_line(summary: RunSummary) -> str:
    """What this run shows about the promise that the text never changes."""
    reference = summary.run.get("lossless_reference")
    if reference not in summary.arms:
        return (
            "Text was sampled, so the arms say different things and cannot be compared token by "
            "token; what must agree is the distribution, which no single run can show."
        )
    checked = {
        name: arm.lossless_mismatches or 0
        for name, arm in summary.arms.items()
        if name != reference and arm.requests
    }
    if not checked:
        return f"Only {reference} has text: there is nothing to compare it with."
    if is_replay(summary) or summary.run.get("text") == "document":
        return "The text was given, so every arm commits the same tokens by construction."
    differing = {name: number for name, number in checked.items() if number}
    if not differing:
        return f"Lossless: every arm said exactly the same tokens as {reference}, in all requests."
    listed = ", ".join(
        f"{name} in {number} of {compared_requests(summary, name)}"
        for name, number in differing.items()
    )
    cut = (
        "The run was interrupted, and a request that was cut short counts as different."
        if summary.run.get("interrupted")
        else "Near-ties of the target that its arithmetic settles differently for one row and for "
        "several are one cause; anything else is a defect."
    )
    return f"Not the same tokens as {reference}: {listed} requests. {cut}"


def text_remark(summary: RunSummary) -> str:
    """Where the text came from, and what that means for comparing arms."""
    kind, run = summary.run.get("text"), summary.run
    certain = run.get("acceptance") == "target_only"  # what is drafted is the draft's best token
    if kind == "document":
        stands = (
            "The draft's best token stands with probability p of it, which is what it"
            if certain
            else "A drafted token stands with probability Σ min(p, q), which is what a sampled draft"
        )
        return (
            "The text is a given document that every arm is led along: nobody generated it. "
            f"{stands} would meet at that place; real text, measured acceptance, no generation."
        )
    if is_replay(summary):
        rule = "while it is the target's own choice"
        if kind != "greedy" and not certain:
            rule = "with probability min(1, q/p)"
        return (
            "The text is a recording of the target, the same for every arm: a paired comparison. "
            f"A drafted token stands {rule}."
        )
    if kind == "sampled":
        return (
            f"Text was sampled at temperature {run.get('temperature')}, so the arms say different "
            "texts, and part of any difference between them is the luck of the draw. For a paired "
            "comparison record one text (--record) and replay it with engine.kind: trace."
        )
    return "Text is greedy: every arm has to say the target's own best token at every place."


def cut_line(summary: RunSummary) -> str | None:
    """How many conversations ended before all their turns were answered; None if none did."""
    cut = {name: arm.cut_conversations for name, arm in summary.arms.items()}
    if not any(cut.values()):
        return None
    listed = ", ".join(f"{name} {number}" for name, number in cut.items())
    return f"Conversations that ended early, because their next turn did not fit: {listed}."


def trainer_lines(summary: RunSummary) -> list[str]:
    """Of each arm whose trainer, a process of its own, was not there to the end, what it served with."""
    troubles: dict[str, str] = summary.run.get("trainer_troubles", {})
    return [
        f"{name} served the draft as loaded from its first round to its last: {why}."
        if not summary.arms[name].versions
        else f"{name} served without its trainer in the end: {why}."
        for name, why in troubles.items()
    ]


def cautions(summary: RunSummary, recorded: bool, num_damaged: int) -> list[str]:
    """What went otherwise than a reader would assume."""
    lines: list[str] = []
    if summary.run.get("interrupted"):
        counts = ", ".join(f"{name} {arm.requests}" for name, arm in summary.arms.items())
        lines.append(
            f"This run was interrupted. Requests per arm, the last ones cut short: {counts}. Arms "
            "may have got through different text, and their speeds are approximate."
        )
    if cut := cut_line(summary):
        lines.append(cut)
    lines += trainer_lines(summary)
    empty = [name for name, arm in summary.arms.items() if not arm.rounds]
    if empty:
        lines.append(f"No round was measured of: {', '.join(empty)}.")
    if recorded and summary.arms:
        lines.append(
            f"{next(iter(summary.arms))} also recorded its text as a trace; its times include that."
        )
    if num_damaged:
        lines.append(f"{num_damaged} unreadable line(s) of events.jsonl were left out.")
    skipped = sum(arm.skipped_steps for arm in summary.arms.values())
    if skipped:
        lines.append(f"{skipped} training step(s) were not finite and were skipped.")
    evicted = sum(arm.evicted_requests for arm in summary.arms.values())
    if evicted:
        lines.append(
            f"{evicted} time(s) the replay buffer dropped a request for want of room; see "
            "adapt.memory.max_tokens and adapt.memory.max_bytes."
        )
    return lines
