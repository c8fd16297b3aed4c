"""MLflow as we run it: who gets in, and a database that is never half made."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.embedded import tracking_server
from pipelines.embedded.servers import link
from pipelines.embedded.tracking_server import DATABASE, PARTIAL, Guard, prepare
from tests import ROOT

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


def test_only_our_own_password_is_in_the_link() -> None:
    ours = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1234"}
    assert link(ours) == "http://127.0.0.1:1234", "the user's server"
    ours |= {"MLFLOW_TRACKING_USERNAME": "latent-gpt", "MLFLOW_TRACKING_PASSWORD": "secret"}
    assert link(ours) == "http://latent-gpt:secret@127.0.0.1:1234/login"


def test_a_web_socket_is_closed() -> None:
    assert answer(kind="websocket", host=HOST, authorization=RIGHT) == [{"type": "websocket.close"}]


# ── the database ────────────────────────────────────────────────────────────────────────────────────────

MAKE = "from pathlib import Path; from pipelines.embedded.tracking_server import prepare; prepare(Path({!r}))"
MAKE_IN_PLACE = (  # as it was done before, and as MLflow does it itself
    "from mlflow.store.db import utils; "
    "utils._initialize_tables(utils.create_sqlalchemy_engine('sqlite:///' + {!r}))"
)


@contextlib.contextmanager
def process(code: str, database: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", code.format(str(database))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as child:
        try:
            yield child
        finally:
            child.kill()


def tables(database: Path) -> int:
    if not database.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return len(connection.execute("SELECT name FROM sqlite_master").fetchall())
    except sqlite3.OperationalError:  # locked, or renamed to its place since it was looked for
        return 0


def killed_at(code: str, database: Path, watched: Path, count: int) -> None:
    """Kill a process as soon as it has made so many tables and indices."""
    with process(code, database) as child:
        until = time.monotonic() + 120
        while child.poll() is None and tables(watched) < count and time.monotonic() < until:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)


def works(database: Path) -> bool:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{database}", "mlflow-artifacts:/")
    names = [one.name for one in store.search_experiments()]
    store.engine.dispose()
    return names == ["Default"]


@pytest.mark.slow
def test_a_first_start_that_is_killed_anywhere_leaves_no_half_made_database(tmp_path: Path) -> None:
    database = tmp_path / DATABASE
    for count in (1, 20, 40, 80):
        killed_at(MAKE, database, tmp_path / PARTIAL, count)
        assert not database.exists()
    prepare(database)
    assert works(database)
    assert [path.name for path in tmp_path.iterdir()] == [DATABASE]


@pytest.mark.slow
def test_a_half_made_one_of_before_is_mended_or_made_anew(tmp_path: Path) -> None:
    database = tmp_path / DATABASE
    killed_at(MAKE_IN_PLACE, database, database, 15)
    assert database.exists()
    prepare(database)
    assert works(database)
    half_migrated(database)
    prepare(database)
    assert works(database)


@pytest.mark.slow
def test_one_of_an_older_mlflow_is_brought_up_to_date_with_what_it_holds(tmp_path: Path) -> None:
    from alembic import command
    from mlflow.store.db import utils

    database = tmp_path / DATABASE
    prepare(database)
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        config = utils._get_alembic_config(f"sqlite:///{database}")
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")
    assert utils._get_schema_version(engine) != utils._get_latest_schema_revision()
    engine.dispose()
    changed(database, RUN)
    prepare(database)
    assert works(database)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT run_uuid FROM runs").fetchall() == [("kept",)]


@pytest.mark.slow
def test_one_with_runs_that_cannot_be_mended_is_left_alone_and_named(tmp_path: Path) -> None:
    database = tmp_path / DATABASE
    prepare(database)
    half_migrated(database)
    changed(database, RUN)
    before = database.read_bytes()
    with pytest.raises(SystemExit, match=rf"^error: {database} cannot be .* move it away"):
        prepare(database)
    assert database.read_bytes() == before
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(SystemExit, match="move it away"):
        prepare(database)
    assert database.read_bytes() == b"no database" * 1000


RUN = "INSERT INTO runs (run_uuid, experiment_id) VALUES ('kept', 0)"


def half_migrated(database: Path) -> None:
    """A migration got through, and the note that it did not: it cannot be done twice."""
    changed(database, "UPDATE alembic_version SET version_num = '181f10493468'")


def changed(database: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
        connection.commit()
