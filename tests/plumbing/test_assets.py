"""Assets: the same work has the same place, is complete or not there, and is what its checksums say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from model.errors import UserError
from model.plumbing import assets, cache, storage
from model.plumbing.assets import AssetWriter, File, Manifest


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind, named by the environment."""
    if request.param == "local":
        return request.getfixturevalue("store")
    return request.getfixturevalue("services")["LATENT_GPT_STORE"]


def write(config: dict[str, object] | None = None, data: bytes = b"data", **inputs: Manifest) -> Manifest:
    """A small asset."""
    writer = AssetWriter("images", config or {"size": 64}, inputs)
    writer.add_bytes("b/train-00000.tar", data)
    writer.add_bytes("a.jsonl", b"")
    return writer.finish({"pictures": 3})


def test_an_asset_is_found_only_when_it_is_complete(root: str) -> None:
    writer = AssetWriter("images", {"size": 64}, {})
    writer.add_bytes("train-00000.tar", b"data")
    assert writer.uri.startswith(root)
    assert assets.find(writer.uri) is None
    with pytest.raises(storage.NotFound, match=r"is not a complete asset: it has no manifest.json"):
        assets.load(writer.uri)
    made = writer.finish({"pictures": 3})
    assert assets.find(writer.uri) == made
    assert assets.load(writer.uri) == made


def test_the_same_work_gives_the_same_bytes(root: str) -> None:
    first = write()
    data = storage.read_bytes(storage.join(first.uri, assets.NAME))
    assert write() == first  # the race for the manifest is lost to an identical one
    storage.delete_prefix(first.uri)
    assert write() == first
    assert storage.read_bytes(storage.join(first.uri, assets.NAME)) == data


def test_other_work_has_another_place(store: str) -> None:
    image = write()
    other = write({"size": 32})
    uris = {
        image.uri,
        other.uri,
        write({"size": 64}, child=image).uri,
        write({"size": 64}, child=other).uri,
        AssetWriter("tokens", {"size": 64}, {}).uri,
    }
    assert len(uris) == 5


def test_hashes_do_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, uris = [], []
    for name in ("one", "two"):
        monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / name))
        made.append(write(child=write({"size": 1})))
        uris.append(made[-1].uri)
    assert uris[0] != uris[1]
    assert made[0].sha256 == made[1].sha256
    assert made[0].key == made[1].key
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = assets.find(uris[0].replace("/one/", "/moved/"))
    assert moved
    assert "/moved/" in moved.uri
    assert moved.sha256 == made[0].sha256


def test_another_result_does_not_replace_the_first(root: str) -> None:
    first = write()
    with pytest.raises(UserError, match="was finished by another run"):
        write(data=b"tada")
    assert assets.load(first.uri) == first
    assert storage.read_bytes(first.where("b/train-00000.tar")) == b"data"


def test_another_result_that_was_begun_before_the_first_was_finished_is_refused(root: str) -> None:
    late = AssetWriter("images", {"size": 64}, {})
    late.add_bytes("c.jsonl", b"")
    first = write()
    with pytest.raises(UserError, match="was finished by another run"):
        late.finish({"pictures": 3})
    assert assets.find(first.uri) == first


def test_whether_another_run_was_quicker_is_asked_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    load = assets.load
    monkeypatch.setattr(assets, "load", lambda uri: asked.append(uri) or load(uri))
    made = write()
    assert asked == [made.uri]


def test_finishing_deletes_the_checkpoints(root: str) -> None:
    writer = AssetWriter("transformer", {}, {})
    storage.write_bytes(storage.join(writer.uri, "checkpoints/step-1/tensors"), b"x")
    writer.add_bytes("model.safetensors", b"x")
    writer.finish({})
    assert list(storage.list_sizes(writer.uri)) == ["manifest.json", "model.safetensors"]


def test_work_that_is_done_stays_done_where_tidying_up_after_it_fails(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(uri: str) -> None:
        raise UserError(f"{uri}: access denied")

    writer = AssetWriter("tokens", {}, {})
    storage.write_bytes(storage.join(writer.uri, "parts/0.json"), b"x")
    monkeypatch.setattr(storage, "delete_prefix", refuses)
    made = writer.finish({}, scratch="parts")
    assert assets.find(writer.uri) == made
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"tokens | warning: {writer.uri}/parts is of no use any more and stays: ")


def test_a_flipped_bit_is_seen_by_who_reads(root: str) -> None:
    made = write()
    uri = storage.join(made.uri, "b/train-00000.tar")
    storage.write_bytes(uri, b"dat`")
    assert assets.find(made.uri) == made  # the size is right: only reading shows it
    with pytest.raises(storage.Damaged, match=rf"{uri} is damaged: its SHA-256 is"):
        cache.folder(made)
    with pytest.raises(UserError, match=r"has no file c; it has a.jsonl, b/train-00000.tar"):
        cache.folder(made, ["c"])


