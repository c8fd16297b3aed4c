"""MLflow's server in one process on SQLite, for who knows its password. Run by the keeper, in its folder.

Other users of the machine and web pages reach every port of loopback. So each request needs the password, by
HTTP's basic authentication: MLflow's clients speak it, and browsers keep it to this very port, which they do
not do with cookies. A browser sends it along with what other pages ask for, so these are refused as well.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

DATABASE = "mlflow.db"
PARTIAL = f".partial-{DATABASE}"
USER = "latent-gpt"
LOGIN = "/login"  # a page whose address holds a password may not ask for more; from here it goes on without
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")  # with the port it may be forwarded from


class Guard:
    """An ASGI application that lets through to another what has its password and is no other page's."""

    def __init__(self, app: ASGIApp, user: str, password: str) -> None:
        self._app = app
        self._expected = b"Basic " + base64.b64encode(f"{user}:{password}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] == "http":
            status, headers = self._judged(scope)
            if status != 200:
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
        elif scope["type"] != "lifespan":  # MLflow has no web sockets
            await send({"type": "websocket.close"})
            return
        await self._app(scope, receive, send)

    def _judged(self, scope: Scope) -> tuple[int, list[tuple[bytes, bytes]]]:
        """The status of a request, 200 if it may pass, and the answer's headers otherwise."""
        given = dict(scope["headers"])
        host = given.get(b"host", b"")
        if not LOOPBACK.fullmatch(host.decode("latin-1")):
            return 403, []
        if given.get(b"origin", b"http://" + host) != b"http://" + host:
            return 403, []
        if not hmac.compare_digest(given.get(b"authorization", b""), self._expected):
            return 401, [(b"www-authenticate", b'Basic realm="latent-gpt"')]
        if scope["path"] == LOGIN:
            return 303, [(b"location", b"http://" + host + b"/")]
        return 200, []


def prepare(database: Path) -> None:
    """See to it that a database has MLflow's present schema. It appears complete, or stays as it was.

    One that cannot be brought there and holds no run is made anew: a first start that was killed left it.

    Raises:
        SystemExit: it cannot be brought there and may hold runs; says what to do.
    """
    from mlflow.store.db import utils

    def opened(path: Path) -> Any:
        return utils.create_sqlalchemy_engine(f"sqlite:///{path}")

    partial = database.with_name(PARTIAL)
    for left in database.parent.glob(f"{PARTIAL}*"):  # its journal, too
        left.unlink()
    if database.exists():
        try:
            engine = opened(database)
            version = utils._get_schema_version(engine)
            engine.dispose()
            if version == utils._get_latest_schema_revision():
                return
            with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(partial)) as new:
                old.backup(new)
            utils._upgrade_db(opened(partial))
            partial.replace(database)
            return
        except Exception as error:  # whatever its migrations raise
            if _may_hold_runs(database):
                said = " ".join(str(error).split())[:200]
                raise SystemExit(
                    f"error: {database.absolute()} cannot be brought to this MLflow's schema ({said});"
                    " move it away to begin without what it holds"
                ) from None
            partial.unlink(missing_ok=True)
    utils._initialize_tables(opened(partial))
    partial.replace(database)


def _may_hold_runs(database: Path) -> bool:
    try:
        with closing(sqlite3.connect(database)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            return "runs" in tables and bool(connection.execute("SELECT 1 FROM runs").fetchone())
    except sqlite3.DatabaseError:
        return True


def main(host: str, port: int) -> None:
    """Serve until somebody ends this process."""
    import uvicorn
    from mlflow.server import handlers

    prepare(Path(DATABASE))
    # Before the first request: two early ones would otherwise set the same things up at the same time.
    store, root = os.environ["_MLFLOW_SERVER_FILE_STORE"], os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"]
    handlers.initialize_backend_stores(store, default_artifact_root=root)
    from mlflow.server.fastapi_app import app

    guard = Guard(app, USER, json.loads(Path("credentials.json").read_text())["password"])
    uvicorn.run(guard, host=host, port=port, workers=1, access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
