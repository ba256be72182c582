"""From our settings to SGLang's arguments; imports nothing of SGLang's.

``fixed`` arguments are what our settings mean, and nothing may say otherwise. ``engine.arguments``
are the user's, and so are the words of the command line, which win over them as everywhere.
"""

from __future__ import annotations

import argparse
import difflib
import json
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from cosched.engines.sglang.worker.algorithms import workers
from cosched.engines.sglang.worker.supported import check_modes, check_values
from cosched.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from cosched.records import SglangWorker
    from cosched.settings.schema import Config

CPU = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}

OF_LAUNCHER: dict[str, tuple[Any, str]] = {  # the value that it must have, and why
    "nnodes": (1, "the launcher watches the processes of one machine"),
    "tokenizer_worker_num": (1, "SGLang checks no key then, and /cosched/ would be open"),
    "use_ray": (False, "the launcher watches the processes that SGLang itself starts"),
    "encoder_only": (False, "nothing is drafted there"),
    "grpc_mode": (False, "the launcher serves HTTP"),
    "smg_grpc_mode": (False, "the launcher serves HTTP"),
}


class Parser(argparse.ArgumentParser):
    """Reads SGLang's arguments; a mistake is one line, without the two hundred of what there is."""

    def error(self, message: str) -> NoReturn:
        _, _, words = message.partition("unrecognized arguments: ")
        known = [word for action in self._actions for word in action.option_strings]
        meant = [near for word in words.split() for near in _near(word.partition("=")[0], known)]
        hint = f"; did you mean {', '.join(meant)}?" if meant else ""
        raise ConfigError(f"{message}{hint} (sglang serve --help lists what there is)")


def _near(word: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=3, cutoff=0.5)


def check_supported(config: Config, given: Mapping[str, Any], called: Callable[[str], str]) -> None:
    """Refuse what cosched does not serve with, whether SGLang is installed or not.

    Raises:
        ConfigError: a value is not the one that it must have.
    """
    check_modes(given, called)
    check_values(OF_LAUNCHER, given, called)
    replicas = given.get("dp_size", 1)
    if replicas != 1 and config.adapt.placement != "sidecar":
        raise ConfigError(
            f"{called('dp_size')}: each of {replicas} replicas would learn alone; use adapt.placement: sidecar, "
            f"where one trainer has one draft for all (docs/sidecar.md)"
        )


class Fixed(NamedTuple):
    """An argument of SGLang's that one of our settings decides."""

    value: Any
    key: str


Speculation = Literal["adapted", "stock", "plain"]
"""With our worker; with SGLang's own, as without cosched; without a draft."""


def fixed_arguments(config: Config, speculation: Speculation = "adapted") -> dict[str, Fixed]:
    """What our settings mean to SGLang, by its names.

    Raises:
        ConfigError: SGLang does not run this drafter, or these settings are not for it.
    """
    if config.engine.kind != "sglang":
        raise ConfigError(
            f"engine.kind: to serve it must be sglang, got {config.engine.kind!r}; say "
            f"engine.kind=sglang"
        )
    drafter = config.drafter_settings
    worker = worker_of(drafter.kind)
    number, width = drafter.num_draft_tokens, worker.width_of(drafter)
    fixed = {
        "model_path": Fixed(config.target.folder, "target.path"),
        "dtype": Fixed(config.engine.dtype, "engine.dtype"),
        "max_running_requests": Fixed(config.engine.max_batch, "engine.max_batch"),
        "random_seed": Fixed(config.run.seed, "run.seed"),
        "speculative_algorithm": Fixed(worker.algorithm, "drafter.kind"),
        "speculative_draft_model_path": Fixed(drafter.path, "drafter.path"),
        # SGLang counts the anchor, which it verifies together with the drafts.
        "speculative_num_draft_tokens": Fixed(number * width + 1, "drafter.num_draft_tokens"),
    }
    if worker.has_steps:
        fixed["speculative_num_steps"] = Fixed(number, "drafter.num_draft_tokens")
        key = worker.width or "kind"
        fixed["speculative_eagle_topk"] = Fixed(width, f"drafter.{key}")
    if drafter.window is not None:
        fixed["speculative_draft_window_size"] = Fixed(drafter.window, "drafter.window")
    if speculation == "stock":
        if not worker.stock:
            stock = [name for name, one in workers().items() if one.stock]
            raise ConfigError(
                f"drafter.kind: SGLang itself has no {drafter.kind}; it has {', '.join(stock)}"
            )
        fixed["speculative_algorithm"] = Fixed(worker.builtin, "drafter.kind")
    if speculation == "plain":
        fixed = {n: setting for n, setting in fixed.items() if not n.startswith("speculative_")}
    device, _, index = config.engine.device.partition(":")
    if device == "cpu":
        fixed |= {name: Fixed(value, "engine.device") for name, value in CPU.items()}
    elif device != "auto":
        fixed["device"] = Fixed(device, "engine.device")
        if index:
            fixed["base_gpu_id"] = Fixed(int(index), "engine.device")
    return fixed