def test_a_missing_or_cut_file_is_named(root: str) -> None:
    made = write()
    uri = storage.join(made.uri, "b/train-00000.tar")
    storage.write_bytes(uri, b"da")
    with pytest.raises(UserError, match=rf"{uri} has 2 bytes, its manifest says 4 bytes; delete"):
        assets.find(made.uri)
    storage.delete(uri)
    with pytest.raises(UserError, match=rf"{uri} is missing"):
        assets.find(made.uri)


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"{}", b'{"schema_version": 2}', b'{"schema_version": 1e999}', b"[" * 10**5,
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(store: str, damage: bytes) -> None:
    made = write()
    storage.write_bytes(storage.join(made.uri, assets.NAME), damage)
    with pytest.raises(UserError, match=r"manifest.json is damaged .*delete .* so that it is made again"):
        assets.load(made.uri)


def test_a_manifest_without_end_is_not_read(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write()
    monkeypatch.setattr(assets, "LARGEST", 100)
    with pytest.raises(UserError, match=r"manifest.json has \d+ bytes; 100 are read into memory at most"):
        assets.load(made.uri)


@pytest.mark.parametrize(
    ("schema", "way"),
    [(1, "an earlier latent-gpt made it; run the pipeline again"), (3, "update latent-gpt")],
)
def test_another_schema_is_refused(store: str, schema: int, way: str) -> None:
    made = write()
    uri = storage.join(made.uri, assets.NAME)
    values = json.loads(storage.read_bytes(uri)) | {"schema_version": schema}
    storage.write_bytes(uri, json.dumps(values).encode())
    with pytest.raises(UserError, match=f"has schema {schema}; this version reads 2: {way}"):
        assets.load(made.uri)


def test_inputs_are_found_where_the_store_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "one"))
    made = write(child=write({"size": 1}))
    assert str(tmp_path) not in storage.read_bytes(storage.join(made.uri, assets.NAME)).decode()
    (tmp_path / "one").rename(tmp_path / "moved")
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "moved"))
    assert made.input("child").uri.startswith(str(tmp_path / "moved"))


def test_an_input_with_other_bytes_is_refused(store: str) -> None:
    made = write(child=write({"size": 1}))
    storage.delete_prefix(made.input("child").uri)
    write({"size": 1}, data=b"tada")
    with pytest.raises(UserError, match="is not the asset that was used"):
        made.input("child")


def test_the_version_of_a_step_moves_its_assets(store: str) -> None:
    assert AssetWriter("tokens", {}, {}, version=1).uri != AssetWriter("tokens", {}, {}, version=2).uri


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, math.nan]])
def test_what_is_not_finite_is_not_kept(store: str, value: object) -> None:
    writer = AssetWriter("tokens", {}, {})
    with pytest.raises(UserError, match=r"^tokens: psnr is .*(nan|inf)"):
        writer.finish({"psnr": value})
    assert assets.find(writer.uri) is None


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "."])
def test_names_stay_inside_the_asset(name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain relative path"):
        File(name=name, size=0, sha256="")


def grown(old: Manifest) -> Manifest:
    """An asset that takes a file of another one over, and has one of its own."""
    writer = AssetWriter("images", {"grown_from": old.key}, {})
    writer.add(old.lent(old.file("b/train-00000.tar")))
    writer.add_bytes("b/train-00001.tar", b"new")
    return writer.finish({})


def test_a_file_that_was_taken_over_is_read_where_it_lies(root: str) -> None:
    old = write()
    made = assets.load(grown(old).uri)
    assert list(storage.list_sizes(made.uri)) == ["b/train-00001.tar", "manifest.json"]
    assert assets.find(made.uri) == made
    assert made.where("b/train-00000.tar") == f"{old.uri}/b/train-00000.tar"
    assert made.where("b/train-00001.tar") == f"{made.uri}/b/train-00001.tar"
    assert [cache.path(made, file.name).read_bytes() for file in made.files] == [b"data", b"new"]
    folder = cache.folder(made)
    assert [(folder / file.name).read_bytes() for file in made.files] == [b"data", b"new"]
    again = grown(made)  # what was taken over twice lies where it was made
    assert again.file("b/train-00000.tar").asset == f"images/{old.key}"
    storage.delete(old.where("b/train-00000.tar"))
    with pytest.raises(UserError, match=rf"{old.uri}/b/train-00000.tar is missing, its manifest says"):
        assets.find(made.uri)


def test_where_bytes_lie_is_no_part_of_what_they_are(store: str) -> None:
    old = write()
    assert '"asset"' not in old.text.decode()
    writer = AssetWriter("images", {"grown_from": old.key}, {})
    writer.add_bytes("b/train-00000.tar", b"data")
    writer.add_bytes("b/train-00001.tar", b"new")
    whole = writer.finish({})
    storage.delete_prefix(whole.uri)
    assert grown(old).sha256 == whole.sha256


def test_what_was_taken_over_is_found_in_a_copy_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "one"))
    made = grown(write())
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = assets.find(made.uri.replace("/one/", "/moved/"))
    assert moved
    assert cache.path(moved, "b/train-00000.tar").read_bytes() == b"data"
    monkeypatch.setenv("LATENT_GPT_STORE", str(tmp_path / "moved"))
    assert cache.path(assets.load(assets.place("images", made.key)), "b/train-00000.tar").exists()


@pytest.mark.parametrize("asset", ["images/../../x", "/images/0123456789abcdef", "s3://b/images"])
def test_an_asset_that_holds_bytes_is_named_by_kind_and_key(asset: str) -> None:
    with pytest.raises(ValueError, match="asset"):
        File(name="a", size=0, sha256="", asset=asset)
