"""What the names of pictures and folders say, where there are no better captions."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

VOWELS = "aeiouy"
_NO_WORDS = """
    img image images imgs dsc dscn dscf pic pics picture pictures photo photos pxl mvi gopr gopro screenshot
    screen shot scan scans frame frames file files untitled unnamed output out sample samples copy final new
    train training test testing val valid validation data dataset datasets jpg jpeg png webp camera dcim
    whatsapp signal telegram tmp temp thumb thumbs thumbnail thumbnails download downloads item page
"""  # what cameras, programs and data sets call pictures and folders
NO_WORDS = frozenset(_NO_WORDS.split())
LONGEST_WORD = 40  # letters
_SEPARATORS = re.compile(r"[\s_\-+.,;~()\[\]{}]+")
_CAMEL_CASE = re.compile(r"(?:[A-Z][a-z]+){2,}[0-9]*")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z0-9])")
_INDEX = re.compile(r"0[0-9]*|[0-9]{3,}")  # a number in front that counts, as in 007, and not in "3 apples"
_NUMBER = re.compile(r"[0-9]+|copy|final|v[0-9]+|[0-9]+x[0-9]+", re.IGNORECASE)  # at the end
_HASH = re.compile(r"[0-9a-f]{8,}", re.IGNORECASE)


def words(name: str) -> str:
    """What the name of a file or folder says: `03_red-apple (2)` says "red apple"; "" where it is no words.

    Numbers at the ends count pictures; what only cameras and programs write, ids and hashes say nothing.
    """
    name = unicodedata.normalize("NFC", unquote(name))
    spaced = _CAMEL.sub(" ", name) if _CAMEL_CASE.fullmatch(name) else name
    parts = _SEPARATORS.sub(" ", spaced).split()
    while parts and _NUMBER.fullmatch(parts[-1]):
        parts.pop()
    while parts and _INDEX.fullmatch(parts[0]):
        parts.pop(0)
    return " ".join(parts) if any(map(_is_word, parts)) else ""


def _is_word(part: str) -> bool:
    if part.lower() in NO_WORDS or _HASH.fullmatch(part) or any(one.isdigit() for one in part):
        return False
    letters = [letter for letter in part.lower() if letter.isalpha()]
    if any(ord(letter) > 0x24F for letter in letters):  # one of another script may be a word
        return True
    vowel = any(letter in VOWELS or ord(letter) > 0x7F for letter in letters)
    return vowel and 2 < len(letters) <= LONGEST_WORD
