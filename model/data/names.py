"""What the names of pictures and folders say, where there are no better captions."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

VOWELS = "aeiouy"
_CAMERA = """
    dji dsc dscn file image img jpeg jpg mvimg pano photo pic picture png pxl screenshot untitled vid
"""
CAMERA = frozenset(_CAMERA.split())  # words of file names that say nothing of a picture in a caption either
_NO_WORDS = """
    images imgs dscf pics pictures photos mvi gopr gopro screen shot scan scans frame frames files unnamed
    output out sample samples copy final new train training test testing val valid validation data dataset
    datasets webp camera dcim whatsapp signal telegram received tmp temp thumb thumbs thumbnail thumbnails
    download downloads item page
"""
NO_WORDS = CAMERA | frozenset(_NO_WORDS.split())  # what programs and data sets call pictures and folders, too
LONGEST_WORD = 40  # letters
_SEPARATORS = re.compile(r"[\s_\-+.,;~()\[\]{}]+")
_CAMEL_CASE = re.compile(r"(?:[A-Z][a-z]+){2,}[0-9]*")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z0-9])")
_INDEX = re.compile(r"0[0-9]*|[0-9]{3,}")  # a number in front that counts, as in 007, and not in "3 apples"
_NUMBER = re.compile(r"[0-9]+|copy|final|v[0-9]+|[0-9]+x[0-9]+", re.IGNORECASE)  # at the end
_HASH = re.compile(r"[0-9a-f]{8,}", re.IGNORECASE)
_ID = re.compile(r"[0-9]{5,}|(?=[a-f]*[0-9])[0-9a-f]{8,}", re.IGNORECASE)  # whatever stands beside it
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_REPEATS = re.compile(r"^[0-9]+_")  # in front of a folder's name: kohya's trainers show its pictures so often


def words(name: str) -> str:
    """What the name of a file or folder says: `03_red-apple (2)` says "red apple"; "" where it is no words.

    Numbers at the ends count pictures; what only cameras and programs write, ids and hashes say nothing.
    """
    name = _UUID.sub(" ", unicodedata.normalize("NFC", unquote(name)))
    spaced = _CAMEL.sub(" ", name) if _CAMEL_CASE.fullmatch(name) else name
    parts = [part for part in _SEPARATORS.sub(" ", spaced).split() if not _ID.fullmatch(part)]
    while parts and _NUMBER.fullmatch(parts[-1]):
        parts.pop()
    while parts and _INDEX.fullmatch(parts[0]):
        parts.pop(0)
    return " ".join(parts) if any(map(_is_word, parts)) else ""


def folder_words(path: str) -> str:
    """What the innermost folder of a path whose name is words says: `10_red apple` says "red apple"."""
    names = (_REPEATS.sub("", name) for name in reversed(path.split("/")))
    return next(filter(None, map(words, names)), "")


def _is_word(part: str) -> bool:
    if part.lower() in NO_WORDS or _HASH.fullmatch(part) or any(one.isdigit() for one in part):
        return False
    letters = [letter for letter in part.lower() if letter.isalpha()]
    if any(ord(letter) > 0x24F for letter in letters):  # one of another script may be a word
        return True
    vowel = any(letter in VOWELS or ord(letter) > 0x7F for letter in letters)
    return vowel and 2 < len(letters) <= LONGEST_WORD
