"""An S3 that lies: whatever it answers, what is read is right or refused, in time and in bounded memory."""

from __future__ import annotations

import gc
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from model.errors import Unavailable, UserError
from model.plumbing import assets, storage
from model.plumbing.checkpoints import Checkpointer
from tests import peak
from tests.proxies import Answer, Hook, Request, proxy

pytestmark = pytest.mark.slow

DATA = b'{"step": 7, "sha256": {}}' * 40
HUGE = 10**15  # bytes
Lying = Callable[[Hook], None]


@pytest.fixture
def lying(services: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lying]:
    """A function that puts a proxy before the real S3, for the rest of the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def lie(hook: Hook) -> None:
            url = stack.enter_context(proxy(services["S3_ENDPOINT_URL"], hook))
            monkeypatch.setenv("S3_ENDPOINT_URL", url)

        yield lie


@pytest.fixture
def uri(services: dict[str, str]) -> str:
    """An object of DATA, which the real S3 holds."""
    place = storage.join(services["LATENT_GPT_STORE"], uuid.uuid4().hex)
    storage.write_bytes(place, DATA)
    return place


def shortened(answer: Answer) -> None:
    answer.body = answer.body[:-7]


def emptied(answer: Answer) -> None:
    answer.body = b""


def flipped(answer: Answer) -> None:
    answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]


def lengthened(answer: Answer) -> None:
    answer.body += b" "


def huge(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(HUGE)


def huge_without_end(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(HUGE)
    answer.repeat = True


def negative(answer: Answer) -> None:
    answer.headers["Content-Length"] = "-5"


def cut(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.body = answer.body[:-7]


def without_etag(answer: Answer) -> None:
    answer.headers = {name: value for name, value in answer.headers.items() if name.lower() != "etag"}


LIES = [shortened, emptied, flipped, lengthened, huge, huge_without_end, negative, without_etag]


def always(lie: Callable[[Answer], None], times: int = 10**6) -> Hook:
    """Tell a lie in the first answers to reads of objects."""
    left = times

    def hook(request: Request, ask: Callable[[], Answer]) -> Answer:
        nonlocal left
        answer = ask()
        if request.method == "GET" and request.key and "list-type" not in request.path and left > 0:
            left -= 1
            lie(answer)
        return answer

    return hook


@contextmanager
def bounded(seconds: float, mebibytes: int = 300) -> Iterator[None]:
    """The block is quick, and takes no more memory than that."""
    gc.collect()  # what others left would make room within the block
    Path("/proc/self/clear_refs").write_text("5")  # the height of what went before is forgotten
    began, before = time.monotonic(), peak()
    yield
    assert time.monotonic() - began < seconds
    assert peak() - before < mebibytes * 1024


def test_the_bound_is_on_the_block_alone() -> None:
    assert b"x" * (1200 << 20)
    with pytest.raises(AssertionError), bounded(seconds=60):
        assert b"x" * (1000 << 20)
    with bounded(seconds=60):
        assert b"x" * (200 << 20)


@pytest.mark.parametrize("lie", LIES, ids=lambda one: one.__name__)
def test_a_lie_about_something_small_is_never_taken_for_it(
    lying: Lying, uri: str, lie: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", "0.3")
    lying(always(lie))
    with bounded(seconds=10), pytest.raises(UserError, match=re.escape(uri)):
        storage.read_bytes(uri)


@pytest.mark.parametrize("lie", [shortened, emptied, flipped, cut], ids=lambda one: one.__name__)
def test_what_is_damaged_on_its_way_once_comes_whole_the_second_time(
    lying: Lying, uri: str, lie: Callable[[Answer], None]
) -> None:
    lying(always(lie, times=1))
    assert storage.read_bytes(uri) == DATA


def test_a_read_of_something_small_is_one_request(lying: Lying, uri: str) -> None:
    asked: list[str] = []

    def count(request: Request, ask: Callable[[], Answer]) -> Answer:
        asked.append(request.method)
        return ask()

    lying(count)
    assert storage.read_bytes(uri) == DATA
    assert asked == ["GET"]


@pytest.mark.parametrize("lie", [huge, huge_without_end], ids=lambda one: one.__name__)
def test_a_download_of_an_absurd_size_is_refused_at_once(
    lying: Lying, uri: str, lie: Callable[[Answer], None], tmp_path: Path
) -> None:
    lying(always(lie))
    with bounded(seconds=10), pytest.raises(UserError, match=rf"has {HUGE} bytes and the disk .* left"):
        storage.download_file(uri, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_who_sends_a_byte_now_and_then_is_given_up(
    lying: Lying, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", "0.1")

    def drip(answer: Answer) -> None:
        answer.pause = 0.02  # a byte, so never a time-out

    lying(always(drip))
    with bounded(seconds=10), pytest.raises(Unavailable, match=r"S3 is too slow: \d+ bytes in 1 s"):
        storage.read_bytes(uri)


def test_a_server_that_does_not_know_ranges_is_refused_and_not_misread(lying: Lying, uri: str) -> None:
    def no_ranges(request: Request, ask: Callable[[], Answer]) -> Answer:
        if request.headers.get("Range"):
            return Answer(200, {"ETag": '"x"'}, DATA)
        return ask()

    lying(no_ranges)
    with storage.open_read(uri) as stream:
        stream.seek(100)
        with pytest.raises(UserError, match="S3 answers another question"):
            stream.read()


def test_who_sends_headers_a_byte_now_and_then_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drip(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client has had enough
            connection.sendall(b"HTTP/1.1 200 OK\r\nx-amz-note: ")
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)

    def serve() -> None:
        with suppress(OSError):  # the test is over
            while True:
                threading.Thread(target=drip, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("LATENT_GPT_S3_PATIENCE", "0.1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        for ask in (storage.exists, storage.read_bytes, storage.list_sizes, storage.delete):
            with (
                bounded(seconds=5),
                pytest.raises(Unavailable, match="S3 is too slow: no whole answer in 2 s"),
            ):
                ask("s3://bucket/key")


@pytest.mark.parametrize("name", ["Contents", "Nothing"])
def test_a_listing_that_never_ends_is_given_up(
    lying: Lying, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = 0

    def on_and_on(request: Request, ask: Callable[[], Answer]) -> Answer:
        nonlocal asked
        asked += 1
        said = f"<{name}><Key>a/{asked}</Key><Size>1</Size></{name}>"
        said += f"<IsTruncated>true</IsTruncated><NextContinuationToken>{asked}</NextContinuationToken>"
        return Answer(200, {}, f"<ListBucketResult>{said}</ListBucketResult>".encode())

    monkeypatch.setattr(storage, "MOST_EMPTY", 7)
    monkeypatch.setattr(storage, "MOST_LISTED", 7)
    lying(on_and_on)
    with pytest.raises(UserError, match="s3://bucket/a: S3's listing does not end"):
        storage.list_sizes("s3://bucket/a")
    assert asked == 8


@pytest.mark.parametrize("what", ["Key", "Size", "LastModified"])
def test_a_listing_that_leaves_something_out_is_refused(lying: Lying, uri: str, what: str) -> None:
    def silent(request: Request, ask: Callable[[], Answer]) -> Answer:
        answer = ask()
        answer.body = re.sub(rf"<{what}>.*?</{what}>".encode(), b"", answer.body)
        return answer

    lying(silent)
    with pytest.raises(UserError, match=f"S3's answer has no {what}; this is not a working store"):
        storage.listing(uri.rpartition("/")[0])


@pytest.mark.parametrize(
    "ask",
    [
        storage.mark,
        lambda uri: storage.fingerprint(uri, ("",)),
        lambda uri: list(storage.marks(uri.rpartition("/")[0])),
    ],
)
def test_an_object_without_an_etag_has_no_mark(lying: Lying, uri: str, ask: Callable[[str], object]) -> None:
    def silent(request: Request, ask: Callable[[], Answer]) -> Answer:
        answer = ask()
        without_etag(answer)
        answer.body = re.sub(rb"<ETag>.*?</ETag>", b"", answer.body)
        return answer

    lying(silent)
    with pytest.raises(UserError, match="S3's answer has no ETag; this is not a working store"):
        ask(uri)


def test_a_listing_without_bounds_is_not_kept(lying: Lying) -> None:
    def endless(request: Request, ask: Callable[[], Answer]) -> Answer:
        return Answer(
            200, {"Content-Length": str(HUGE)}, b"<ListBucketResult>" + b" " * storage.MIB, repeat=True
        )

    lying(endless)
    with bounded(seconds=10), pytest.raises(UserError, match=f"more than {storage.LARGEST_ANSWER} bytes"):
        storage.list_sizes("s3://bucket/a")


@pytest.mark.parametrize("lie", [shortened, emptied, flipped], ids=lambda one: one.__name__)
def test_a_lie_about_a_manifest_or_a_marker_ends_nothing_in_a_trace(
    services: dict[str, str], lying: Lying, lie: Callable[[Answer], None]
) -> None:
    writer = assets.AssetWriter("images", {"a": 1}, {})
    writer.add_bytes("one", b"1")
    made = writer.finish({})
    checkpoints = Checkpointer(storage.join(services["LATENT_GPT_STORE"], "checkpoints"))
    checkpoints.save(1, state())
    lying(always(lie))
    with pytest.raises(storage.Damaged):
        assets.load(made.uri)
    assert checkpoints.latest() is None


@pytest.mark.parametrize("marker", [b"null", b"[]", b"7", b'{"step": 1, "sha256": 7}', b"", b"\xff"])
def test_a_damaged_marker_gives_way_to_the_checkpoint_before_it(store: str, marker: bytes) -> None:
    checkpoints = Checkpointer(store)
    checkpoints.save(1, state())
    checkpoints.save(2, state())
    storage.write_bytes(storage.join(store, "step-00000002", "complete.json"), marker)
    found = checkpoints.latest()
    assert found is not None
    assert found[0] == 1


def state() -> dict[str, object]:
    return {"weight": torch.zeros(1), "done": 1}