def worker_of(kind: str) -> SglangWorker:
    """What drafts with a drafter in SGLang.

    Raises:
        ConfigError: nothing does.
    """
    known = workers()
    if kind not in known:
        raise ConfigError(f"drafter.kind: SGLang serves {', '.join(known)}, got {kind!r}")
    return known[kind]


def _defaults(config: Config) -> dict[str, Any]:
    """What is as it were without us, unless the user says otherwise: a model's name is its own."""
    target = config.target
    return {} if target.folder == target.path else {"served_model_name": target.path}


def keyword_arguments(
    config: Config,
    given: Mapping[str, Any],
    allowed: Collection[str],
    speculation: Speculation = "adapted",
) -> dict[str, Any]:
    """For ``sglang.Engine``: ours, the file's, and the caller's ``given``.

    Where our worker does not draft, nothing is refused that it does not go with.

    Raises:
        ConfigError: one contradicts another, is none of SGLang's, or is not served with.
    """
    fixed = fixed_arguments(config, speculation)
    for own, prefix in ((config.engine.arguments, "engine.arguments."), (given, "")):
        _check(own, fixed, allowed, prefix.__add__)
        if speculation == "adapted":
            check_supported(config, own, prefix.__add__)
    ours = {name: setting.value for name, setting in fixed.items()}
    return {**_defaults(config), **config.engine.arguments, **given, **ours}


def command_line(
    config: Config, words: Sequence[str], parser: argparse.ArgumentParser
) -> list[str]:
    """For ``sglang serve``: the words that SGLang's ``parser`` is to read, the user's last.

    Raises:
        ConfigError: as ``keyword_arguments``.
    """
    options = {action.dest: action for action in parser._actions if action.option_strings}
    fixed = fixed_arguments(config)
    given = _given(parser, words)
    for own, called in (
        (config.engine.arguments, "engine.arguments.".__add__),
        (given, lambda name: options[name].option_strings[0]),
    ):
        _check(own, fixed, options, called)
        check_supported(config, own, called)
    ours = {name: setting.value for name, setting in fixed.items()}
    theirs = {**_defaults(config), **config.engine.arguments}
    free = {name: value for name, value in theirs.items() if name not in given}
    line: list[str] = []
    for name, value in {**ours, **free}.items():
        line += _words(options, name, value)
    return [*line, *words]


def _check(
    given: Mapping[str, Any],
    fixed: Mapping[str, Fixed],
    allowed: Collection[str],
    called: Callable[[str], str],
) -> None:
    for name, value in given.items():
        if name not in allowed:
            near = _near(name, allowed)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"{called(name)}: SGLang has no argument {name!r}{hint}")
        if name in fixed and value != fixed[name].value:
            setting = fixed[name]
            raise ConfigError(
                f"{called(name)}: {value!r} contradicts {setting.key}, which means "
                f"{setting.value!r}; say it there"
            )


def _given(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """What the words set, by SGLang's names: its parser reads them, but fills in nothing."""
    kept = [(action, action.default, action.required) for action in parser._actions]
    for action, _, _ in kept:
        action.default, action.required = argparse.SUPPRESS, False
    try:
        return vars(parser.parse_args(words))
    finally:
        for action, default, required in kept:
            action.default, action.required = default, required


def _words(options: Mapping[str, argparse.Action], name: str, value: Any) -> list[str]:
    option = options[name]
    flag = option.option_strings[0]
    if option.nargs == 0:
        opposite = [word for word in option.option_strings if word.startswith("--no-")]
        if value is True:
            return [flag]
        if value is False and (opposite or not option.default):
            return opposite
        raise ConfigError(f"engine.arguments.{name}: {flag} is true or left out, got {value!r}")
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]
