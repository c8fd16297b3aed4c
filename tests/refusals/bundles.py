"""Bundles of strangers, each one change away from a good one. Its name says what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "transformer/model.safetensors"
CONFIGS = {part: f"{part}/config.json" for part in ("tokenizer", "text", "transformer")}
DEEP = 10**5
HUGE = 1 << 42  # bytes of a file that is all hole

Change = Callable[[Path], object]


# ── ways to change one ──────────────────────────────────────────────────────────────────────────────────


def written(name: str, data: bytes | str) -> Change:
    """With other bytes in a file."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def gone(name: str) -> Change:
    """Without a file or folder."""

    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """With something else in a file's place."""

    def change(folder: Path) -> None:
        if (folder / name).exists():
            gone(name)(folder)
        make(folder / name)

    return change


def link(target: str) -> Callable[[Path], object]:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def hole(path: Path) -> None:
    """A file of terabytes, none of which are on the disk."""
    path.touch()
    os.truncate(path, HUGE)


def described(part: str, **values: Any) -> Change:
    """With other settings in the description of a part; tables are put into those that are there."""

    def merged(before: Any, after: Any) -> Any:
        if isinstance(before, dict) and isinstance(after, dict):
            return before | {name: merged(before.get(name), value) for name, value in after.items()}
        return after

    def change(folder: Path) -> None:
        path = folder / CONFIGS[part]
        path.write_text(json.dumps(merged(json.loads(path.read_text()), values)))

    return change


def pretrained(family: str, **architecture: Any) -> Change:
    """With the tokenizer of another project."""
    said = {"kind": "pretrained", "family": family, "architecture": architecture}
    return written(CONFIGS["tokenizer"], json.dumps(said))


def clip(vision: dict[str, Any] | None = None, **text: Any) -> Change:
    """With a CLIP of another architecture."""
    return described("text", architecture={"text_cfg": text, "vision_cfg": vision or {}})


