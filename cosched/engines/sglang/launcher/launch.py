"""SGLang's own server, or its ``Engine``, started so that the draft adapts.

``serve`` runs SGLang's launcher in this process, as ``sglang serve`` does. Nothing of SGLang is
imported before the settings are known to be right and, for a CPU, the environment is set.
"""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosched.engines.sglang import CONFIG, EVENTS, RESUME, RUN, START, compat
from cosched.engines.sglang.cpu.environment import (
    environment,
    install_command,
    install_stand_ins,
)
from cosched.engines.sglang.launcher.admission import check_address, check_tokens
from cosched.engines.sglang.launcher.arguments import (
    Parser,
    check_supported,
    command_line,
    fixed_arguments,
    keyword_arguments,
    worker_of,
)
from cosched.engines.sglang.launcher.resuming import state_to_resume
from cosched.engines.sglang.launcher.run_directory import RunDirectory, version_of
from cosched.engines.sglang.operators.control import Client
from cosched.engines.sglang.operators.routes import add_routes
from cosched.engines.sglang.worker.algorithms import has_worker
from cosched.engines.sglang.worker.supported import check_resolved
from cosched.errors import ConfigError, RunFolderError
from cosched.memory.sketch import sketch
from cosched.registry import DRAFTERS
from cosched.settings.load import check_paths, load_config, to_yaml
from cosched.settings.serving import check_for_server
from cosched.telemetry.run_folder import RunFolder, explained

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from cosched.engines.sglang.launcher.arguments import Speculation
    from cosched.protocols import CheckpointFormats
    from cosched.settings.schema import Config


def serve(config: Config, words: Sequence[str] = (), resume: bool = False) -> None:
    """Serve until the server is told to stop; ``words`` are SGLang's own arguments.

    What this start was made with, and what it saves, go into a folder of its own below the run folder:
    a server is restarted with the same command. With ``resume`` the draft goes on learning from what
    the newest of the earlier starts has saved.

    Raises:
        CoschedError: a setting or argument is wrong, the draft cannot be served, or SGLang came up
            without our workers.
    """
    check_servable(config)
    state = state_to_resume(config) if resume else None
    _prepare_environment(config)
    directory = RunDirectory.create(to_yaml(config))
    variables = {CONFIG: str(directory.config), RUN: str(directory.path)}
    if state is not None:
        variables[RESUME] = str(state)
    try:
        with _variables(variables), _temporary(directory.path):
            _run(config, words, directory)
    finally:
        directory.remove()


def engine(config_file: Path | str, overrides: Sequence[str] = (), **sglang_arguments: Any) -> Any:
    """An ``sglang.Engine`` whose draft adapts; ``engine.cosched`` is its ``control.Client``.

    ``sglang_arguments`` are those of ``sglang.Engine``, beside what the file says.

    Raises:
        CoschedError: as ``serve``.
    """
    config = load_config(Path(config_file), overrides)
    check_servable(config)
    return start_engine(config, arguments=sglang_arguments)


def start_engine(
    config: Config,
    speculation: Speculation = "adapted",
    arguments: Mapping[str, Any] | None = None,
    events: Path | None = None,
) -> Any:
    """As ``engine``, for settings that are read, an experiment's too.

    ``events`` is a file that gets every event.

    ``plain`` decodes without a draft and ``stock`` with SGLang's own algorithm: neither has a
    ``cosched``.

    Raises:
        CoschedError: as ``serve``.
    """
    check_draft_servable(config)
    _prepare_environment(config)
    fields: set[str] = set(compat.ServerArgs.__struct_fields__)
    words = keyword_arguments(config, arguments or {}, fields, speculation)
    if events is not None and (replicas := words.get("dp_size", 1)) != 1:
        raise ConfigError(
            f"engine.arguments.dp_size: the events of {replicas} replicas would be in one file; use 1 (cosched "
            f"serve takes more)"
        )
    _bind_ranks(config, words.get("tp_size", 1) * words.get("dp_size", 1))
    directory = RunDirectory.create(to_yaml(config))
    variables = {CONFIG: str(directory.config)}
    if events is not None:
        variables[EVENTS] = str(events)
    if speculation == "adapted":
        variables[RUN] = str(directory.path)
    try:
        with _variables(variables), _temporary(directory.path):
            _load_plugins(config)
            _watch_launch()
            started: Any = compat.Engine(**words)
    except BaseException:
        directory.remove()
        raise
    atexit.register(directory.remove)
    if speculation == "adapted":
        started.cosched = Client(directory.sockets(words.get("dp_size", 1)))
    return started


