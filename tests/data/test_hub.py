"""Data sets of the hub: from a server that speaks as much of its API as we need, and from a cache alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from model.config import DataConfig, HubSource
from model.data import sources
from model.data.sources import hub, unpacked
from model.data.survey import look
from model.errors import UserError
from tests import ROOT
from tests.data.test_archives import files, tar, zipped
from tests.data.test_ingest import captions, picture
from tests.data.test_recognition import table
from tests.instances import ingest

Files = dict[str, bytes]
REPO = "them/flowers"


class Hub:
    """Data sets by name and revision, as https://huggingface.co serves them."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, str], Files] = {}
        self.asked: list[str] = []
        self.status = 200  # of all answers
        self.error = ""

    def put(self, content: Files, revision: str = "main", repo: str = REPO) -> str:
        """A revision, and its commit, which is returned."""
        commit = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        self.content[repo, revision] = self.content[repo, commit] = content
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if self.status != 200:
            return self.status, {"X-Error-Code": self.error}, b""
        if parts[0] == "api":
            repo, revision = "/".join(parts[2:4]), parts[5]
        else:
            repo, revision = "/".join(parts[1:3]), parts[4]
        if not any(name == repo for name, _ in self.content):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if (repo, revision) not in self.content:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = self.content[repo, revision]
        commit = self.put(content, revision, repo)
        if parts[0] == "api":
            listed = [{"rfilename": name, "size": len(data)} for name, data in content.items()]
            return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": listed}).encode()
        data = content["/".join(parts[5:])]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of this machine; the environment's caches are empty ones."""
    known = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = known.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((address, *template[1:])))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (hub, unpacked):
        monkeypatch.setattr(module, "SPARE", 0)
    yield known
    server.shutdown()
    server.server_close()


def config(uri: str = REPO) -> DataConfig:
    return DataConfig.model_validate(
        {"source": sources.recognise(uri), "image_size": 16, "max_bad_share": 1, "validation_share": 0}
    )


def rows(*numbers: int, name: str = "image") -> bytes:
    return table(**{name: [picture(n) for n in numbers], "caption": [f"picture {n}" for n in numbers]})


def told(*numbers: int) -> list[list[str]]:
    return sorted([f"picture {number}"] for number in numbers)


SHARD = object()  # stands for a tar, which needs a file to be made
CARD = (
    b"---\nconfigs:\n- config_name: b\n  data_files: b/*\n- config_name: a\n  default: true\n  data_files:\n"
)
LISTED = b"file_name,text\n0.png,picture 0\n1.png,picture 1\n"
LAYOUTS: dict[str, tuple[Files, list[list[str]]]] = {
    "parquet": (
        {
            "data/train-0-of-2.parquet": rows(0, 1),
            "data/train-1-of-2.parquet": rows(2),
            "data/test-0-of-1.parquet": rows(9),
            "README.md": b"# Flowers",
        },
        told(0, 1, 2),
    ),
    "one file": ({"flowers.parquet": rows(0), ".gitattributes": b""}, told(0)),
    "configurations": ({"de/train/0.parquet": rows(0), "en/train/0.parquet": rows(1)}, told(0)),
    "a card": (
        {
            "README.md": CARD
            + b"  - split: test\n    path: y/*\n  - split: train\n    path: [x/**, z.parquet]\n---\n",
            "b/train.parquet": rows(7),
            "x/deep/1.parquet": rows(1),
            "z.parquet": rows(2),
            "y/3.parquet": rows(3),
        },
        told(1, 2),
    ),
    "parquet that names pictures": (
        {
            "train.parquet": table(
                file_name=["pictures/0.png", "pictures/1.png"], text=["picture 0", "picture 1"]
            ),
            "pictures/0.png": picture(0),
            "pictures/1.png": picture(1),
            "test/9.png": picture(9),
            "README.md": b"---\nconfigs:\n- data_files: train.parquet\n---\n",
        },
        told(0, 1),
    ),
    "imagefolder": (
        {
            "train/metadata.csv": LISTED,
            "train/0.png": picture(0),
            "train/1.png": picture(1),
            "test/metadata.csv": LISTED,
            "test/0.png": picture(2),
        },
        told(0, 1),
    ),
    "folders of classes": (
        {
            "train/red apple/1.png": picture(0),
            "train/pear/2.png": picture(1),
            "validation/pear/3.png": picture(2),
        },
        [["pear"], ["red apple"]],
    ),
}


