"""Keys: two ranks behind one, and SGLang's middleware in front of our routes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest

from cosched.engines.sglang.operators.control import Client, SocketOperator
from cosched.engines.sglang.operators.routes import add_routes
from cosched.engines.sglang.worker.operator import Status
from tests.helpers.serving import STATUS
from tests.sglang.client import complete
from tests.sglang.server import Start

pytestmark = pytest.mark.sglang


def test_two_ranks_report_and_a_key_guards_the_routes(start: Start) -> None:
    """One start shows both: every rank's worker stands, and SGLang's key covers our routes."""
    server = start("--tp-size", "2", "--api-key", "secret")
    for path, body in (("/cosched/status", None), ("/cosched/off", {})):
        assert server.call(path, body)[0] == 401
        assert server.call(path, body, Authorization="Bearer wrong")[0] == 401
        assert server.call(path, body, Authorization="Bearer secret")[0] == 200
    told = server.command("control", "status", "--url", server.url)
    assert told.returncode == 1
    assert "--api-key" in told.stderr
    told = server.command("control", "on", "--url", server.url, "--api-key", "secret")
    assert told.returncode == 0, told.stderr
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", timeout=120) as client:
        complete(client, 0, 200)
    status = server.get("/cosched/status", Authorization="Bearer secret")
    assert status["updates"] > 0
    assert status["failure"] is None
    assert server.stop() == 0


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The client of an operator whose scheduler always answers with the same status."""
    path = tmp_path_factory.mktemp("run") / "control.sock"
    made = SocketOperator(path)
    stop = threading.Event()

    def schedule() -> None:
        while not stop.wait(0.002):
            for _, answer in made.asked():
                answer(STATUS)

    thread = threading.Thread(target=schedule)
    thread.start()
    yield Client([path])
    stop.set()
    thread.join()
    made.close()


@pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")  # SGLang's refusals are ones
@pytest.mark.parametrize(
    ("api_key", "admin_key", "given", "host", "code"),
    [
        (None, None, None, "127.0.0.1", 200),
        (None, None, None, "10.1.2.3", 403),
        ("user", None, None, "127.0.0.1", 401),
        ("user", None, "user", "10.1.2.3", 200),
        (None, "admin", None, "127.0.0.1", 401),
        (None, "admin", "admin", "10.1.2.3", 200),
        ("user", "admin", "user", "127.0.0.1", 401),
        ("user", "admin", "admin", "10.1.2.3", 200),
    ],
)
def test_sglangs_middleware_guards_our_routes(
    operator: Client,
    tmp_path: Path,
    api_key: str | None,
    admin_key: str | None,
    given: str | None,
    host: str,
    code: int,
) -> None:
    """With both keys the admin key alone opens them, as it does SGLang's own control routes."""
    from fastapi import FastAPI
    from sglang.srt.utils.auth import add_api_key_middleware

    app = FastAPI()
    add_routes(app, operator, tmp_path, bool(api_key or admin_key))
    if api_key or admin_key:
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_key)
    headers = {"Authorization": f"Bearer {given}"} if given else {}

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, client=(host, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return [
                await http.get("/cosched/status", headers=headers),
                await http.post("/cosched/off", headers=headers),
                await http.post("/cosched/rollback", headers=headers, json={"version": 1}),
                await http.post("/cosched/save", headers=headers, json={"path": "../x"}),
            ]

    *answers, escape = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [code] * 3
    assert escape.status_code == (400 if code == 200 else code)
    if code == 200:
        assert msgspec.convert(answers[0].json(), Status) == STATUS
