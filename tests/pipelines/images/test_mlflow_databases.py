"""What an init container does to MLflow's database: made, kept, migrated with a copy; and who gets in."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow

PROGRAM = str(ROOT / "pipelines/images/mlflow_databases.py")

# MLflow's authentication imports it for a page on which users sign up. The image has it.
CSRF = "class CSRFProtect: ...\n"
PASSWORD = "a password of today"
LETS_IN = """import sys
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore()
store.init_db(sys.argv[1])
print([store.authenticate_user("me", one) for one in sys.argv[2:]], store.get_user("me").is_admin)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "flask_wtf").mkdir()
    (tmp_path / "flask_wtf" / "__init__.py").touch()
    (tmp_path / "flask_wtf" / "csrf.py").write_text(CSRF)
    return tmp_path


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it beside the stand-in."""
    given = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_TRACKING_USERNAME": "me"}
    given |= {"MLFLOW_TRACKING_PASSWORD": PASSWORD, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **given}, capture_output=True, text=True)


def start(folder: Path, **environment: str) -> str:
    done = python(folder, PROGRAM, "basic_auth.ini", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lets_in(folder: Path, *passwords: str) -> str:
    done = python(folder, "-c", LETS_IN, f"sqlite:///{folder}/mlflow.db", *passwords)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_made_and_then_left_alone_and_the_password_is_the_secrets(folder: Path) -> None:
    assert "MLflow's database is new" in start(folder)
    assert lets_in(folder, PASSWORD, "another password") == "[True, False] True"
    again = start(folder, MLFLOW_TRACKING_PASSWORD="another password")
    assert "MLflow's database is at schema" in again
    assert lets_in(folder, PASSWORD, "another password") == "[False, True] True"
    said = (folder / "basic_auth.ini").read_text()
    assert "auth_cache_ttl_seconds = 300" in said, "or each request costs a hash"
    assert f"database_uri = sqlite:///{folder}/mlflow.db" in said
    assert "another password" not in said + again
    assert (folder / "basic_auth.ini").stat().st_mode & 0o777 == 0o600


def test_an_older_one_is_copied_and_migrated(folder: Path) -> None:
    start(folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        (newest,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    script = (
        "import sys; from alembic.script import ScriptDirectory; from mlflow.store.db import utils;"
        "config = utils._get_alembic_config('sqlite://');"
        "print(ScriptDirectory.from_config(config).get_revision('head').down_revision)"
    )
    before = python(folder, "-c", script).stdout.strip()
    stepped = "; ".join(
        (
            "import sys; from alembic import command; from mlflow.store.db import utils",
            "command.downgrade(utils._get_alembic_config(sys.argv[1]), sys.argv[2])",
        )
    )
    done = python(folder, "-c", stepped, f"sqlite:///{folder}/mlflow.db", before)
    if done.returncode:
        pytest.skip(f"MLflow cannot go back from its newest schema: {done.stderr.splitlines()[-1]}")
    said = start(folder)
    assert f"is migrated from schema {before} to {newest}" in said
    with closing(sqlite3.connect(folder / f"mlflow.db.{before}")) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchone() == (before,)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == (newest,)


COPIES = """import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import mlflow_databases
print(mlflow_databases.copied(Path(sys.argv[2]), "v1"))
"""


def test_a_second_try_leaves_the_copy_of_the_first(folder: Path) -> None:
    database, images = folder / "mlflow.db", str(Path(PROGRAM).parent)
    (folder / "mlflow.db.unfinished").write_text("of a copy that was cut off")
    for table in ("whole", "half_migrated"):
        with closing(sqlite3.connect(database)) as one:
            one.execute(f"CREATE TABLE {table} (id)")
            one.commit()
        done = python(folder, "-c", COPIES, images, str(database))
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{database}.v1"
    with closing(sqlite3.connect(folder / "mlflow.db.v1")) as copy:
        assert copy.execute("SELECT name FROM sqlite_master").fetchall() == [("whole",)]
    assert not (folder / "mlflow.db.unfinished").exists()


def test_without_a_password_nothing_starts(folder: Path) -> None:
    done = python(folder, PROGRAM, "ini", MLFLOW_TRACKING_PASSWORD="")
    assert done.returncode
    assert done.stderr.splitlines()[-1] == (
        "error: MLFLOW_TRACKING_PASSWORD not set; MLflow lets nobody in without them"
    )
    assert not (folder / "mlflow.db").exists()
