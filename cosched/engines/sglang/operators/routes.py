"""``/cosched/…`` beside SGLang's routes, and the client that calls them.

Where the server has ``--api-key`` or ``--admin-api-key``, they need it as SGLang's own routes for
operators do (with both, the admin key). Where it has none, only clients of the same machine are
answered, and no web page: a browser says where a request comes from (``Origin``), and by which name
it found the machine (``Host``): a page may have had its own name point here since it was opened. Nor
is anybody whom a proxy passes on and says so. Behind one of this machine that neither says so nor
passes on the name that it was called by, all clients seem to be of this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import msgspec

from cosched.engines.sglang import compat
from cosched.engines.sglang.operators.control import LONGEST, VERBS, Client, Reply, seconds_for
from cosched.engines.sglang.worker.operator import Command, Status
from cosched.errors import NOT_DECODED, ConfigError, ControlError
from cosched.telemetry.alarms import SAID_ELSEWHERE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

HOST = re.compile(r"^\[?([^\[\]]*?)\]?(?::\d+)?$")  # of a header Host, without its port
LONGEST_ANSWER = 1 << 20  # bytes
LONGEST_REASON = 2000  # characters that are shown
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a checkpoint


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request may say: ``version`` for rollback, ``path`` for save."""

    version: int | None = None
    path: str | None = None


def add_routes(app: Any, client: Client, checkpoints: Path, has_key: bool) -> None:
    """Answer operators on SGLang's port; ``save`` writes into ``checkpoints`` only."""
    assert checkpoints.is_absolute(), "it is written to by another process"
    for verb in VERBS:
        method = "GET" if verb == "status" else "POST"
        endpoint = _endpoint(verb, client, checkpoints, has_key)
        guarded = compat.auth_level(compat.AuthLevel.ADMIN_OPTIONAL)(endpoint)
        app.add_route(f"/cosched/{verb}", guarded, methods=[method], include_in_schema=False)


def _endpoint(
    verb: str, client: Client, checkpoints: Path, has_key: bool
) -> Callable[[Any], Awaitable[Any]]:
    async def answer(request: Any) -> Any:
        if not has_key and (refusal := refused(request.client, request.headers)):
            return _response(403, Reply(error=refusal))
        try:
            command = command_of(verb, await body_of(request), checkpoints)
            replica = replica_of(request.query_params.get("replica", "0"), client.replicas)
        except ControlError as error:
            return _response(400, Reply(error=str(error)))
        try:
            reply = await asyncio.to_thread(client.reply, command, replica)
        except ControlError as error:
            return _response(503, Reply(error=str(error)))
        more: dict[str, Any] = {"path": command.path} if command.path else {}
        if client.replicas > 1:
            more |= {"replica": replica, "replicas": client.replicas}
        code = 200 if reply.status else 504 if reply.late else 409
        return _response(code, reply, **more)

    return answer


def replica_of(number: str, replicas: int) -> int:
    """The data-parallel replica that ``?replica=`` names.

    Raises:
        ControlError: there is none of that number.
    """
    if number not in map(str, range(replicas)):
        raise ControlError(f"replica: this server has 0 to {replicas - 1}, got {number[:20]!r}")
    return int(number)


async def body_of(request: Any) -> bytes:
    """The body of a request, in memory that all requests share.

    Raises:
        ControlError: it is longer than any command.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST:
            raise ControlError(f"the body has more than {LONGEST} bytes; no command has")
    return bytes(body)


def _response(code: int, reply: Reply, **more: Any) -> Any:
    from starlette.responses import JSONResponse  # pyright: ignore[reportMissingImports]

    shown: dict[str, Any] = {"error": reply.error}
    if reply.status is not None:
        shown = {**msgspec.to_builtins(reply.status), **more}
    return JSONResponse(shown, status_code=code)


def refused(client: Any, headers: Any) -> str | None:
    """Why a client of a server without a key is not answered; None where it is."""
    host = getattr(client, "host", "")
    if not _is_here(host):
        return (
            f"/cosched/ answers clients of its own machine only, not {host or 'unknown ones'}, "
            f"because this server has no --api-key and no --admin-api-key"
        )
    if "x-forwarded-for" in headers or "forwarded" in headers:
        return "/cosched/ answers nobody through a proxy on a server without --api-key"
    if "origin" in headers:
        return "/cosched/ answers no web pages on a server without --api-key"
    named = headers.get("host", "")
    if not _is_here(HOST.sub(r"\1", named)):
        return (
            f"/cosched/ on a server without --api-key is called by an address of this machine or as "
            f"localhost, not as {named or 'nothing'}"
        )
    return None


def _is_here(name: str) -> bool:
    """Whether an address, or the name of one, is this machine's own for itself."""
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # how a socket of both families shows IPv4
    return (mapped or address).is_loopback


