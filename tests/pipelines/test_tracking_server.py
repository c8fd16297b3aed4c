"""MLflow as we run it: who gets in, and a database that is never half made."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from pipelines.embedded import tracking_server
from pipelines.embedded.tracking_server import Guard

RIGHT = b"Basic " + base64.b64encode(b"latent-gpt:secret")
HOST = b"127.0.0.1:1234"


def answer(path: str = "/", kind: str = "http", **headers: bytes) -> list[dict[str, Any]]:
    """What a guarded application answers; it says "inside" itself."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.encode(), value) for name, value in headers.items()]
    asyncio.run(
        Guard(app, "latent-gpt", "secret")({"type": kind, "path": path, "headers": given}, receive, send)
    )
    return sent


@pytest.mark.parametrize("host", [HOST, b"localhost:80", b"[::1]:1234", b"127.0.0.1"])
def test_the_owner_gets_in_by_any_name_of_loopback(host: bytes) -> None:
    for origin in ({}, {"origin": b"http://" + host}):
        assert answer(host=host, authorization=RIGHT, **origin)[1]["body"] == b"inside"


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"host": HOST}),
        (401, {"host": HOST, "authorization": b"Basic " + base64.b64encode(b"latent-gpt:guess")}),
        (401, {"host": HOST, "authorization": b"Bearer secret"}),
        (403, {"authorization": RIGHT}),
        (403, {"host": b"evil.example", "authorization": RIGHT}),
        (403, {"host": b"127.0.0.1.evil.example", "authorization": RIGHT}),
        (403, {"host": b"192.168.0.1:1234", "authorization": RIGHT}),
        (403, {"host": HOST, "origin": b"http://evil.example", "authorization": RIGHT}),
        (403, {"host": HOST, "origin": b"http://127.0.0.1:4321", "authorization": RIGHT}),
        (403, {"host": HOST, "origin": b"null", "authorization": RIGHT}),
    ],
)
def test_nobody_else_does_nor_a_page_of_somebody_elses(status: int, headers: dict[str, bytes]) -> None:
    said = answer(**headers)
    assert said[0]["status"] == status
    assert said[1]["body"] == b""


def test_the_link_with_the_password_leads_to_an_address_without() -> None:
    started = answer(tracking_server.LOGIN, host=HOST, authorization=RIGHT)[0]
    assert started["status"] == 303
    assert started["headers"] == [(b"location", b"http://127.0.0.1:1234/")]


def test_a_web_socket_is_closed() -> None:
    assert answer(kind="websocket", host=HOST, authorization=RIGHT) == [{"type": "websocket.close"}]