def check_servable(config: Config) -> None:
    """Make sure, without loading anything, that SGLang can serve this.

    Raises:
        CoschedError: SGLang is missing, a folder is missing, stock SGLang cannot run the draft,
            there are several, or something is set that only an experiment reads.
    """
    if config.drafts:
        raise ConfigError(
            f"drafts: a server has one draft for all requests, got {', '.join(config.drafts)}; leave "
            f"drafts out and name that one in drafter (cosched run compares several)"
        )
    check_draft_servable(config)
    check_for_server(config)


def check_draft_servable(config: Config) -> None:
    """The same of the draft of one arm, whichever others there are."""
    fixed_arguments(config)
    check_supported(config, config.engine.arguments, lambda name: f"engine.arguments.{name}")
    rejection = "speculative_use_rejection_sampling"
    if config.engine.device == "cpu" and config.engine.arguments.get(rejection):
        raise ConfigError(
            f"engine.arguments.{rejection}: SGLang has it for GPUs only; leave it out"
        )
    settings = config.drafter_settings
    if (form := config.adapt.replay.teacher) != "hidden":
        raise ConfigError(
            f"adapt.replay.teacher: {form!r} is for the embedded engine; from SGLang, which changes "
            f"its logits in place, cosched takes the last hidden states: use 'hidden'"
        )
    worker = worker_of(settings.kind)
    if not has_worker(worker):
        raise ConfigError(
            f"drafter.kind: {settings.kind!r} names {worker.worker} as its worker in SGLang, and there "
            f"is no such module"
        )
    check_paths(config)
    _, drafter = sketch(config)
    problems = drafter.not_for_sglang() if worker.stock else ()
    if problems:
        anew = f"cosched convert {settings.path} {settings.path.rstrip('/')}-sglang --format sglang"
        badly_said = all("cosched convert" in problem for problem in problems)
        raise ConfigError(
            f"drafter.path: stock SGLang cannot run the draft in {settings.path}: "
            f"{'; '.join(problems)}. "
            + (anew if badly_said else "No other format changes that; use another draft")
        )
    formats: CheckpointFormats | None = DRAFTERS.get(settings.kind).formats
    if formats and formats.read_shape(Path(settings.path), settings)[1] == "speculators":
        raise ConfigError(
            f"drafter.path: {settings.path} is in a format that SGLang does not read "
            f"(speculators); write it anew and serve that: cosched convert {settings.path} "
            f"{settings.path.rstrip('/')}-sglang --format sglang"
        )
    if version_of("sglang") is None:
        raise ConfigError(
            f"SGLang is not installed: pip install '.[sglang]' in cosched's folder; without a GPU "
            f"{install_command()}"
        )


def _prepare_environment(config: Config) -> None:
    """Before SGLang is imported; what it spawns inherits it."""
    if config.engine.device == "cpu":
        os.environ.update(environment())
        install_stand_ins()
    if config.engine.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.engine.num_threads)


def _bind_ranks(config: Config, num_ranks: int) -> None:
    """Give each rank on a CPU a core: SGLang wants a memory node for every rank unless told."""
    if config.engine.device == "cpu" and num_ranks > 1:
        cores = os.cpu_count() or 1
        places = "|".join(str(rank % cores) for rank in range(num_ranks))
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", places)


