"""Sources of strangers: data that is mostly not what it says it is. Its name says what is wrong with it.

Each is a function of an empty folder, and returns what a person would name as their data, if not that folder.
Where some of it is good, no bad picture is allowed, so that a refusal says what was found.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Make = Callable[[Path], str | None]

GIB = 1 << 30
NEST = "[" * 10**6
DIGITS = "9" * 10**5


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int = 24, height: int = 24, *chunks: bytes, rows: bytes | None = None, colour: int = 0
) -> bytes:
    """A grey PNG; `rows` is what its pixels unpack to, else right ones."""
    data = bytes((width + 1) * height) if rows is None else rows
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", head, *chunks, chunk(b"IDAT", zlib.compress(data, 9)), chunk(b"IEND", b"")]
    )


def jpeg(width: int, height: int, scans: int = 0, progressive: bool = True) -> bytes:
    """A JPEG of any size in few bytes: of no scan, or of the first one many times."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=progressive)
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    scan = data.index(b"\xff\xda")
    end = data.find(b"\xff\xda", scan + 2)
    first = bytes(data[scan : end if end > 0 else len(data) - 2])
    return bytes(data[:scan]) + first * (scans or 1) + b"\xff\xd9"


def webp(width: int, height: int) -> bytes:
    """A lossless WEBP of one colour."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


# ── ways to make a source ───────────────────────────────────────────────────────────────────────────────


def folder(
    more: dict[str, bytes | str] | None = None, good: int = 3, **made: Callable[[Path], object]
) -> Make:
    """Good pictures with captions, and more files; for names with `_` in place of dots, what makes them."""

    def make(root: Path) -> None:
        files: dict[str, bytes | str] = {}
        for number in range(good):
            files |= {f"{number}.png": picture(number), f"{number}.txt": f"picture {number}"}
        for name, content in (files | (more or {})).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(
                content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
            )
        for name, maker in made.items():
            maker(root / name.replace("_", "."))

    return make


def picture(number: int) -> bytes:
    """A good one."""
    return png(rows=bytes([0, *([number * 9 % 256] * 24)]) * 24)


def bad(image: bytes, name: str = "bad.png") -> Make:
    """Good pictures and a captioned one of these bytes."""
    return folder({name: image, f"{name.partition('.')[0]}.txt": "what is not there"})


def hole(size: int) -> Callable[[Path], object]:
    """A file of so many bytes, none of which are on the disk."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def closed(path: Path) -> None:
    """Shut to all but root."""
    path.chmod(0)


def link(target: str) -> Callable[[Path], object]:
    """A symbolic link."""
    return lambda path: path.symlink_to(target)


def listed(text: str, name: str = "metadata.jsonl") -> Make:
    """Pictures with a list of this text."""
    return folder({name: text})


def entries(*values: Any) -> Make:
    """Pictures with a list of these entries."""
    return listed("\n".join(json.dumps(value) for value in values))


def alone(name: str, data: bytes | Callable[[Path], object]) -> Make:
    """A single file, which is named."""

    def make(root: Path) -> str:
        path = root / name
        path.write_bytes(data) if isinstance(data, bytes) else data(path)
        return str(path)

    return make


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a tar's member."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sample(number: int = 0) -> bytes:
    """The members of a good sample."""
    files = {f"{number}.png": picture(number), f"{number}.txt": b"a picture"}
    return b"".join(member(name, len(data)) + data + bytes(-len(data) % 512) for name, data in files.items())


def shard(data: bytes, size: int = 0) -> Make:
    """A tar of a good sample and what follows, of so many bytes in all."""

    def make(path: Path) -> None:
        path.write_bytes(sample() + data)
        if size:
            os.truncate(path, size)

    return alone("0.tar", make)