@pytest.mark.parametrize(("content", "expected"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_data_set_of_the_hub_is_recognised_and_made_into_images(content, expected, served, store):
    served.put(content)
    data = config()
    assert data.source == HubSource(repo=REPO)
    found = look(data.source, 16)
    assert found.kind.startswith("a data set of the hub, ")
    assert found.survey.captions == len(expected)
    assert captions(ingest(data)) == expected
    assert not any("test" in path or "validation" in path for path in served.asked)  # nor is it downloaded


def test_pictures_beside_parquet_files_that_have_their_own_are_not_downloaded(served):
    served.put({"train.parquet": rows(0), "logo.png": picture(9)})
    assert [record.captions for record in sources.iterate(HubSource(repo=REPO), 16)] == [["picture 0"]]
    assert not any("logo" in path for path in served.asked)


def test_shards_and_zips_of_a_data_set(served, store, here):
    shard = tar(here / "a.tar", files()).read_bytes()
    served.put({"train/00000.tar": shard, "test/00000.tar": shard})
    assert captions(ingest(config())) == told(*range(6))
    archive = zipped(here / "a.zip", files(4)).read_bytes()
    served.put({"flowers.zip": archive}, repo="them/zips")
    assert captions(ingest(config("them/zips"))) == told(*range(4))
    served.put({"a.zip": archive, "b.zip": archive}, repo="them/more")
    with pytest.raises(UserError, match="is of 2 zips, of which one would be read"):
        sources.fingerprint(HubSource(repo="them/more"))


def test_what_the_hub_converted_is_read_where_there_is_nothing_else(served, store):
    served.put({"flowers.py": b"raise SystemExit", "data.bin": b""})
    served.put({"default/train/0000.parquet": rows(0, 1), "x/train/0000.parquet": rows(5)}, hub.CONVERTED)
    assert captions(ingest(config())) == told(0, 1)


def test_a_branch_that_moved_on_is_news_and_a_commit_stays(served, store):
    first = served.put({"a.parquet": rows(0)})
    before = sources.fingerprint(HubSource(repo=REPO))
    assert sources.fingerprint(HubSource(repo=REPO)) == before
    served.put({"a.parquet": rows(0, 1)})
    assert sources.fingerprint(HubSource(repo=REPO)) != before
    pinned = config(f"https://huggingface.co/datasets/{REPO}/tree/{first}")
    assert sources.fingerprint(pinned.source) == before
    assert captions(ingest(pinned)) == told(0)


def test_units_do_not_tell_where_they_lie(served):
    served.put({"train/0.png": picture(0), "train/0.txt": b"zero"})
    (record,) = sources.iterate(HubSource(repo=REPO), 16)
    assert (record.key, record.unit, record.captions) == ("train/0.png", "train/0.png", ["zero"])


# ── without a network ───────────────────────────────────────────────────────────────────────────────────


def cached(home: Path, content: Files, commit: str = "a" * 40) -> Path:
    """What `huggingface_hub` leaves of a data set: blobs, and links to them."""
    below = home / "hub" / "datasets--them--flowers"
    for folder in ("refs", "blobs"):
        (below / folder).mkdir(parents=True)
    (below / "refs/main").write_text(commit)
    for name, data in content.items():
        blob = below / "blobs" / hashlib.sha1(data).hexdigest()
        blob.write_bytes(data)
        path = below / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(blob)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_a_cache_is_enough_where_the_hub_must_not_be_asked(layout, tmp_path, store):
    """In a process of its own, as people say so: by the environment."""
    content, expected = LAYOUTS[layout]
    home = cached(tmp_path / "home", {name: data for name, data in content.items() if "test" not in name})
    code = (
        "from tests.data.test_hub import *\n"
        "hub.SPARE = unpacked.SPARE = 0\n"
        "print(json.dumps(captions(ingest(config()))))\n"
    )
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "LATENT_GPT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def refused(source: HubSource) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as said:
        list(sources.iterate(source, 16))
    assert time.monotonic() - began < 15
    line = str(said.value)
    assert line.startswith("data.source.repo: ")
    assert "\n" not in line
    return line


def test_each_failure_is_one_line(served, monkeypatch):
    assert "is no data set of http://127.0.0.1" in refused(HubSource(repo="them/nothing"))
    assert "is no name of a data set" in refused(HubSource(repo="../x"))
    served.put({"notes.txt": b""})
    assert "has no Parquet files, tar shards or pictures" in refused(HubSource(repo=REPO))
    assert "has no revision 'v2'" in refused(HubSource(repo=REPO, revision="v2"))
    served.put({"test.parquet": rows(1)})
    assert "has no train split" in refused(HubSource(repo=REPO))
    served.put({"a.parquet": b"damaged"})
    with pytest.raises(UserError, match=r"^data.source.path: .*a.parquet"):
        list(sources.iterate(HubSource(repo=REPO), 16))
    served.put({"b.parquet": rows(1)})
    monkeypatch.setattr(hub, "SPARE", 1 << 60)
    assert "set HF_HOME to another place" in refused(HubSource(repo=REPO))
    served.status, served.error = 403, "GatedRepo"
    assert "is gated; ask for access at http://127.0.0.1" in refused(HubSource(repo=REPO))
    served.status, served.error = 500, ""
    assert "cannot be had from http://127.0.0.1" in refused(HubSource(repo=REPO))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "where the hub is out of reach, set HF_ENDPOINT" in refused(HubSource(repo=REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to ask the hub" in refused(HubSource(repo=REPO))


@pytest.mark.parametrize(
    "card",
    [
        b"---\nconfigs: 3\n---\n",
        b"---\n" + b"[" * 100_000 + b"\n---\n",
        b"---\n: :\n - \n---\n",
        b"\xff\xfe",
        b"---\nconfigs: [{data_files: ['" + b"**a" * 1000 + b"']}]\n---\n",
        b"---\nconfigs: [{data_files: {train: [1, null]}}]\n---\n",
        b"---\nconfigs: [{data_dir: 3}]\n---\n",
    ],
)
def test_cards_of_strangers_are_passed_over(card, served):
    served.put({"README.md": card, "a.parquet": rows(0)})
    began = time.monotonic()
    assert [record.captions for record in sources.iterate(HubSource(repo=REPO), 16)] == [["picture 0"]]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["../a.parquet", "/a.parquet", "x/../../a.parquet", ".hidden/a.parquet"])
def test_names_that_lead_elsewhere_are_not_asked_for(name, served):
    served.put({name: rows(0), "b.parquet": rows(1)})
    assert [record.captions for record in sources.iterate(HubSource(repo=REPO), 16)] == [["picture 1"]]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("a/*.parquet", ["a/1.parquet"]),
        ("**", ["a/1.parquet", "a/b/2.parquet", "3.parquet"]),
        ("**/*.parquet", ["a/1.parquet", "a/b/2.parquet", "3.parquet"]),
        ("a/**", ["a/1.parquet", "a/b/2.parquet"]),
        ("./3.parquet", []),  # as it is told, without the dot: see `_said_by_card`
        ("?.parquet", ["3.parquet"]),
    ],
)
def test_globs_of_cards(glob, names):
    assert hub._told([glob], ["a/1.parquet", "a/b/2.parquet", "3.parquet"]) == names