def header(tensors: dict[str, Any] | str, behind: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of these tensors, as its table of contents has them."""
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + behind


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    """An entry of a table of contents."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def retold(change: Callable[[dict[str, Any]], object]) -> Change:
    """With another table of contents before the same bytes."""

    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        contents = json.loads(data[8 : 8 + length])
        change(contents)
        (folder / WEIGHTS).write_bytes(header(contents, data[8 + length :]))

    return rewrite


def first(contents: dict[str, Any]) -> dict[str, Any]:
    """The entry of the first tensor."""
    return next(entry for name, entry in contents.items() if name != "__metadata__")


def numbers(value: float) -> Change:
    """With a number in the first weight of the transformer."""

    def change(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        start = 8 + struct.unpack("<Q", data[:8])[0]
        data[start : start + 4] = struct.pack("<f", value)
        (folder / WEIGHTS).write_bytes(data)

    return change


def stored_as(dtype: str) -> Change:
    """With all weights of the transformer in another type, and right in all else."""

    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / WEIGHTS)
        save_file({name: one.to(getattr(torch, dtype)) for name, one in weights.items()}, folder / WEIGHTS)

    return change


def filled(value: float) -> Change:
    """With one number for all weights of the transformer."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / WEIGHTS)
        save_file({name: one.fill_(value) for name, one in weights.items()}, folder / WEIGHTS)

    return change


def net(part: str, *changes: Change) -> Change:
    """With a description that was changed, and weights that fit it: zeros, of which none are on the disk."""

    def change(folder: Path) -> None:
        import torch

        from model.nets.clip import build_clip
        from model.nets.gpt import build

        for one in changes:
            one(folder)
        said = json.loads((folder / CONFIGS[part]).read_text())
        with torch.device("meta"):
            weights = (build(said) if part == "transformer" else build_clip(said)).state_dict()
        contents, at = {}, 0
        for name, weight in weights.items():
            contents[name] = tensor(list(weight.shape), [at, at + 4 * weight.numel()])
            at += 4 * weight.numel()
        path = folder / part / "model.safetensors"
        path.write_bytes(header(contents))
        os.truncate(path, path.stat().st_size + at)

    return change


def manifest(**values: Any) -> Change:
    """With a manifest, right but for these values; `files` is a list of name, size and SHA-256."""

    def change(folder: Path) -> None:
        said = {
            "schema_version": 2, "kind": "model", "key": "0" * 16, "settings": {}, "inputs": {}, "files": [],
        } | values  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(said))

    return change


def listed(name: str, size: Any = 1, sha256: Any = "0" * 64, **more: Any) -> Change:
    """With a manifest of one file."""
    return manifest(files=[{"name": name, "size": size, "sha256": sha256, **more}])


def both(*changes: Change) -> Change:
    """With several changes."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


# ── what is wrong with them ─────────────────────────────────────────────────────────────────────────────

NEST = "[" * DEEP
DIGITS = "9" * 10**5
LAYER = tensor([1], [0, 4])
SINES = {"image_size": 2**15, "patch_size": 1, "pos_embed_type": "sin_cos_2d"}
LEVELS = [8] * 1024

BUNDLES: dict[str, Change] = {
    # ── of the folder
    "a part is missing": gone("tokenizer"),
    "a part is a file": instead("text", lambda path: path.write_bytes(b"x")),
    "a part is a pipe": instead("text", os.mkfifo),
    "a part is a link to /proc": instead("transformer", link("/proc/self")),
    "a part is a link to itself": instead("transformer", link("transformer")),
    "parts that do not fit": net("transformer", described("transformer", vocabulary=17)),
    "nobody may read a description": lambda folder: (folder / CONFIGS["text"]).chmod(0),
    "nobody may read the weights": lambda folder: (folder / WEIGHTS).chmod(0),
    "nobody may enter a part": lambda folder: (folder / "text").chmod(0),
    "nobody may enter the folder": lambda folder: folder.chmod(0),
    "a model that is a pipe": both(shutil.rmtree, os.mkfifo),
    "a model that is a link to itself": both(shutil.rmtree, lambda folder: folder.symlink_to(folder)),
    # ── of the settings that it draws with
    "no settings": gone("sampling.json"),
    "settings are a list": written("sampling.json", "[]"),
    "settings nest without end": written("sampling.json", NEST),
    "settings are a pipe": instead("sampling.json", os.mkfifo),
    "settings have an unknown key": written("sampling.json", '{"wa\\nrmth": 1}'),
    "settings ask for a billion draws": written("sampling.json", '{"best_of": 1000000000}'),
    "settings are infinite": written("sampling.json", '{"cfg_scale": 1e999}'),
    "settings are next to nothing": written("sampling.json", '{"temperature": 1e-40}'),
    "settings are below zero": written("sampling.json", '{"temperature": -1}'),
    "settings are terabytes": instead("sampling.json", hole),
    # ── of a description, as a file
    "a description is missing": gone(CONFIGS["text"]),
    "a description is empty": written(CONFIGS["text"], ""),
    "a description is null": written(CONFIGS["tokenizer"], "null"),
    "a description is a list": written(CONFIGS["transformer"], "[1]"),
    "a description is a folder": instead(CONFIGS["text"], Path.mkdir),
    "a description is a pipe": instead(CONFIGS["text"], os.mkfifo),
    "a description is a device": instead(CONFIGS["text"], link("/dev/zero")),
    "a description is terabytes": instead(CONFIGS["text"], hole),
    "a description nests without end": written(CONFIGS["text"], NEST),
    "a description nests 50 deep": written(CONFIGS["text"], '{"a": ' * 50 + "1" + "}" * 50),
    "a description has a long list": written(CONFIGS["text"], json.dumps({"a": [0] * 10**5})),
    "a description has many entries": written(CONFIGS["text"], json.dumps({f"{n}": n for n in range(2000)})),
    "a description is not UTF-8": written(CONFIGS["text"], b'{"name": "caf\xe9"}'),
    "a description breaks off": written(CONFIGS["text"], '{"name": '),
    "a description is YAML": written(CONFIGS["text"], "name: tiny"),
    # ── of a description, as numbers
    "a number of 100,000 digits": written(CONFIGS["text"], f'{{"a": {DIGITS}}}'),
    "a number below zero": described("transformer", vocabulary=-4),
    "a number that is none": described("transformer", vocabulary=float("nan")),
    "a number without end": described("tokenizer", beta=float("inf")),
    "a number that is text": described("transformer", vocabulary="many"),
    "a number that is no whole one": described("text", architecture={"text_cfg": {"width": 16.5}}),
    "a number that is a table": described("tokenizer", width={"a": 1}),
    "a name with line breaks": described("tokenizer", **{"one\ntwo\x1b[31m": 1}),
    "a name of half a character": described("tokenizer", **{"\ud800": 1}),
    "a text of a million letters": described("tokenizer", kind="x" * 10**6),
    "an unknown kind": described("tokenizer", kind="clip\n\x1b[2J"),
    "an unknown family": pretrained("taming"),
    # ── of a description, as nets
    "a codebook of a billion codes": described("tokenizer", codebook_size=10**9, code_dim=10**9),
    "levels without end": described("tokenizer", quantizer="fsq", fsq_levels=[2**20] * 1024),
    "a transformer of a billion blocks": described("transformer", transformer={"depth": 10**9}),
    "a transformer as wide as 10^12": described("transformer", transformer={"width": 10**12}),
    "a transformer of 130 GiB": described(
        "transformer", transformer={"depth": 64, "width": 8192, "heads": 64}
    ),
    "a transformer of 100 GiB of holes": net(
        "transformer",
        described("transformer", transformer={"depth": 64, "width": 8192, "heads": 64}),
    ),
    "a transformer of 10 GiB of holes": net(
        "transformer", described("transformer", transformer={"depth": 10, "width": 5120, "heads": 64})
    ),
    "a grid of a billion": described("transformer", grid=[2**14, 2**14]),
    "a grid that is not square": described("transformer", grid=[1, 2]),
    "a grid below zero": described("transformer", grid=[-4, -4]),
    "no heads": clip(heads=0),
    "heads that do not divide": clip(heads=3),
    "a text of a million tokens": clip(context_length=10**6),
    "a mask of terabytes beside small weights": net("text", clip(context_length=10**6)),
    "a mask of 9 GiB beside small weights": net("text", clip(context_length=50_000)),
    "a text of one token": net("text", clip(context_length=1)),
    "a text with a token more than it has places": net("text", clip(embed_cls=True)),
    "a CLIP of every token": net("text", clip(pool_type="none")),
    "a CLIP that says more than it is asked": net("text", clip(vision={"output_tokens": True})),
    "a vocabulary that is not CLIP's": net("text", clip(vocab_size=100)),
    "a vocabulary of two billion": clip(vocab_size=2**31),
    "a million layers": clip(layers=10**6),
    "a million layers in a list": clip(vision={"layers": [10**6, 1, 1, 1]}),
    "layers below zero": clip(layers=-1),
    "pictures of a billion pixels": clip(vision={"image_size": 2**20, "patch_size": 1}),
    "patches of nothing": clip(vision={"patch_size": 0}),
    "positions as sines, of terabytes": clip(vision=SINES),
    "pictures that are no size": described("text", preprocess={"size": 10**9}),
    "pictures of another size": described("text", preprocess={"size": 24}),
    "pictures divided by nothing": described("text", preprocess={"std": [0.0] * 3}),
    "pictures less words": described("text", preprocess={"mean": ["a", "b", "c"]}),
    "a tokenizer of a thousand levels": pretrained(
        "diffusers", block_out_channels=LEVELS, layers_per_block=256, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 1024, up_block_types=["UpDecoderBlock2D"] * 1024,
    ),
    "Janus of a thousand levels": pretrained("janus", channel_multiplier=LEVELS, num_res_blocks=256),
    "Emu3 of a thousand levels": pretrained("emu3", channel_multiplier=LEVELS, num_res_blocks=256),
    "Janus of a codebook of terabytes": pretrained("janus", num_embeddings=2**31, embed_dim=2**31),
    "diffusers of nothing": pretrained("diffusers", block_out_channels=[]),
    # ── of a description that asks for something else
    "a text tower of the hub": clip(hf_model_name="roberta-base"),
    "a tokenizer of the hub": clip(hf_tokenizer_name="roberta-base"),
    "a picture tower of timm": clip(vision={"timm_model_name": "vit_base_patch16_224"}),
    "code of the hub": pretrained("janus", auto_map={"AutoModel": "evil--modeling.Model"}),
    "kernels of the hub": pretrained("janus", attn_implementation="kernels-community/flash-attn"),
    "a quantizer of the hub": pretrained("emu3", quantization_config={"quant_method": "bitsandbytes"}),
    "a type that is a function": pretrained("janus", dtype="load", torch_dtype="load"),
    "a class of diffusers' choice": pretrained("diffusers", _class_name="StableDiffusionPipeline"),
    # ── of weights, as a file
    "weights are missing": gone(WEIGHTS),
    "weights are empty": written(WEIGHTS, b""),
    "weights are 7 bytes": written(WEIGHTS, b"1234567"),
    "weights are noise": written(WEIGHTS, bytes(range(256)) * 64),
    "weights are a folder": instead(WEIGHTS, Path.mkdir),
    "weights are a pipe": instead(WEIGHTS, os.mkfifo),
    "weights are a device": instead(WEIGHTS, link("/dev/zero")),
    "weights are a link to themselves": instead(WEIGHTS, link("model.safetensors")),
    "weights are a pickle": written(WEIGHTS, b"\x80\x04cos\nsystem\n(S'touch /tmp/evil'\ntR."),
    "weights are a pickle of another name": both(
        gone(WEIGHTS), written("transformer/pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'id'\ntR.")
    ),
    "weights are an archive": written(WEIGHTS, b"PK\x03\x04" + bytes(4096)),
    "weights are a link to the system's": instead(WEIGHTS, link("/etc/passwd")),
    "weights break off": lambda folder: os.truncate(
        folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100
    ),
    "weights go on for terabytes": lambda folder: os.truncate(folder / WEIGHTS, HUGE),
    "weights are all hole": instead(WEIGHTS, hole),
    # ── of weights, as a table of contents
    "a table of 2^63 bytes": written(WEIGHTS, header({}, length=2**63)),
    "a table of 2^64 - 1 bytes": written(WEIGHTS, header({}, length=2**64 - 1)),
    "a table longer than the file": written(WEIGHTS, header({}, length=10**6)),
    "a table shorter than it is": written(WEIGHTS, header({"a": LAYER}, bytes(4), 5)),
    "a table of no length": written(WEIGHTS, bytes(8)),
    "a table of terabytes that are there": both(
        written(WEIGHTS, header({}, length=HUGE - 8)), lambda folder: os.truncate(folder / WEIGHTS, HUGE)
    ),
    "a table of 90 MB of spaces": written(WEIGHTS, header("{" + " " * 90_000_000 + "}")),
    "a table that is a list": written(WEIGHTS, header("[]")),
    "a table that nests without end": written(WEIGHTS, header(NEST)),
    "a table of no JSON": written(WEIGHTS, header("{'a': 1}")),
    "a table of no UTF-8": written(WEIGHTS, struct.pack("<Q", 8) + b'{"\xff": 1}'),
    "no tensor": written(WEIGHTS, header({})),
    "a million tensors": written(WEIGHTS, header({f"{n}": tensor([0], [0, 0]) for n in range(10**6)})),
    "a name of 50 MB": written(WEIGHTS, header({"x" * 50_000_000: tensor([0], [0, 0])})),
    "names with line breaks": written(WEIGHTS, header({"a\nb\x1b[31m": tensor([0], [0, 0])})),
    "notes of 50 MB": written(WEIGHTS, header({"__metadata__": {"a": "x" * 50_000_000}})),
    "notes that are no texts": written(WEIGHTS, header({"__metadata__": {"a": 1}})),
    "a tensor that comes twice": written(
        WEIGHTS, header(f'{{"a": {json.dumps(LAYER)}, "a": {json.dumps(LAYER)}}}', bytes(4))
    ),
    "tensors that overlap": written(WEIGHTS, header({"1": LAYER, "2": LAYER}, bytes(4))),
    "tensors with a gap": written(WEIGHTS, header({"a": LAYER, "b": tensor([1], [8, 12])}, bytes(12))),
    "a tensor below zero": written(WEIGHTS, header({"a": tensor([1], [-4, 0])}, bytes(4))),
    "a tensor that ends before it begins": written(WEIGHTS, header({"a": tensor([1], [4, 0])}, bytes(4))),
    "a tensor beyond the file": written(WEIGHTS, header({"a": tensor([2**20], [0, 2**22])}, bytes(4))),
    "a side below zero": written(WEIGHTS, header({"a": tensor([-1], [0, 4])}, bytes(4))),
    "sides whose product wraps around": written(
        WEIGHTS, header({"a": tensor([2**32, 2**32], [0, 0])}, bytes(4))
    ),
    "sides of nothing by 2^60": written(WEIGHTS, header({"a": tensor([0, 2**60], [0, 0])})),
    "a tensor of a hundred thousand sides": written(
        WEIGHTS, header({"a": tensor([1] * 10**5, [0, 4])}, bytes(4))
    ),
    "a side that is no whole number": written(
        WEIGHTS, header({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}, bytes(4))
    ),
    "an unknown type": written(WEIGHTS, header({"a": tensor([1], [0, 4], "X9")}, bytes(4))),
    "a type of another width": retold(lambda contents: first(contents).update(dtype="F64")),
    "a type of the same width": retold(lambda contents: first(contents).update(dtype="I32")),
    "another shape of as many numbers": retold(
        lambda contents: first(contents).update(shape=[*first(contents)["shape"][::-1], 1])
    ),
    "a tensor too few": retold(lambda contents: contents.popitem()),
    "a tensor of another name": retold(lambda contents: contents.update(more=contents.popitem()[1])),
    "weights of 8 bits": stored_as("float8_e4m3fn"),
    "weights of 8 bits that are powers of two": stored_as("float8_e8m0fnu"),
    "weights that are complex": stored_as("complex64"),
    "weights that are true or false": stored_as("bool"),
    "weights that are no numbers": numbers(float("nan")),
    "weights without end": numbers(float("inf")),
    "weights so great that logits are none": filled(1e38),
    # ── of a manifest
    "a manifest that is a pipe": instead("manifest.json", os.mkfifo),
    "a manifest that is a folder": instead("manifest.json", Path.mkdir),
    "a manifest that is a device": instead("manifest.json", link("/dev/zero")),
    "a manifest of terabytes": instead("manifest.json", hole),
    "a manifest that nests without end": written("manifest.json", NEST),
    "a manifest that is a list": written("manifest.json", "[]"),
    "a manifest of no UTF-8": written("manifest.json", b'{"\xff": 1}'),
    "a manifest of another release": manifest(schema_version=10**9),
    "a manifest of a number without end": written("manifest.json", f'{{"schema_version": {DIGITS}}}'),
    "a manifest whose number is infinite": written("manifest.json", '{"schema_version": 1e999}'),
    "a manifest of no kind": manifest(kind="virus\n"),
    "a manifest of a million files": manifest(
        files=[{"name": f"{n}", "size": 0, "sha256": ""} for n in range(10**6)]
    ),
    "a manifest that leads out": listed("../../../etc/passwd"),
    "a manifest that leads to the root": listed("/etc/passwd"),
    "a manifest that leads to nothing": listed("none\n"),
    "a manifest that leads to a pipe": both(
        lambda folder: os.mkfifo(folder / "pipe"), listed("pipe"),
    ),
    "a manifest that leads to terabytes": both(lambda folder: hole(folder / "hole"), listed("hole")),
    "a manifest that leads to another asset": listed("sampling.json", asset="model/../../../../etc"),
    "a manifest of another sum": listed("sampling.json", len('{"best_of": 2}')),
    "a manifest of sizes below zero": listed("sampling.json", -1),
    "a manifest of sizes that are text": listed("sampling.json", "many"),
    "sums that are a pipe": instead("checksums.json", os.mkfifo),
    "sums that are terabytes": instead("checksums.json", hole),
    "sums that are a list": written("checksums.json", "[]"),
    "sums that are numbers": written("checksums.json", '{"sampling.json": 1}'),
    "sums that lead out": written("checksums.json", '{"../../etc/passwd": "00"}'),
    "sums that nest without end": written("checksums.json", NEST),
}  # fmt: skip
AS_NOBODY = [name for name in BUNDLES if name.startswith("nobody")]
