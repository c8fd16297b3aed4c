"""Captions of strangers: one set of rules for all readers. A caption is right, or its picture is named bad.

- Text is UTF-8, with or without a byte order mark, or UTF-16 with one. Nothing else is guessed: what does not
  decode is carried as lone surrogates, which `damage` finds, as it does what other encodings leave.
- A line ends in LF, CRLF or CR. Unicode's other separators belong to the caption, as spaces.
- Names of fields count whatever their case; JSON has a bounded size and depth.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

FILE_FIELDS = ("file_name", "file", "image")
CAPTION_FIELDS = ("caption", "text", "captions")
LONGEST_CAPTION = 1000  # characters; text encoders read some 300
LONGEST_SHOWN = 500  # characters of a name or reason
MOST_CAPTIONS = 10_000  # of a picture
LARGEST_TEXT = 8 << 20  # bytes of a picture's captions, or of a list's line; they are not read when larger
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SHIFT = re.compile(r"\x1b[$()*+./-]|\x0e[^\x0f]*\x0f")  # to another set of characters, in ISO 2022
CONTROL = re.compile(r"[\x00-\x09\x0b\x0c\x0e-\x1f]")  # not \n and \r


def decode(data: bytes) -> str:
    """Bytes as text; those that are none become lone surrogates."""
    if data.startswith(UTF_16):
        try:
            return data.decode("utf-16", "surrogatepass")
        except UnicodeDecodeError:  # it breaks off within a character
            pass
    return data.decode("utf-8-sig", "surrogateescape")


def lines(text: str) -> list[str]:
    """Lines of a text. (`str.splitlines` would cut a caption at a form feed or at U+2028.)"""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def file_lines(file: io.BufferedReader) -> Iterator[str]:
    """Lines of a long file, with their ends; only one is held.

    Raises:
        ValueError: a line is too long, or UTF-16 breaks off.
    """
    wide = file.peek(2)[:2] in UTF_16
    encoding, errors = ("utf-16", "surrogatepass") if wide else ("utf-8-sig", "surrogateescape")
    text = io.TextIOWrapper(file, encoding, errors, newline="")
    while line := text.readline(LARGEST_TEXT):
        if len(line) == LARGEST_TEXT:
            raise ValueError(f"longer than {LARGEST_TEXT} characters")
        yield line


def parse(text: str) -> Any:
    """JSON's value. Raises ValueError, also where it is nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def lookup(entry: Mapping[Any, Any], names: Iterable[str]) -> tuple[str, Any] | None:
    """The first of `names` that an entry has, in any case, and its value."""
    present = {str(name).strip().lower(): name for name in reversed(list(entry))}
    return next(((name, entry[present[name]]) for name in names if name in present), None)


def as_list(value: Any) -> list[Any]:
    """One caption or several."""
    return value if isinstance(value, list) else [value]


def damage(captions: Iterable[Any]) -> str:
    """Why captions cannot be trusted to read as they were meant; "" where they can."""
    captions = list(captions)
    if len(captions) > MOST_CAPTIONS:
        return f"{len(captions):,} captions, more than the {MOST_CAPTIONS:,} that are read"
    for caption in captions:
        if not isinstance(caption, str):
            continue
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            code = ord(caption[error.start])
            if 0xDC80 <= code <= 0xDCFF:
                return f"captions are not UTF-8 (byte 0x{code - 0xDC00:02x}); save them as UTF-8"
            return f"a caption holds half a character (U+{code:04X})"
        if SHIFT.search(caption):
            return "captions are not UTF-8 (they shift, as in ISO-2022-JP); save them as UTF-8"
        if _is_wide(caption.strip()):
            return "captions are not UTF-8 (every other byte is a control, as in UTF-16); save them as UTF-8"
    return ""


def _is_wide(caption: str) -> bool:
    """Whether it was UTF-16 or UTF-32 without a mark: the upper byte of most alphabets is below 32."""
    halves = caption[::2], caption[1::2]
    return len(caption) > 3 and any(3 * len(CONTROL.findall(half)) > 2 * len(half) for half in halves)


def clean_captions(captions: Iterable[Any]) -> list[str]:
    """Captions worth keeping: normalised (NFC), without control characters, cut at 1000, each once."""
    return list(dict.fromkeys(text for caption in captions if (text := _clean(caption))))


def _clean(caption: Any) -> str:
    if not isinstance(caption, str):
        return ""
    text = unicodedata.normalize("NFC", caption[: 4 * LONGEST_CAPTION].replace("\ufeff", ""))
    plain = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    return " ".join(plain.split())[:LONGEST_CAPTION].rstrip()


def shown(text: str) -> str:
    """A name or reason for a line of a log: what cannot be printed there is escaped, what is long is cut."""
    short = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)
