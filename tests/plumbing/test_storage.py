"""Storage: the same promises on a local folder and on the real S3, and one clear line for each failure."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from botocore.retries.standard import ExponentialBackoff

from model.errors import Unavailable, UserError
from model.plumbing import storage
from model.plumbing.storage import MIB
from tests.proxies import Answer, Request, certificate, proxy


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind."""
    if request.param == "local":
        return request.getfixturevalue("store")
    return request.getfixturevalue("services")["LATENT_GPT_STORE"]


@pytest.mark.parametrize("wrong", ["soon", "0", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", wrong)
    message = f"LATENT_GPT_S3_PATIENCE is '{wrong}'; it must be a number of seconds above 0, e.g. 10"
    with pytest.raises(UserError, match=message):
        storage.read_bytes("s3://bucket/key")


@pytest.mark.parametrize(
    ("size", "part"),
    [(0, 16), (256 * MIB, 16), (512 * MIB, 32), (2**30, 64), (2**40, 64)],
)
def test_parts_grow_with_the_object_within_bounds(size: int, part: int) -> None:
    assert storage._part(size) == part * MIB
    assert storage._part(256 * MIB + 1) == 16 * MIB + 1


def test_join_and_split() -> None:
    assert storage.join("s3://bucket/a/", "/b/", "c.json") == "s3://bucket/a/b/c.json"
    assert storage.join("/data", "b") == "/data/b"
    assert storage.split("s3://bucket/a/b/") == ("bucket", "a/b")
    assert storage.split("s3://bucket") == ("bucket", "")


@pytest.mark.parametrize("uri", ["gs://bucket/key", "https://host/key", "file:///data"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="only s3://bucket/key and local paths"):
        storage.read_bytes(uri)


def test_the_store_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_GPT_STORE", raising=False)
    with pytest.raises(UserError, match="LATENT_GPT_STORE is not set"):
        storage.store_root()


def test_bytes_there_and_back(root: str) -> None:
    uri = storage.join(root, "a/b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"two"
    storage.write_bytes(storage.join(root, "empty"), b"")
    assert storage.read_bytes(storage.join(root, "empty")) == b""


def test_what_is_not_there_says_so(root: str) -> None:
    uri = storage.join(root, "missing")
    with pytest.raises(storage.NotFound, match=r"missing does not exist"):
        storage.read_bytes(uri)
    with pytest.raises(storage.NotFound):
        storage.open_read(uri)
    storage.delete(uri)  # no error


def test_only_one_of_many_writers_is_first(root: str) -> None:
    uri = storage.join(root, "once")
    won: list[int] = []

    def write(number: int) -> None:
        try:
            storage.write_bytes(uri, b"%d" % number, if_absent=True)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won[0]


def test_files_there_and_back_in_parts(root: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 40  # above the threshold of multipart uploads
    source, target = tmp_path / "source", tmp_path / "deep/target"
    source.write_bytes(data)
    uri = storage.join(root, "big")
    storage.upload_file(source, uri)
    storage.download_file(uri, target, hashlib.sha256(data).hexdigest())
    assert target.read_bytes() == data


def test_a_wrong_checksum_leaves_no_file(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"right")
    with pytest.raises(storage.Damaged, match=rf"{uri} is damaged.*manifest says {'0' * 16}"):
        storage.download_file(uri, tmp_path / "target", "0" * 64)
    assert list(tmp_path.glob("**/.partial-*")) == []
    assert not (tmp_path / "target").exists()


def test_a_copy_is_verified(root: str) -> None:
    data = os.urandom(3 * storage.PART)  # in parts
    source, target = storage.join(root, "a"), storage.join(root, "b/c")
    storage.write_bytes(source, data)
    storage.copy(source, target, hashlib.sha256(data).hexdigest())
    assert storage.read_bytes(target) == data
    with pytest.raises(storage.Damaged, match=f"{source} is damaged"):
        storage.copy(source, storage.join(root, "d"), "0" * 64)
    with pytest.raises(storage.NotFound, match=storage.join(root, "nothing")):
        storage.copy(storage.join(root, "nothing"), target, "0" * 64)


def test_streams_read_and_seek(root: str) -> None:
    data = os.urandom(3 << 20)
    uri = storage.join(root, "stream")
    storage.write_bytes(uri, data)
    with storage.open_read(uri) as stream:
        assert stream.read(10) == data[:10]
        assert stream.seek(-10, os.SEEK_END) == len(data) - 10
        assert stream.read() == data[-10:]
        stream.seek(2_000_000)
        assert stream.read(1_000) == data[2_000_000:2_001_000]
        stream.seek(0)
        assert stream.read() == data


def test_a_fingerprint_changes_with_names_and_contents(root: str) -> None:
    folder, suffixes = storage.join(root, "model"), (".json", ".safetensors")

    def mark() -> str:
        return storage.fingerprint(folder, suffixes)

    with pytest.raises(storage.NotFound, match="model"):
        mark()
    storage.write_bytes(storage.join(folder, "README"), b"words")
    with pytest.raises(storage.NotFound, match=r"holds nothing that ends in \.json or \.safetensors"):
        mark()
    storage.write_bytes(storage.join(folder, "config.json"), b"{}")
    storage.write_bytes(storage.join(folder, "a.safetensors"), b"one")
    before = mark()
    storage.write_bytes(storage.join(folder, "README"), b"other words")
    storage.write_bytes(storage.join(folder, "below/b.safetensors"), b"one")
    storage.write_bytes(storage.join(root, "model-2/b.safetensors"), b"one")
    assert mark() == before
    storage.write_bytes(storage.join(folder, "a.safetensors"), b"two")
    assert mark() != before
    storage.write_bytes(storage.join(folder, "a.safetensors"), b"one")
    assert mark() == before
    storage.write_bytes(storage.join(folder, "b.safetensors"), b"one")
    assert mark() != before
    file = storage.join(folder, "b.safetensors")
    alone = storage.fingerprint(file, suffixes)
    storage.write_bytes(file, b"two")
    assert storage.fingerprint(file, suffixes) != alone


def test_what_is_stored_is_told_from_names_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for ref in ("s3://b/k", "/data/model", "./model", "~/model", "here"):
        assert storage.is_stored(ref), ref
    for ref in ("", "openai", "owner/name", "owner/name/sub@v1"):
        assert not storage.is_stored(ref), ref


def test_folders_list_and_go(root: str) -> None:
    for name in ("set/b", "set/a/c", "set-2/d"):
        storage.write_bytes(storage.join(root, name), b"123")
    assert storage.list_sizes(storage.join(root, "set")) == {"a/c": 3, "b": 3}
    assert storage.list_uris(storage.join(root, "set-2")) == [storage.join(root, "set-2/d")]
    storage.delete_prefix(storage.join(root, "set"))
    assert storage.list_sizes(root) == {"set-2/d": 3}
    storage.delete_prefix(storage.join(root, "set"))  # nothing there is no error
    assert storage.list_sizes(storage.join(root, "set")) == {}


@pytest.mark.parametrize("look", [storage.listing, storage.list_sizes, storage.unfinished])
def test_what_is_deleted_while_a_folder_is_listed_is_passed_over(
    store: str, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], dict[object, object]]
) -> None:
    for name in ("a/kept", "a/.partial-kept", "a/gone", "a/.partial-gone", "b/step-1/file"):
        Path(store, name).parent.mkdir(parents=True, exist_ok=True)
        Path(store, name).write_bytes(b"")
    scan, is_file = os.scandir, Path.is_file

    def scan_late(folder: str | Path) -> object:
        if Path(folder).name == "step-1":
            Path(folder, "file").unlink()
            Path(folder).rmdir()
        return scan(folder)

    def gone_then(path: Path) -> bool:
        found = is_file(path)
        if path.name.endswith("gone"):
            path.unlink()
        return found

    monkeypatch.setattr(os, "scandir", scan_late)
    monkeypatch.setattr(Path, "is_file", gone_then)
    here = look(store)
    assert not Path(store, "b/step-1").exists()
    assert list(here) == [("a/.partial-kept", "") if look is storage.unfinished else "a/kept"]


def test_a_folder_that_goes_before_it_is_listed_holds_nothing(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_folder = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: is_folder(path) and not path.rmdir())
    assert storage.listing(store) == {}
    assert not Path(store).exists()


@pytest.mark.parametrize("look", [storage.listing, storage.unfinished])
def test_a_folder_that_the_disk_does_not_give_is_not_taken_for_empty(
    store: str, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], dict[object, object]]
) -> None:
    def broken(_: str | Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        look(store)


def test_ages_are_by_the_clock_of_the_store(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.ages(storage.join(root, "set")) == {}
    for name in ("set/a/old", "set/b", "set-2/c"):
        storage.write_bytes(storage.join(root, name), b"")
    time.sleep(2.5)
    storage.write_bytes(storage.join(root, "set/b"), b"again")
    monkeypatch.setattr(time, "time", lambda: 0.0)  # as our clock says
    found = storage.ages(storage.join(root, "set"))
    assert list(found) == ["a/old", "b"]
    assert 1.4 < found["a/old"] < 4.5, found
    assert 0 <= found["b"] < 1.6, found


@pytest.mark.slow
@pytest.mark.parametrize("said", ["", "soon"])
def test_an_s3_that_tells_no_time_tells_no_age(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    storage.write_bytes(storage.join(services["LATENT_GPT_STORE"], "x"), b"")
    answered = storage.client().list_objects_v2(Bucket=storage.split(services["LATENT_GPT_STORE"])[0])
    headers = answered["ResponseMetadata"]["HTTPHeaders"]
    with pytest.raises(UserError, match=r"s3://bucket/x: S3's answer bears no date"):
        storage._date("s3://bucket/x", {**headers, "date": said})
    assert storage._date("s3://bucket/x", headers).tzinfo


@pytest.mark.parametrize("uri", ["s3://bucket", "/"])
def test_everything_is_not_a_folder(uri: str) -> None:
    with pytest.raises(UserError, match="refusing to delete"):
        storage.delete_prefix(uri)


def test_a_store_that_works_passes_its_check(root: str) -> None:
    storage.check_store(root)
    assert storage.list_sizes(root) == {}


def test_a_failed_write_leaves_the_old_file(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(store, "file")
    storage.write_bytes(uri, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk") as caught:
        storage.write_bytes(uri, b"new")
    assert not isinstance(caught.value, Unavailable), "another try would find it full, too"
    monkeypatch.undo()
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in Path(store).iterdir()] == ["file"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A real one: /dev/full takes nothing, whatever the size."""
    with pytest.raises(UserError, match="no space left"), storage.explained("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_a_folder_in_the_place_of_a_file(store: str) -> None:
    storage.write_bytes(storage.join(store, "a/b"), b"")
    with pytest.raises(UserError, match="a file is needed"):
        storage.read_bytes(storage.join(store, "a"))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        for read in (storage.read_bytes, storage.open_read, storage.file_sha256):
            with pytest.raises(UserError, match=f"^{path} is not a regular file"):
                read(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop cannot be read: Too many levels of symbolic links"):
        storage.read_bytes(str(tmp_path / "loop"))


def test_what_is_too_large_for_the_memory_is_not_read(root: str) -> None:
    uri = storage.join(root, "a")
    storage.write_bytes(uri, bytes(11))
    assert storage.read_bytes(uri, 11) == bytes(11)
    with pytest.raises(UserError, match=rf"^{uri} has 11 bytes; 10 are read into memory at most"):
        storage.read_bytes(uri, 10)


def test_a_file_that_is_mostly_hole_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    right = storage.file_sha256(path)
    os.truncate(path, 1 << 42)
    with pytest.raises(UserError, match=rf"announces {1 << 42} bytes, and 1048576 are on the disk"):
        storage.file_sha256(path)
    os.truncate(path, 1 << 20)
    assert storage.file_sha256(path) == right


def test_folders_within_folders_are_walked_however_deep_in_the_order_of_who_asks(tmp_path: Path) -> None:
    here = tmp_path
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for _ in range(300):
        here /= "deeper"
        os.mkdir(here)
    (here / "file").touch()
    found = []
    for path, folders, names in storage.walk(tmp_path):
        folders[:] = sorted(folders, reverse=True)
        found.append((os.path.relpath(path, tmp_path), names))
    assert [path for path, _ in found if "/" not in path] == [".", "deeper", "2", "1", "0"]
    assert found[0][1] == ["loop"]
    assert found[300] == ("/".join(["deeper"] * 300), ["file"])
    told: list[OSError] = []
    assert list(storage.walk(tmp_path / "none", told.append)) == []
    assert [error.filename for error in told] == [str(tmp_path / "none")]


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [(500, "InternalError", True), (503, "SlowDown", True), (429, "Throttling", True), (400, "Bad", False)],
)
def test_a_server_with_a_fault_of_its_own_is_worth_another_try(status: int, code: str, again: bool) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with (
        pytest.raises(UserError, match=f"answers PutObject with {status} {code}") as caught,
        storage.explained("s3://bucket/key"),
    ):
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]
    assert isinstance(caught.value, Unavailable) == again


def test_an_unreachable_s3_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(Unavailable, match=r"s3://bucket: http://127.0.0.1:\d+ cannot be reached"):
        storage.check_store("s3://bucket")


def test_every_request_has_all_its_tries_however_many_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: Counter[str] = Counter()

    def refuse(request: Request, _: Callable[[], Answer]) -> Answer:
        tries[request.key] += 1
        return Answer.error(503, "ServiceUnavailable")

    def read(key: str) -> None:
        with pytest.raises(Unavailable, match="answers GetObject with 503"):
            storage.read_bytes(f"s3://bucket/{key}")

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    keys = [str(number) for number in range(2 * storage.THREADS)]
    with proxy("", refuse) as url, ThreadPoolExecutor(storage.THREADS) as pool:
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        list(pool.map(read, keys))
    assert tries == dict.fromkeys(keys, storage.ATTEMPTS)


def test_half_of_the_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "half")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(UserError, match="set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage.read_bytes("s3://bucket/key")


def test_an_endpoint_without_scheme_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(UserError, match="must start with http"):
        storage.check_store("s3://bucket")


def url_of_a_request() -> str:
    """Where an object would be read."""
    params = {"Bucket": "pictures", "Key": "one"}
    return storage.client().generate_presigned_url("get_object", Params=params)


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("", "https://s3.example/pictures/one?"),
        ("s3 =\n  addressing_style = virtual\n", "https://pictures.s3.example/one?"),
        ("endpoint_url = https://elsewhere.example\n", "https://s3.example/pictures/one?"),
    ],
)
def test_what_the_users_files_say_of_s3_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, place: str
) -> None:
    (tmp_path / "config").write_text(f"[profile work]\nregion = eu-central-1\n{said}")
    for name, value in {
        "S3_ENDPOINT_URL": "https://s3.example",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_PROFILE": "work",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    assert url_of_a_request().startswith(place)
    assert "eu-central-1" in url_of_a_request() or storage.client().meta.region_name == "eu-central-1"


def test_a_profile_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"profile \(work\) could not be found; check AWS_PROFILE"):
        storage.read_bytes("s3://bucket/key")


def test_a_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "S3_ENDPOINT_URL": "http://s3.example",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"cannot be reached through the proxy that HTTP_PROXY"):
        storage.check_store("s3://bucket")


@pytest.mark.slow
def test_a_certificate_of_an_own_authority_needs_its_file(
    services: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = certificate(tmp_path)
    with proxy(services["S3_ENDPOINT_URL"], lambda _, ask: ask(), tls=tmp_path) as url:
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        with pytest.raises(UserError, match=r"certificate verify failed.*; .* set AWS_CA_BUNDLE to"):
            storage.check_store(services["LATENT_GPT_STORE"])
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        storage.check_store(services["LATENT_GPT_STORE"])
        uri = storage.join(services["LATENT_GPT_STORE"], "a.parquet")
        pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
        storage.upload_file(tmp_path / "a.parquet", uri)
        with storage.open_read(uri) as file:
            assert pq.read_table(file).num_rows == 2


@pytest.mark.slow
class TestRealS3:
    """What only a server can show."""

    @pytest.mark.parametrize(
        ("name", "value"), [("AWS_ACCESS_KEY_ID", "wrong"), ("AWS_SECRET_ACCESS_KEY", "wrong")]
    )
    def test_wrong_credentials(
        self, services: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            storage.check_store(services["LATENT_GPT_STORE"])
        with pytest.raises(UserError, match=r"check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            storage.write_bytes(storage.join(services["LATENT_GPT_STORE"], "x"), b"x")

    def test_a_missing_bucket_is_named(self, services: dict[str, str]) -> None:
        with pytest.raises(storage.NotFound, match="bucket no-such-bucket does not exist"):
            storage.read_bytes("s3://no-such-bucket/key")

    def test_the_check_creates_the_bucket(self, services: dict[str, str]) -> None:
        bucket = f"s3://made-{os.urandom(4).hex()}"
        storage.check_store(bucket)
        storage.write_bytes(storage.join(bucket, "x"), b"x")
        assert storage.list_sizes(bucket) == {"x": 1}

    def test_a_stream_does_not_mix_versions(self, services: dict[str, str]) -> None:
        uri = storage.join(services["LATENT_GPT_STORE"], "changing")
        storage.write_bytes(uri, b"a" * 5_000_000)
        with storage.open_read(uri) as stream:
            stream.read(1)
            storage.write_bytes(uri, b"b" * 5_000_000)
            stream.seek(4_000_000)
            with pytest.raises(UserError, match="was replaced while it was read"):
                stream.read(1)

    def test_many_objects_are_listed_and_deleted(self, services: dict[str, str]) -> None:
        folder = storage.join(services["LATENT_GPT_STORE"], "many")
        for number in range(1100):  # S3 answers 1,000 at a time
            storage.write_bytes(storage.join(folder, f"{number:04}"), b"")
        assert len(storage.list_uris(folder)) == 1100
        storage.delete_prefix(folder)
        assert storage.list_uris(folder) == []


@pytest.mark.slow
class TestFrozenS3:
    """An S3 that stands still: outlived if it wakes up in time, else one clear line."""

    @pytest.fixture
    def weed(self, services: dict[str, str]) -> int:
        """Process id of the S3 server."""
        port = services["S3_ENDPOINT_URL"].rpartition(":")[2]
        listing = subprocess.run(["ss", "-ltnpH", f"sport = :{port}"], capture_output=True, text=True).stdout
        return int(listing.partition("pid=")[2].partition(",")[0])

    def test_for_good(
        self, services: dict[str, str], monkeypatch: pytest.MonkeyPatch, weed: int, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", "0.3")
        monkeypatch.setattr(storage, "client", functools.partial(storage.client, attempts=2))
        uri = storage.join(services["LATENT_GPT_STORE"], "x")
        storage.write_bytes(uri, b"x")
        os.kill(weed, signal.SIGSTOP)
        try:
            for attempt in (
                lambda: storage.write_bytes(uri, b"y" * 100),
                lambda: storage.read_bytes(uri),
                lambda: storage.download_file(uri, tmp_path / "x"),
            ):
                with pytest.raises(Unavailable, match="does not answer"):
                    attempt()
            monkeypatch.undo()
            for name, value in services.items():
                monkeypatch.setenv(name, value)
            with pytest.raises(Unavailable, match="does not answer"):
                storage.check_store(services["LATENT_GPT_STORE"])
        finally:
            os.kill(weed, signal.SIGCONT)
        assert list(tmp_path.iterdir()) == []
        assert storage.exists(uri)

    def test_for_a_moment(self, services: dict[str, str], monkeypatch: pytest.MonkeyPatch, weed: int) -> None:
        monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", "2")
        data = os.urandom(30 << 20)
        uri = storage.join(services["LATENT_GPT_STORE"], "x")
        storage.write_bytes(uri, data)
        with storage.open_read(uri) as stream:
            start = stream.read(1000)
            os.kill(weed, signal.SIGSTOP)
            threading.Timer(3, os.kill, (weed, signal.SIGCONT)).start()
            assert start + stream.read() == data
        os.kill(weed, signal.SIGSTOP)
        threading.Timer(3, os.kill, (weed, signal.SIGCONT)).start()
        storage.write_bytes(uri, b"after")
        assert storage.read_bytes(uri) == b"after"