def packed(pack: Callable[[bytes], bytes], name: str, size: int = 4 * GIB) -> Make:
    """A packed tar whose member is zeros without end."""
    block = 1 << 24

    def make(path: Path) -> None:
        path.write_bytes(pack(sample() + member("1.png", size)) + pack(bytes(block)) * (size // block + 2))

    return alone(name, make)


def wide_xz(path: Path) -> None:
    """A tar packed by xz whose second stream wants a dictionary of 2 GiB."""
    one, two = lzma.compress(sample()[:700]), lzma.compress(sample()[700:] + bytes(1024))
    head = bytearray(two[12 : 12 + 4 * (two[12] + 1)])
    head[4] = 38
    head[-4:] = zlib.crc32(head[:-4]).to_bytes(4, "little")
    path.write_bytes(one + two[:12] + head + two[12 + len(head) :])


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for name, data in files.items():
            made.writestr(name, data)
    return buffer.getvalue()


def large_zip(path: Path) -> None:
    """A zip of large members, packed by what all zeros are."""
    path.write_bytes(zipped({f"{number}.png": bytes(256 << 20) for number in range(5)}))


def encrypted() -> bytes:
    """A zip whose list of members calls them encrypted."""
    data = bytearray(zipped({"a.png": picture(1)}))
    data[data.rfind(b"PK\1\2") + 8] |= 1
    return bytes(data)


def overlapping() -> bytes:
    """A zip of a thousand members that are all the same 10 MB of zeros."""
    one = zipped({"0000.png": bytes(10 << 20)})
    start = one.index(b"PK\1\2")
    end = one.index(b"PK\5\6")
    entry = one[start:end]
    listing = b"".join(entry.replace(b"0000.png", b"%04d.png" % number) for number in range(1000))
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1000, 1000, len(listing), start, 0)
    return one[:start] + listing + tail


def parquet(write: Callable[[Path], object]) -> Make:
    """A parquet file."""
    return alone("a.parquet", write)


def table(columns: Callable[[Any], dict[str, Any]], **options: Any) -> Make:
    """A parquet file of columns, which are made from `pyarrow`."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns(pa)), path, **options)

    return parquet(write)


def spoilt(make: Make, old: bytes, new: bytes) -> Make:
    """A file, some bytes of which are others."""

    def change(root: Path) -> str:
        path = Path(make(root) or root)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        return str(path)

    return change


def columns(*names: str) -> Callable[[Path], object]:
    """A parquet file of such columns of text."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_arrays([pa.array(["0.png"])] * len(names), names), path)

    return write


def shared(pa: Any, column: str) -> dict[str, Any]:
    """Five hundred rows, one of whose columns says the same 100 MB each time."""
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array([b"x" * (100 << 20)]))
    return {"image": [picture(1)] * 500, "caption": ["x"] * 500} | {column: value}


def deep(pa: Any) -> dict[str, Any]:
    """A column of lists within lists."""
    kind = pa.string()
    for _ in range(500):
        kind = pa.list_(kind)
    return {"image": [picture(1)], "caption": pa.nulls(1, kind)}


def footer(data: bytes, length: int | None = None) -> bytes:
    """A parquet file of nothing but this footer."""
    size = len(data) if length is None else length
    return b"PAR1" + data + struct.pack("<I", size) + b"PAR1"


def pieces(groups: int, each: int) -> bytes:
    """A footer of row groups, each of so many columns' chunks that are told in three bytes each."""
    schema = b"\x2c" + b"\x48\1r\x15\2\0" + b"\x15\x0c\x25\2\x18\5image\0"
    count = bytes([each & 127 | 128, each >> 7 & 127 | 128, each >> 14])
    group = b"\x19\xfc" + count + b"\x26\0\0" * each + b"\x16\0\x16\2\0"
    return b"\x15\2\x19" + schema + b"\x16\2\x19" + bytes([groups << 4 | 12]) + group * groups + b"\0"


def levels(root: Path) -> None:
    """Folders within folders, deeper than a program may call itself."""
    folder()(root)
    here = os.open(root, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    handle = os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(handle, b"no picture")
    os.close(handle)
    handle = os.open("x.txt", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(handle, b"a caption")
    os.close(handle)
    os.close(here)


def bound(path: Path) -> None:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def named(data: str) -> Make:
    """What a person may name, whatever there is."""
    return lambda root: data


GOOD = {"good.png": picture(1), "good.txt": b"a picture"}
ICC = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 28), 9))
TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60 << 20), 9))
EXIF = chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff\xff" + b"\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\x08" * 1000)
BILLION = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    + "]><svg>&j;</svg>"
)