def command_of(verb: str, raw: bytes, checkpoints: Path) -> Command:
    """The command that a request means.

    Raises:
        ControlError: its body is not as documented.
    """
    try:
        body = msgspec.json.decode(raw or b"{}", type=Body)
    except NOT_DECODED as error:
        raise ControlError(f"{verb}: the body is not as it must be: {error}") from error
    if verb == "rollback":
        if body.version is None or body.version < 0:
            raise ControlError('rollback: say {"version": N}, a version of the draft, 0 or more')
        return Command(verb=verb, version=body.version)
    if verb == "save":
        if body.path is None or not NAME.fullmatch(body.path):
            raise ControlError(
                f'save: say {{"path": NAME}}, got {body.path!r}; a NAME is letters, digits and '
                f"._- only, and the draft goes to {checkpoints}/NAME"
            )
        return Command(verb=verb, path=str(checkpoints / body.path))
    return Command(verb=verb)


def request_body(verb: str, what: str | None) -> dict[str, Any]:
    """What ``cosched control VERB WHAT`` sends.

    Raises:
        ConfigError: the verb is unknown, or takes something else.
    """
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is no command; there are {', '.join(VERBS)}")
    if verb == "rollback":
        if what is None or not what.isdecimal():
            raise ConfigError(f"rollback: give a version, 0 or more, got {what!r}")
        return {"version": int(what)}
    if verb == "save":
        if what is None:
            raise ConfigError("save: give a NAME for the checkpoint")
        return {"path": what}
    if what is not None:
        raise ConfigError(f"{verb} takes nothing behind it, got {what!r}")
    return {}


def call(
    url: str, verb: str, body: dict[str, Any], api_key: str | None = None, replica: int = 0
) -> dict[str, Any]:
    """Ask a running server; returns its status, with ``path`` where a checkpoint was saved.

    ``replica`` says whose status, where the server has several.

    Raises:
        ConfigError: ``url`` is no address.
        ControlError: nobody answers, or the server refuses.
    """
    where = f"{url.rstrip('/')}/cosched/{verb}" + (f"?replica={replica}" if replica else "")
    if not where.startswith(("http://", "https://")):
        raise ConfigError(f"--url: {url!r} is no address; e.g. http://127.0.0.1:30000")
    request = urllib.request.Request(
        where,
        data=None if verb == "status" else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=seconds_for(verb) + 5) as response:
            return read_answer(where, response.read(LONGEST_ANSWER))
    except urllib.error.HTTPError as error:
        raise ControlError(f"{where}: {_said(error)}") from error
    except (OSError, ValueError) as error:
        raise ControlError(f"{where} does not answer: {error}") from error


def read_answer(where: str, raw: bytes) -> dict[str, Any]:
    """What a server has answered.

    Raises:
        ControlError: it is no JSON object, so whatever answers there is no server of ours.
    """
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"{where} does not answer in JSON: {error}") from error
    if not isinstance(answer, dict):
        raise ControlError(f"{where} does not answer with a status; is it a server of cosched's?")
    return answer


def _said(error: urllib.error.HTTPError) -> str:
    if error.code == 404:
        return "there is no such route; was this server started with cosched serve?"
    if error.code == 401:
        return "the server wants its --api-key (or --admin-api-key): give --api-key"
    try:
        return str(json.loads(error.read(LONGEST_ANSWER))["error"])[:LONGEST_REASON]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"HTTP {error.code} {error.reason}"


def in_lines(answer: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What ``call`` returned as one line a figure, alarms too; ``cosched top`` shows what has parts."""
    for name, value in answer.items():
        if name == "alarms":
            yield from (
                (f"alarm {a}", text) for a, text in value.items() if a not in SAID_ELSEWHERE
            )
        elif not isinstance(value, dict):
            yield name, value


def status_of(answer: dict[str, Any]) -> Status:
    """The status in what ``call`` returned."""
    try:
        return msgspec.convert(answer, Status)
    except msgspec.ValidationError as error:
        raise ControlError(f"the server's status is not one of this version: {error}") from error