def _run(config: Config, words: Sequence[str], directory: RunDirectory) -> None:
    parser = Parser(prog="cosched serve", allow_abbrev=True)
    _load_plugins(config)  # first: they add choices
    compat.ServerArgs.add_cli_args(parser)
    if "--config" in words:
        words = compat.ConfigArgumentMerger(parser).merge_config_with_args(list(words))
    line = command_line(config, words, parser)
    arguments = compat.prepare_server_args(line)
    check_resolved(arguments)
    check_address(arguments.host, arguments.port)
    _bind_ranks(config, arguments.tp_size * arguments.dp_size)
    folder = _folder_of_start(config)
    _watch_launch()
    has_key = bool(arguments.api_key or arguments.admin_api_key)
    client = Client(directory.sockets(arguments.dp_size))
    add_routes(compat.http_app, client, folder / "checkpoints", has_key)
    try:
        with _variables({START: str(folder)}):
            compat.run_server(arguments)
    except Exception as error:
        if failure := directory.failure():  # SGLang says that a process died; this is why
            raise ConfigError(f"the server cannot start: {failure}") from error
        raise
    finally:
        compat.kill_process_tree(os.getpid(), include_parent=False)


def _load_plugins(config: Config) -> None:
    """Let SGLang find our plugin in this process, as it will in those that it starts.

    Raises:
        ConfigError: it does not.
    """
    compat.load_plugins()
    algorithm = worker_of(config.drafter_settings.kind).algorithm
    try:
        compat.SpeculativeAlgorithm.from_string(algorithm)
    except ValueError as error:
        raise ConfigError(
            f"SGLang has not taken up cosched's plugin ({algorithm} is unknown to it): cosched is "
            f"not installed as a package here, SGLANG_PLUGINS leaves it out, it failed (see the "
            f"log above), or this process had loaded SGLang's plugins before. Run cosched doctor"
        ) from error


def _watch_launch() -> None:
    """Let a launch fail with our reason where a worker cannot be set up or is not ours."""
    hooks = {
        compat.LAUNCH: (_launched, compat.HookType.AFTER),
        compat.PREPARE_LAUNCH: (_signals_set, compat.HookType.AFTER),
        compat.REQUEST_CHECK: (check_tokens, compat.HookType.BEFORE),
    }
    for target, (hook, when) in hooks.items():
        if target not in compat.HookRegistry._patched:
            compat.HookRegistry.register(target, hook, when)
    compat.HookRegistry.apply_hooks()
    for target in hooks:
        assert target in compat.HookRegistry._patched, f"SGLang has moved {target}"


def _launched(_result: Any, *_args: Any, server_args: Any, **_kwargs: Any) -> None:
    """All of SGLang's processes are up, and it is not answering anybody yet."""
    if directory := RunDirectory.current():
        directory.check_reports(server_args.tp_size * server_args.dp_size)
        directory.note_shared()


def _signals_set(*_args: Any, **_kwargs: Any) -> None:
    """SGLang kills this very process when a child fails; where we know why, raise that instead."""
    directory = RunDirectory.current()
    if directory is None:
        return

    def child_failed(signum: int, frame: Any) -> None:
        if failure := directory.failure():
            raise ConfigError(f"the server cannot start: {failure}")
        assert callable(theirs)
        theirs(signum, frame)

    theirs = signal.signal(signal.SIGQUIT, child_failed)


def _folder_of_start(config: Config) -> Path:
    """``runs/NAME/DATE-TIME``, with the settings in it; absolute, for other processes write there."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    starts = config.run_folder.absolute()
    with explained(starts):
        starts.mkdir(parents=True, exist_ok=True)
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        folder = RunFolder(starts / f"{stamp}{suffix}")
        try:
            folder.create()
        except RunFolderError:
            if folder.path.exists():
                continue
            raise
        (folder.path / "checkpoints").mkdir()
        folder.write("config.yaml", to_yaml(config))
        return folder.path
    raise RunFolderError(f"{starts} has a hundred starts of this second")


@contextmanager
def _temporary(folder: Path) -> Generator[None]:
    """Let SGLang put there what it never removes, the files and sockets of its processes."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _variables(values: dict[str, str]) -> Generator[None]:
    """Set environment variables for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