SOURCES: dict[str, Make] = {
    # ── files of a folder that are none
    "a pipe as a picture": folder({"p.txt": "x"}, p_png=os.mkfifo),
    "a pipe as a caption": folder({"p.png": picture(9)}, p_txt=os.mkfifo),
    "a pipe as a list": folder(metadata_jsonl=os.mkfifo),
    "a socket as a picture": folder({"p.txt": "x"}, p_png=bound),
    "a device as a picture": folder({"p.txt": "x"}, p_png=link("/dev/zero")),
    "a device as a caption": folder({"p.png": picture(9)}, p_txt=link("/dev/urandom")),
    "a folder as a picture and a caption": folder({"p.png/x": "x", "q.png": picture(9), "q.txt/x": "x"}),
    "a link to nothing": folder({"p.txt": "x"}, p_png=link("nowhere")),
    "a link to itself": folder({"p.txt": "x"}, p_png=link("p.png")),
    "a picture that is somebody else's": folder({"p.txt": "x"}, p_png=link("/etc/passwd")),
    "a caption that is somebody else's": folder({"p.png": picture(9)}, p_txt=link("/etc/passwd")),
    "a folder that is somebody else's": folder(away=link("/etc")),
    "nobody may read a picture": folder({"p.png": picture(9), "p.txt": "x"}, p_png=closed),
    "nobody may enter a folder": folder({"a/b.png": picture(9), "a/b.txt": "x"}, a=closed),
    "folders within folders": levels,
    # ── sizes of a folder's files
    "a picture of 4 GiB of holes": folder({"p.txt": "x"}, p_png=hole(4 * GIB)),
    "a picture of 128 MiB and a byte": folder({"p.txt": "x"}, p_png=hole((128 << 20) + 1)),
    "a caption of 4 GiB of holes": folder({"p.png": picture(9)}, p_txt=hole(4 * GIB)),
    "captions in JSON of 4 GiB of holes": folder({"p.png": picture(9)}, p_json=hole(4 * GIB)),
    "a list of 4 GiB of holes": folder(metadata_jsonl=hole(4 * GIB)),
    "a table of 4 GiB of holes": folder(captions_csv=hole(4 * GIB)),
    "a table in Parquet of 4 GiB of holes": folder(metadata_parquet=hole(4 * GIB)),
    # ── lists and captions
    "a list that nests without end": listed(NEST),
    "a list of 100,000 digits": listed('{"file_name": "0.png", "text": ' + DIGITS + "}"),
    "a list that is no JSON": listed("{'file_name': '0.png'}"),
    "a list of numbers": listed("1\n2\n3"),
    "a list of NaN": listed('{"file_name": NaN, "text": Infinity}'),
    "a list of half characters": entries({"file_name": "0.png", "text": "half \ud83c"}),
    "a list whose names hold NUL": entries({"file_name": "a\0b.png", "text": "x"}),
    "a list whose names are half characters": entries({"file_name": "\ud800.png", "text": "x"}),
    "a list whose names break lines": entries({"file_name": "a\n\x1b[31mb.png", "text": "x"}),
    "a list whose names lead out": entries({"file_name": "../../../../etc/passwd", "text": "x"}),
    "a list whose names begin at the root": entries({"file_name": "/etc/passwd", "text": "x"}),
    "a list whose names are long": entries({"file_name": "n" * 10**5, "text": "x"}),
    "a list whose names are tables": entries({"file_name": {"a": 1}, "text": "x"}),
    "a list of captions that are tables": entries({"file_name": "0.png", "text": {"a": ["b"]}}),
    "a list of a million captions": entries({"file_name": "0.png", "text": ["x"] * 10**6}),
    "a list that says a picture 20,000 times": listed('{"file_name": "0.png", "text": "x"}\n' * 20_000),
    "a list without captions": entries({"file_name": "0.png"}),
    "a table with an open quote": listed('file_name,text\n0.png,"a\n' + "1.png,b\n" * 10**5, "captions.csv"),
    "a table of one field of 5 MB": listed(f"file_name,text\n0.png,{'x' * 5 * 10**6}\n", "captions.csv"),
    "a table in UTF-16 that breaks off": folder({"captions.csv": "file_name,text\n0".encode("utf-16")[:-1]}),
    "a table in Parquet that is none": folder({"metadata.parquet": b"PAR1" + bytes(100) + b"PAR1"}),
    "captions that nest without end": folder({"p.png": picture(9), "p.json": NEST}),
    "captions of 9 MB": folder({"p.png": picture(9), "p.txt": "x" * (9 << 20)}),
    "captions that are not UTF-8": folder({"p.png": picture(9), "p.txt": b"caf\xe9"}),
    "captions of nothing but NUL": folder({"p.png": picture(9), "p.txt": bytes(1000)}),
    "captions in UTF-16 without a mark": folder(
        {"p.png": picture(9), "p.txt": "красное яблоко".encode("utf-16-le")}
    ),
    "captions in ISO-2022-JP": folder({"p.png": picture(9), "p.txt": "赤いりんご".encode("iso2022_jp")}),
    "a list in Parquet that says captions twice": folder(
        metadata_parquet=columns("file_name", "text", "text")
    ),
    "names that break lines": folder({"a\n\x1b[31m.png": b"x", "a\n\x1b[31m.txt": "x"}),
    # ── pictures
    "a PNG of 4 billion pixels": bad(png(65535, 65535, rows=b"")),
    "a PNG of 2^31 by 2^31": bad(png(2**31 - 1, 2**31 - 1, rows=b"")),
    "a PNG of nothing by nothing": bad(png(0, 0, rows=b"")),
    "a PNG whose profile unpacks to 256 MiB": bad(png(24, 24, ICC, rows=b"")),
    "a PNG whose texts unpack to 6 GiB": bad(png(24, 24, *[TEXT] * 100, rows=b"")),
    "a PNG of a million chunks": bad(png(24, 24, chunk(b"tEXt", b"a\0b") * 10**6, rows=b"")),
    "a PNG whose notes lead in circles": bad(png(24, 24, EXIF, rows=b"")),
    "a PNG of which half is there": bad(picture(1)[:45]),
    "a JPEG of 4 billion pixels": bad(jpeg(65535, 65535), "bad.jpg"),
    "a JPEG of 10,000 scans": bad(jpeg(7700, 7700, 10**4), "bad.jpg"),
    "a JPEG of a million comments": bad(b"\xff\xd8\xff" + b"\xfe\0\2\xff" * 10**6, "bad.jpg"),
    "a JPEG of 100 MB before its beginning": bad(b"\xff\xd8\xff\xfe\0\2" + bytes(10**8), "bad.jpg"),
    "a WEBP of 268 million pixels": bad(webp(16383, 16383), "bad.webp"),
    "an SVG of a billion laughs": bad(BILLION.encode()),
    "a program in PostScript": bad(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run\n"),
    "an empty picture": bad(b""),
    # ── tars
    "a tar that is a pipe": alone("0.tar", os.mkfifo),
    "a tar that is a folder": alone("0.tar", Path.mkdir),
    "a tar that is a device": alone("0.tar", link("/dev/zero")),
    "a tar of 4 TiB of holes": alone("0.tar", hole(4096 * GIB)),
    "a tar of a member of 4 GiB of holes": shard(member("1.png", 4 * GIB), 5 * GIB),
    "a tar of a member below zero": shard(member("1.png", -512)),
    "a tar of a name of 2 GiB": shard(member("x", 2 * GIB, tarfile.GNUTYPE_LONGNAME), 4 * GIB),
    "a tar of notes of 2 GiB": shard(member("x", 2 * GIB, tarfile.XHDTYPE), 4 * GIB),
    "a tar of notes for all of 2 GiB": shard(member("x", 2 * GIB, tarfile.XGLTYPE), 4 * GIB),
    "a tar of notes below zero": shard(member("x", -512, tarfile.XHDTYPE), 4 * GIB),
    "a tar of a name below zero": shard(member("x", -512, tarfile.GNUTYPE_LONGNAME), 4 * GIB),
    "a tar with a sparse map without end": shard(member("x", 2 * GIB, tarfile.GNUTYPE_SPARSE), 4 * GIB),
    "a tar that breaks off": shard(member("1.png", 10**6)),
    "a tar of links out": shard(member("1.png", 0, tarfile.SYMTYPE) + member("1.txt", 1) + bytes(512)),
    "a tar with a damaged sum": shard(member("1.png", 9)[:148] + b"9" * 8 + bytes(356)),
    "a tar that unpacks to 4 GiB by gzip": packed(gzip.compress, "0.tar.gz"),
    "a tar that unpacks to 4 GiB by bzip2": packed(bz2.compress, "0.tar.bz2"),
    "a tar that unpacks to 4 GiB by xz": packed(lzma.compress, "0.tar.xz"),
    "a tar whose xz wants 2 GiB": alone("0.tar.xz", wide_xz),
    "a tar whose numbers are of a stranger": folder(
        {"0.tar": sample() + member("1.png", 9)}, good=0, **{"0_stats_json": hole(GIB)}
    ),
    # ── parquet files
    "a parquet file that is a pipe": alone("a.parquet", os.mkfifo),
    "a parquet file that is a device": alone("a.parquet", link("/dev/zero")),
    "a parquet file of holes": alone("a.parquet", hole(4096 * GIB)),
    "a parquet file of nothing": alone("a.parquet", b"PAR1PAR1"),
    "a parquet file whose footer is 2 GiB": alone("a.parquet", footer(b"x", 2**31 - 1)),
    "a parquet file whose footer is noise": alone("a.parquet", footer(bytes(range(256)) * 64)),
    "a parquet file of two million pieces": alone("a.parquet", footer(pieces(2, 10**6))),
    "a parquet file that is encrypted": alone("a.parquet", b"PARE" + bytes(100) + b"\x32\0\0\0PARE"),
    "a parquet file of a page of 300 MiB": table(
        lambda pa: {"image": pa.array([bytes(300 << 20)], pa.binary()), "caption": ["x"]},
        compression="zstd", use_dictionary=False,
    ),
    "a picture that stands for 50 GB": table(lambda pa: shared(pa, "image"), compression="zstd"),
    "a caption that stands for 50 GB": table(lambda pa: shared(pa, "caption"), compression="zstd"),
    "captions of 40 million lists": table(
        lambda pa: {
            "image": [picture(1)],
            "caption": pa.ListArray.from_arrays(
                pa.array([0, 40_000_000]), pa.nulls(40_000_000, pa.string())
            ),
        }
    ),
    "captions 500 lists deep": table(deep),
    "pictures that are somebody else's": table(lambda pa: {"image": ["/etc/passwd"], "caption": ["x"]}),
    "pictures that lead out": table(lambda pa: {"image": ["../../../etc/passwd"], "caption": ["x"]}),
    "columns that break lines": table(lambda pa: {"a\n\x1b[31m": ["x"], "b\nc": ["y"]}),
    "columns that are not UTF-8": spoilt(
        table(lambda pa: {"image": [picture(1)], "caption": ["x"]}, store_schema=False),
        b"caption", b"capt\xefon",
    ),
    "two columns of one name": parquet(columns("image", "image", "caption")),
    "statistics that cannot be": spoilt(  # the column is said to have a value in each row
        table(lambda pa: {"image": [picture(1)], "caption": ["x"]}),
        b"\x25\x02\x18\x07caption", b"\x25\x00\x18\x07caption",
    ),
    "columns of numbers": table(lambda pa: {"image": [1, 2], "caption": [3.0, 4.0]}),
    "a parquet file without rows": table(
        lambda pa: {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}
    ),
    # ── archives
    "a zip that is a pipe": alone("a.zip", os.mkfifo),
    "a zip of holes": alone("a.zip", hole(4096 * GIB)),
    "a zip that unpacks to 1.3 GB": alone("a.zip", large_zip),
    "a zip of members that overlap": alone("a.zip", overlapping()),
    "a zip whose list is 1 GiB": alone(
        "a.zip", b"PK\5\6" + bytes(4) + b"\xff\xff\xff\xff" + struct.pack("<I", GIB) + bytes(6)
    ),
    "a zip that leads out": alone("a.zip", zipped({"../outside.png": picture(1)})),
    "a zip of names that break lines": alone("a.zip", zipped({"../a\n\x1b[31m.png": picture(1)})),
    "a zip of a file without name": spoilt(
        alone("a.zip", zipped({"\1.png": picture(1)})), b"\1.png", b"\0.png"
    ),
    "a zip of a name that is too long": alone("a.zip", zipped(GOOD | {f"{'n' * 252}.png": picture(1)})),
    "a zip of a file that is a folder": alone("a.zip", zipped(GOOD | {"a": b"x", "a/b.png": picture(1)})),
    "a zip that is encrypted": alone("a.zip", encrypted()),
    "a zip of folders within folders": alone("a.zip", zipped({"d/" * 1500 + "x.png": picture(1)})),
    "a zip in a zip": alone("a.zip", zipped({"b.zip": zipped({"c.png": picture(1)})})),
    "a zip of numpy's": alone("a.zip", zipped({"a.npy": b"\x93NUMPY\x01\x00" + bytes(118)})),
    "a zip of nothing": alone("a.zip", zipped({})),
    "a zip that is a text": alone("a.zip", b"no archive at all"),
    # ── what a person may name
    "no folder": named("/no/such/folder"),
    "a device": named("/dev/zero"),
    "the system's processes": named("/proc/self/fd"),
    "shards without end": named("/tmp/{0..999999999999}.tar"),
    "shards of letters without end": named("/tmp/" + "{a..z}" * 10 + ".tar"),
    "shards of shards without end": named("/tmp/" + "{0..99}" * 10 + ".tar"),
    "a page of the web": named("https://example.org/pictures.zip"),
    "a file by its address": named("file:///etc/passwd"),
    "a bucket of no name": named("s3://"),
    "a name without end": named("/tmp/" + "x" * 10**5),
    "a name of half characters": named("/tmp/\udcff\ud800"),
    "a folder whose name is not UTF-8": lambda root: folder()(root / "d\udcff") or str(root / "d\udcff"),
    "a name that breaks lines": named("/tmp/a\n\x1b[31mb"),
    "a name of stars": named("/tmp/" + "*" * 100 + ".tar"),
}  # fmt: skip
AS_NOBODY = [name for name in SOURCES if name.startswith("nobody")]
