"""Modes of SGLang's that cosched does not adapt in, refused by name; imports nothing of SGLang's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LOOSE = "below 1 more is accepted than the target would say, and drafts are scored by what it says"

# The value that an argument must have, and why.
MODES: dict[str, tuple[Any, str]] = {
    "pp_size": (1, "the draft is trained beside the target's last layer and its embedding"),
    "enable_dp_attention": (False, "a rank would see some of the requests only"),
    "attn_dp_size": (1, "a rank would see some of the requests only"),
    "enable_layernorm_sp": (False, "a rank would see some rows of the target only"),
    "disaggregation_mode": ("null", "prompts and answers would be computed by different servers"),
    "enable_torch_compile": (False, "a compiled forward pass does not run what watches the target"),
    "speculative_adaptive": (
        False,
        "SGLang leaves it out for cosched's algorithms; say drafter.length: {kind: goodput}",
    ),
    "speculative_accept_threshold_single": (1.0, LOOSE),
    "speculative_accept_threshold_acc": (1.0, LOOSE),
    "speculative_use_block_verification": (False, "drafts are scored one token after the other"),
    "enable_memory_saver": (False, "weights that the draft learns from would be taken away"),
}

# The same where the number of drafted tokens changes while SGLang serves.
WITH_LENGTHS: dict[str, tuple[Any, str]] = {
    "enable_two_batch_overlap": (
        False,
        "drafter.length changes attention, which drops its wrapper",
    ),
    "enable_pdmux": (False, "drafter.length changes attention, of which it has several"),
    "enable_hisparse": (False, "drafter.length changes sizes that it has settled when it starts"),
}


def check_modes(given: Mapping[str, Any], called: Callable[[str], str]) -> None:
    """Refuse what was asked for by name; ``called`` is how the user says it.

    Raises:
        ConfigError: a value is not the one that it must have.
    """
    check_values(MODES, given, called)


def check_resolved(found: Any, table: Mapping[str, tuple[Any, str]] = MODES) -> None:
    """The same of what SGLang has made of it: it sets some of them by others, and by the model.

    ``found`` has them as attributes, those that this version has.

    Raises:
        ConfigError: as ``check_modes``.
    """
    values = {name: getattr(found, name) for name in table if hasattr(found, name)}
    check_values(table, values, lambda name: f"--{name.replace('_', '-')}")


def check_values(
    table: Mapping[str, tuple[Any, str]], given: Mapping[str, Any], called: Callable[[str], str]
) -> None:
    """Whether what was given has the values that a table wants.

    Raises:
        ConfigError: one has not.
    """
    for name, (must, reason) in table.items():
        if (value := given.get(name, must)) != must:
            raise ConfigError(
                f"{called(name)}: cosched serves with {must!r} only, got {value!r}: {reason}"
            )
