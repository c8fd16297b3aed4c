"""The one local cache: verified, bounded, and safe between processes. S3 is a folder whose URI says s3."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import cache, storage
from model.plumbing.assets import AssetWriter, Manifest
from tests import ROOT

SIZE = 1000  # bytes of a file
DAY = 24 * 3600


class Remote:
    """A local store that is read as if it were S3, and what was downloaded from it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.calls = tmp_path / "store", [""][:0]
        monkeypatch.setenv("LATENT_GPT_STORE", str(self.store))
        monkeypatch.setenv("LATENT_GPT_CACHE", str(tmp_path / "cache"))
        download = storage.download_file

        def downloaded(uri: str, path: str | Path, sha256: str | None = None) -> None:
            self.calls.append(uri.removeprefix("s3://bucket/"))
            download(uri.replace("s3://bucket", str(self.store)), path, sha256)

        monkeypatch.setattr(storage, "download_file", downloaded)

    def asset(self, *names: str, seed: int = 0) -> Manifest:
        """An asset of these files, known by an S3 URI."""
        writer = AssetWriter("images", {"seed": seed}, {})
        for name in names:
            writer.add_bytes(name, f"{seed}{name}".encode().ljust(SIZE))
        made = writer.finish({})
        return made.at(f"s3://bucket/images/{made.key}")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    return Remote(tmp_path, monkeypatch)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many files of `SIZE` the cache may hold."""
    return lambda files: monkeypatch.setenv("LATENT_GPT_CACHE_GIB", str((files + 0.5) * SIZE / 2**30))


def kept(*manifests: Manifest) -> list[str]:
    """The names of the files that the cache holds, of any asset."""
    root = Path(os.environ["LATENT_GPT_CACHE"]) / "assets"
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.name != "manifest.json")


def asked(path: Path, seconds_ago: float) -> None:
    """Pretend that a copy was last asked for so long ago."""
    then = time.time_ns() - int(seconds_ago * 10**9)
    os.utime(path, ns=(then, path.stat().st_mtime_ns))


def test_a_file_is_downloaded_once_and_verified_again_when_it_changed(remote: Remote) -> None:
    manifest = remote.asset("a.tar")
    copy = cache.path(manifest, "a.tar")
    assert cache.path(manifest, "a.tar") == copy
    assert len(remote.calls) == 1
    copy.write_bytes(b"damaged")
    assert cache.path(manifest, "a.tar").read_bytes() == b"0a.tar".ljust(SIZE)
    assert len(remote.calls) == 2


def test_what_was_not_asked_for_the_longest_goes_first(remote: Remote, limit: Callable[[int], None]) -> None:
    manifest = remote.asset("a.tar", "b.tar", "c.tar", "d.tar")
    limit(3)
    for name in ("a.tar", "b.tar", "c.tar"):
        cache.path(manifest, name)
    cache.path(manifest, "a.tar")  # asked for again: b is the oldest now
    cache.path(manifest, "d.tar")
    assert kept() == ["a.tar", "c.tar", "d.tar"]
    cache.path(manifest, "b.tar")
    assert kept() == ["a.tar", "b.tar", "d.tar"]


def test_what_nobody_asked_for_in_a_month_goes_though_there_is_room(remote: Remote) -> None:
    manifest = remote.asset("a.tar", "b.tar", "c.tar")
    asked(cache.path(manifest, "a.tar"), 31 * DAY)
    asked(cache.path(manifest, "b.tar"), 29 * DAY)
    cache.path(manifest, "c.tar")
    assert kept() == ["b.tar", "c.tar"]


def test_copies_of_earlier_releases_and_of_killed_downloads_go(remote: Remote, tmp_path: Path) -> None:
    root, mine = tmp_path / "cache", tmp_path / "cache/models/mine"
    old = [root / f"{'a' * 64}.tar", root / "models" / ("b" * 64), root / "sets/tokenizer" / ("c" * 16)]
    for path in (*old[1:], mine):
        path.mkdir(parents=True)
    old[0].write_bytes(b"tar")
    manifest = remote.asset("a.tar", "b.tar")
    partial = cache.path(manifest, "a.tar").with_name(f"{storage.TEMPORARY}x")
    partial.write_bytes(b"half")
    cache.path(manifest, "b.tar")
    assert not any(path.exists() for path in (*old, partial))
    assert mine.exists(), "what is not ours stays"


def test_a_folder_stays_while_the_process_that_was_given_it_lives(
    remote: Remote, limit: Callable[[int], None], tmp_path: Path
) -> None:
    model, shards = remote.asset("net/a", "net/b"), remote.asset("c.tar", "d.tar", "e.tar", seed=1)
    limit(3)
    code = (
        "import sys; from model.plumbing import assets, cache\n"
        "manifest = assets.load(sys.argv[1]).at('s3://bucket/x')\n"
        "print(cache.folder(manifest), flush=True); sys.stdin.read()"
    )
    folder = cache._home(model)
    for name in ("net/a", "net/b"):
        cache.path(model, name)
    asked(folder / "net/a", DAY)
    asked(folder / "net/b", DAY)
    place = str(remote.store / "images" / model.key)
    with subprocess.Popen(
        [sys.executable, "-c", code, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline().strip() == str(folder)
        asked(folder / "net/a", DAY)
        asked(folder / "net/b", DAY)
        for name in ("c.tar", "d.tar", "e.tar"):
            cache.path(shards, name)
        assert kept() == ["a", "b", "e.tar"], "the model is older, and stays"
        other.stdin.close()
        assert other.wait(30) == 0
    cache.path(shards, "c.tar")
    cache.path(shards, "d.tar")
    assert kept() == ["c.tar", "d.tar", "e.tar"]
    assert not folder.exists()


def test_a_folder_holds_what_was_asked_for_and_its_manifest(remote: Remote) -> None:
    manifest = remote.asset("net/a", "net/b")
    folder = cache.folder(manifest, ["net/a"])
    assert kept() == ["a"]
    assert cache.folder(manifest) == folder
    assert kept() == ["a", "b"]
    assert len(remote.calls) == 2
    assert (folder / "manifest.json").read_bytes() == (
        remote.store / "images" / manifest.key / "manifest.json"
    ).read_bytes()


def test_a_local_store_is_used_where_it_is_and_damage_is_noticed(store: str) -> None:
    writer = AssetWriter("images", {}, {})
    writer.add_bytes("a.tar", b"right")
    made = writer.finish({})
    assert cache.path(made, "a.tar") == Path(made.uri, "a.tar")
    assert cache.folder(made) == Path(made.uri)
    Path(made.uri, "a.tar").write_bytes(b"wrong")
    for look in (lambda: cache.path(made, "a.tar"), lambda: cache.folder(made)):
        with pytest.raises(storage.Damaged, match=r"a\.tar is damaged: its SHA-256 is"):
            look()
    Path(made.uri, "a.tar").unlink()
    with pytest.raises(storage.Damaged, match=r"a\.tar is missing"):
        cache.folder(made)


def test_a_download_that_is_not_what_the_manifest_says_is_refused(remote: Remote) -> None:
    manifest = remote.asset("a.tar")
    (remote.store / "images" / manifest.key / "a.tar").write_bytes(b"x")
    with pytest.raises(storage.Damaged, match=r"a\.tar is damaged"):
        cache.path(manifest, "a.tar")
    assert kept() == []


def test_the_environment_limits_the_cache(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = remote.asset("a.tar")
    for wrong in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("LATENT_GPT_CACHE_GIB", wrong)
        with pytest.raises(UserError, match=f"LATENT_GPT_CACHE_GIB is '{wrong}'; it must be a number of GiB"):
            cache.path(manifest, "a.tar")
    monkeypatch.setenv("LATENT_GPT_CACHE_GIB", str(SIZE / 2**31))
    with pytest.raises(UserError, match="1000 bytes do not fit into a cache of 500 bytes; raise LATENT_GPT"):
        cache.path(manifest, "a.tar")


def test_what_is_in_use_and_fills_the_cache_is_said(remote: Remote, limit: Callable[[int], None]) -> None:
    limit(1)
    cache.folder(remote.asset("net/a"))
    with pytest.raises(UserError, match="are in use; raise LATENT_GPT_CACHE_GIB"):
        cache.folder(remote.asset("net/b", seed=1))


def test_a_copy_that_goes_before_it_is_opened_is_brought_again(remote: Remote) -> None:
    manifest = remote.asset("a.tar")
    opened: list[int] = []

    def read() -> bytes:
        opened.append(1)
        copy = cache._home(manifest) / "a.tar"
        if len(opened) < 3:
            copy.unlink()  # as another process does that needs the room
        return copy.read_bytes()

    assert cache.use(manifest, ["a.tar"], read) == b"0a.tar".ljust(SIZE)
    assert len(remote.calls) == 3
    with pytest.raises(UserError, match="vanish from the cache as soon as they are there"):
        cache.use(manifest, ["a.tar"], lambda: Path("nowhere").read_bytes())


def test_processes_beside_each_other_download_once(remote: Remote, tmp_path: Path) -> None:
    manifest = remote.asset("a.tar")
    code = (
        "import sys; from pathlib import Path; from model.plumbing import assets, cache, storage\n"
        "real = storage.download_file\n"
        "def slow(uri, path, sha256=None):\n"
        "    import time; time.sleep(0.5); print('downloads', flush=True)\n"
        "    real(uri.replace('s3://bucket/x', sys.argv[1]), path, sha256)\n"
        "storage.download_file = slow\n"
        "cache.path(assets.load(sys.argv[1]).at('s3://bucket/x'), 'a.tar')\n"
    )
    place = str(remote.store / "images" / manifest.key)
    both = [
        subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    said = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert "".join(said).count("downloads") == 1


def test_what_was_taken_over_is_not_downloaded_again(remote: Remote) -> None:
    old = remote.asset("a", "b")
    cache.path(old, "a")
    writer = AssetWriter("images", {"grown_from": old.key}, {})
    for name in ("a", "b"):
        writer.add(old.lent(old.file(name)))
    made = writer.finish({})
    there = made.at(f"s3://bucket/images/{made.key}")
    for name in ("a", "b", "a"):
        assert cache.path(there, name).read_bytes() == cache.path(old, name).read_bytes()
    assert remote.calls == [f"images/{old.key}/a", f"images/{old.key}/b", f"images/{old.key}/b"]


def test_folders_are_filled_side_by_side_and_each_once(remote: Remote, limit: Callable[[int], None]) -> None:
    limit(3)
    filled: list[str] = []

    def fill(name: str, files: int) -> cache.Fill:
        def write(folder: Path, room: cache.Room) -> dict[str, object]:
            room(files * SIZE)
            (folder / name).write_bytes(b"x")
            filled.append(name)
            return {}

        return write

    def beside(name: str, files: int) -> Future[object]:
        return pool.submit(cache.unpacked, name, fill(name, files))

    def first(folder: Path, room: cache.Room) -> dict[str, object]:
        room(SIZE)
        room(2 * SIZE)  # as more turns out to come
        assert beside("other", 1).result(timeout=20)
        with pytest.raises(UserError, match=f"{3 * SIZE} are in use"):
            beside("third", 1).result(timeout=20)
        again.append(beside("first", 2))
        time.sleep(0.2)  # it waits
        raise UserError("no zip")

    again: list[Future[object]] = []
    with ThreadPoolExecutor() as pool:
        with pytest.raises(UserError, match="no zip"):
            cache.unpacked("first", first)
        again[0].result(timeout=20)
        beside("first", 2).result(timeout=20)
    assert filled == ["other", "first"]
