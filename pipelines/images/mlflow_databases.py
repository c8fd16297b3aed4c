"""What comes before MLflow's server: its databases at its own schema, and the user whom the Secret names.

    python mlflow_databases.py FILE

Run by an init container at each start, so that who changes the Secret has changed the password. FILE is where
the server finds how to authenticate (MLFLOW_AUTH_CONFIG_PATH). Users are kept in the same database as runs.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.db import utils
from sqlalchemy import inspect, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

# Seconds for which MLflow knows a password again. Else each request has it hashed anew, which is slow on
# purpose: beside each other on a busy machine, a request took 1.0 to 1.9 s, and with this 0.02 to 0.09 s.
REMEMBERED = 300
LOCK = 7_246_903  # any number; of two servers that start at the same time, one waits for the other


@contextmanager
def alone(engine: Engine) -> Iterator[None]:
    """Nobody else does this to a PostgreSQL meanwhile. A file has one server anyway."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_lock({LOCK})"))
        yield  # the lock goes with its connection


def bring_up_to_date(engine: Engine) -> None:
    """Make or migrate MLflow's tables, and say so. A file is copied first."""
    newest = utils._get_latest_schema_revision()
    if not inspect(engine).has_table("alembic_version"):
        print(f"MLflow's database is new: made at schema {newest}")
        utils._initialize_tables(engine)
    elif (version := utils._get_schema_version(engine)) != newest:
        kept = ""
        if engine.dialect.name == "sqlite":
            before = copied(Path(str(engine.url.database)), version)
            kept = f"; as it was it stays in {before}"
        print(f"MLflow's database is migrated from schema {version} to {newest}{kept}")
        utils._upgrade_db(engine)
    else:
        print(f"MLflow's database is at schema {version}")


def copied(database: Path, version: str) -> Path:
    """The copy of a file that is of this version: made whole or not at all, and never a second time.

    A migration that failed half-way left the file at the same version, and is not what is to be kept.
    """
    before, unfinished = Path(f"{database}.{version}"), Path(f"{database}.unfinished")
    if not before.exists():
        unfinished.unlink(missing_ok=True)
        with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(unfinished)) as copy:
            old.backup(copy)
        unfinished.rename(before)
    return before


def name_administrator(uri: str, user: str, password: str) -> None:
    """Let this user in with this password and no other."""
    store = SqlAlchemyStore()
    store.init_db(uri)
    if store.has_user(user):
        store.update_user(user, password=password, is_admin=True)
    else:
        store.create_user(user, password, is_admin=True)


def main(settings: Path) -> None:
    """All of it; what is wrong ends in one line."""
    names = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    if missing := [name for name in names if not os.environ.get(name)]:
        sys.exit(f"error: {', '.join(missing)} not set; MLflow lets nobody in without them")
    uri, user, password = (os.environ[name] for name in names)
    settings.write_text(
        "[mlflow]\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "default_permission = READ\n"
        f"database_uri = {uri.replace('%', '%%')}\n"
        f"admin_username = {user}\n"
        f"auth_cache_ttl_seconds = {REMEMBERED}\n"
    )
    settings.chmod(0o600)
    engine = utils.create_sqlalchemy_engine_with_retry(uri)
    with alone(engine):
        bring_up_to_date(engine)
        name_administrator(uri, user, password)
    print(f"{user} is MLflow's administrator, with the Secret's password")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
