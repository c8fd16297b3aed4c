"""What a set of captioned pictures is like, in figures: what a person should know before training on it.

Read from a finished asset of images, whose captions and pictures are judged and normalised already. Of large
sets a part is looked at, whole shards evenly spread: enough for every figure here, and said with them.

Two pictures **look alike** where they are near-duplicates by the evaluation's own measure (RMS difference on
[0, 1] at up to 32 px, `metrics.NEAR_DUPLICATE`), without moving either. All pairs are met by their lowest
8 × 8 frequencies first. An orthonormal transform keeps distances, and a part of it makes none larger, so no
pair is lost; those that are near there are met in full.

Letters: N pictures, T of them of training, s their side, D numbers of a descriptor.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from model.data.image_shards import TarEntry, pixels_of, shard_index, stored
from model.data.ingest import QUARANTINE, QUARANTINED, kind_of
from model.data.names import CAMERA
from model.data.packing import SPLITS
from model.evaluation.benchmark import HELD_OUT, reduced, spread
from model.nets.clip import token_counts
from model.nets.metrics import NEAR_DUPLICATE
from model.plumbing import cache, storage
from model.plumbing.assets import PICTURES, Manifest

NAME = "data.json"  # beside the asset
LOOKED, LOOKED_PIXELS = 32_768, 2**29  # pictures that are looked at, at most, and pixels of all of them
HELD_OUT_LOOKED = 4  # of these at most one in four is held out
FREQUENCIES = 8  # of a side, in a picture's descriptor
ROWS, COLUMNS = 256, 4096  # pictures that meet at a time
CLOSEST = 500  # pairs that are remembered
PAIRS = 8  # of those that look alike, shown
GROUPS, OF_A_GROUP = 4, 5  # captions that most pictures share, and pictures of one that are shown
FREQUENT = 24  # words
LONGEST_SHOWN = 80  # letters of a caption
LONGEST = 30  # words of a caption that are told apart
THUMBNAIL = 64  # side of a picture on the page, pixels; larger ones are made smaller
# Scripts whose words are not set apart by spaces: each of their letters counts as a word.
SPACELESS = {"Cjk", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"}
NAMES = {"Cjk": "Han", "Fullwidth": "Latin"}  # of scripts, where Unicode's names of letters begin otherwise
WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")  # in ASCII


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reason(_Part):
    """Pictures that were left out for one reason, figures apart."""

    reason: str
    source: str  # the first one's name
    pictures: int


class Captions(_Part):
    """Of the pictures that were looked at."""

    captions: int
    distinct: int  # whatever the case of their letters
    several: int  # pictures with more than one
    shared: int  # pictures with no caption that another has not as well
    nameless: int  # pictures whose captions have no word of letters but such as cameras use
    words: dict[int, int]  # captions by number of words; `LONGEST` stands for all longer ones
    tokens: dict[int, int]  # captions by number of CLIP's byte pairs, without start and end


class Words(_Part):
    """Words of the captions that were looked at; pictures, not occurrences, are counted."""

    distinct: int
    once: int  # words that a single picture has
    own: int  # pictures with such a word
    median: float  # pictures of a word
    frequent: list[tuple[str, int]]
    unheard: int  # held-out pictures with a word that no training caption has
    unheard_words: list[str]  # some of these


class Script(_Part):
    """Captions most of whose letters are of one script."""

    name: str
    captions: int
    letters: int
    tokens: int


class Alike(_Part):
    """Pictures that look alike."""

    pairs: int  # within training
    training: int  # training pictures that look like another one
    across: int  # pairs of a held-out picture and one of training
    held_out: dict[str, int]  # pictures that look like one of training, by split


class Picture(_Part):
    """A picture for people."""

    mime: Literal["image/png", "image/jpeg"]
    data: str  # base64
    caption: str


class Pair(_Part):
    """Two pictures that look alike."""

    distance: float
    pictures: tuple[Picture, Picture]


class Group(_Part):
    """Pictures with the same caption."""

    caption: str
    pictures: int
    some: list[Picture]


class Missing(_Part):
    """What can be seen of a picture that was left out."""

    source: str
    reason: str
    jpeg: str  # base64


class Census(_Part):
    """All figures, and the pictures of the page."""

    release: Literal[1] = 1  # of this layout
    images: str  # the asset's key
    side: int  # of its pictures, pixels
    counts: dict[str, int]  # read, train, validation, composition, duplicates, quarantined
    others: dict[str, int]  # files that are no pictures, by kind
    reasons: list[Reason]  # the most frequent ones first
    sizes: dict[str, int]  # as pictures were found (`model.data.ingest`); empty where nobody counted
    looked: dict[str, int]  # pictures that all that follows is of, by split
    captions: Captions
    words: Words
    scripts: list[Script]
    alike: Alike
    across: list[Pair]
    within: list[Pair]
    groups: list[Group]
    missing: list[Missing]

    @property
    def pictures(self) -> int:
        """Pictures of the asset."""
        return sum(self.counts.get(split, 0) for split in SPLITS)

    @property
    def seen(self) -> int:
        """Pictures that were looked at."""
        return sum(self.looked.values())


def left(images: Manifest) -> Census | None:
    """The census beside an asset; None where there is none of this release."""
    try:
        return Census.model_validate_json(storage.read_bytes(storage.join(images.uri, PICTURES, NAME)))
    except (storage.NotFound, ValidationError):
        return None


def take(images: Manifest) -> Census:
    """Count, and leave the census beside the asset.

    Raises:
        UserError: a file of the asset is damaged or gone, or the store refuses.
    """
    looked = _looked_at(images)
    entries = [entry for split in SPLITS for entry in looked[split]]
    trained = len(looked["train"])
    texts = [entry.captions for entry in entries]
    found = find_alike(_pixels(images, entries), trained)
    distinct = list(dict.fromkeys(caption for captions in texts for caption in captions))
    tokens = dict(zip(distinct, token_counts(distinct), strict=True))
    first = {}
    for split in HELD_OUT:
        first[split] = sum(len(looked[one]) for one in SPLITS[: SPLITS.index(split)])

    def shown(row: int) -> Picture:
        return _shown(stored(images, entries[row]), " · ".join(texts[row]))

    def pairs(near: Sequence[Near]) -> list[Pair]:
        return [
            Pair(distance=one.distance, pictures=(shown(one.row), shown(one.other)))
            for one in _each_once(near)
        ]

    made = Census(
        images=images.key,
        side=images.info["image_size"],
        counts={name: images.info[name] for name in ("read", *SPLITS, "duplicates", "quarantined")},
        others=dict(Counter(images.info.get("others", {})).most_common()),
        reasons=_reasons(images),
        sizes=images.info.get("sizes", {}),
        looked={split: len(looked[split]) for split in SPLITS},
        captions=count_captions(texts, tokens),
        words=count_words(texts[:trained], texts[trained:]),
        scripts=count_scripts(texts, tokens),
        alike=Alike(
            pairs=found.within.pairs,
            training=int(found.like[:trained].sum()),
            across=found.across.pairs,
            held_out={
                split: int(found.like[first[split] : first[split] + len(looked[split])].sum())
                for split in HELD_OUT
                if looked[split]
            },
        ),
        across=pairs(found.across.nearest),
        within=pairs(found.within.nearest),
        groups=[
            Group(
                caption=_short(caption),
                pictures=len(rows),
                some=[shown(row) for row in rows[:OF_A_GROUP]],
            )
            for caption, rows in _groups(texts)
        ],
        missing=_missing(images),
    )
    storage.write_bytes(storage.join(images.uri, PICTURES, NAME), made.model_dump_json().encode())
    return made


# ── which pictures ──────────────────────────────────────────────────────────────────────────────────────


def _looked_at(images: Manifest) -> dict[str, list[TarEntry]]:
    """The pictures that are looked at, by split: all of them, or of a large set a part."""
    most = max(1, min(LOOKED, LOOKED_PIXELS // images.info["image_size"] ** 2))
    counts = {split: images.info.get(split, 0) for split in SPLITS}
    held_out = sum(counts[split] for split in HELD_OUT)
    wanted = {}
    for split in HELD_OUT:
        share = counts[split] / max(1, held_out)
        wanted[split] = min(counts[split], math.ceil(share * most / HELD_OUT_LOOKED))
    wanted["train"] = min(counts["train"], most - sum(wanted.values()))
    return {split: _some(images, split, wanted[split]) for split in SPLITS}


def _some(images: Manifest, split: str, wanted: int) -> list[TarEntry]:
    """`wanted` pictures of a split, from as few whole shards as have them, evenly spread."""
    shards = {name: n for name, n in sorted(images.info["shards"].items()) if name.startswith(f"{split}-")}
    if not wanted or not shards:
        return []
    names = list(shards)
    mean = sum(shards.values()) / len(names)
    chosen = [names[i] for i in spread(len(names), math.ceil(wanted / mean))]
    entries = [entry for name in chosen for entry in shard_index(images, name)]
    return [entries[i] for i in spread(len(entries), wanted)]


def _pixels(images: Manifest, entries: list[TarEntry]) -> UInt8[Tensor, "N 3 s s"]:
    parts = [
        reduced(pixels_of(images, entries[first : first + 1024])) for first in range(0, len(entries), 1024)
    ]
    return torch.cat(parts) if parts else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


# ── captions ────────────────────────────────────────────────────────────────────────────────────────────


def count_captions(texts: Sequence[Sequence[str]], tokens: Mapping[str, int]) -> Captions:
    """What can be counted of captions.

    Args:
        texts: captions of each picture.
        tokens: CLIP's byte pairs of each caption.
    """
    said = [caption for captions in texts for caption in captions]
    has = _pictures_of(texts)
    return Captions(
        captions=len(said),
        distinct=len(has),
        several=sum(len(captions) > 1 for captions in texts),
        shared=sum(all(len(has[one.casefold()]) > 1 for one in captions) for captions in texts),
        nameless=sum(not any(map(_names_something, captions)) for captions in texts),
        words=_counted(min(len(words_of(caption)), LONGEST) for caption in said),
        tokens=_counted(tokens[caption] for caption in said),
    )


def _counted(values: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(values).items()))


def _pictures_of(texts: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """The pictures of each caption, whatever the case of its letters."""
    has: dict[str, list[int]] = defaultdict(list)
    for row, captions in enumerate(texts):
        for caption in dict.fromkeys(one.casefold() for one in captions):
            has[caption].append(row)
    return has


def _groups(texts: Sequence[Sequence[str]]) -> list[tuple[str, list[int]]]:
    """The captions that most pictures share, and these."""
    shared = [(caption, rows) for caption, rows in _pictures_of(texts).items() if len(rows) > 1]
    return sorted(shared, key=lambda one: (-len(one[1]), one[0]))[:GROUPS]


def _names_something(caption: str) -> bool:
    return any(
        word not in CAMERA and (len(word) > 1 or script_of(word) in SPACELESS)
        for word in words_of(caption)
        if word.isalpha() or not word.isascii()
    )


def count_words(train: Sequence[Sequence[str]], held_out: Sequence[Sequence[str]]) -> Words:
    """What can be counted of the words of pictures' captions.

    Args:
        train: captions of each training picture.
        held_out: of each of the others.
    """
    known = Counter(word for captions in train for word in _all_words(captions))
    every = known.copy()
    unheard: Counter[str] = Counter()
    pictures = 0
    for captions in held_out:
        words = _all_words(captions)
        every.update(words)
        new = [word for word in words if word not in known]
        unheard.update(new)
        pictures += bool(new)
    numbers = sorted(every.values())
    single = {word for word, number in every.items() if number == 1}
    return Words(
        distinct=len(every),
        once=len(single),
        own=sum(not single.isdisjoint(_all_words(captions)) for captions in (*train, *held_out)),
        median=_median(numbers),
        frequent=[(_short(word), number) for word, number in _first(every, FREQUENT)],
        unheard=pictures,
        unheard_words=[_short(word) for word, _ in _first(unheard, FREQUENT)],
    )


def _median(ordered: Sequence[int]) -> float:
    if not ordered:
        return 0.0
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[-1 - middle]) / 2


def _first(counted: Counter[str], most: int) -> list[tuple[str, int]]:
    return sorted(counted.items(), key=lambda one: (-one[1], one[0]))[:most]


def _all_words(captions: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for caption in captions for word in words_of(caption)))


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case: letters with their marks, and digits; of scripts without spaces
    each letter."""
    if caption.isascii():
        return WORD.findall(caption.casefold())
    words, word = [], ""
    for letter in f"{caption.casefold()} ":
        if letter.isalnum() or (word and unicodedata.category(letter).startswith("M")):
            if not letter.isascii() and script_of(letter) in SPACELESS and letter.isalpha():
                words += [word, letter]
                word = ""
            else:
                word += letter
        elif letter in "'\u2019" and word:
            word += letter
        elif word:
            words.append(word.rstrip("'\u2019"))
            word = ""
    return [word for word in words if word]


@lru_cache(maxsize=4096)
def script_of(letter: str) -> str:
    """The script of a letter, as the first word of its name in Unicode; of several the first one's."""
    return unicodedata.name(letter[:1], "unknown").split()[0].title()


def count_scripts(texts: Sequence[Sequence[str]], tokens: Mapping[str, int]) -> list[Script]:
    """Captions by the script that most of their letters are of, and how many byte pairs CLIP makes of them.

    Arguments are those of `count_captions`.
    """
    said = [caption for captions in texts for caption in captions]
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for caption in said:
        letters = [letter for letter in caption if letter.isalpha()]
        if not letters:
            continue
        script = Counter(map(script_of, letters)).most_common(1)[0][0]
        for place, more in enumerate((1, len(letters), tokens[caption])):
            found[NAMES.get(script, script)][place] += more
    scripts = [Script(name=name, captions=n, letters=m, tokens=k) for name, (n, m, k) in found.items()]
    return sorted(scripts, key=lambda one: (-one.captions, one.name))


# ── pictures that look alike ────────────────────────────────────────────────────────────────────────────


class Near(NamedTuple):
    """A pair that looks alike."""

    distance: float  # RMS difference on [0, 1]
    row: int
    other: int  # of training


class Found(NamedTuple):
    """What meets what."""

    within: Met  # pairs of training pictures
    across: Met  # of another picture and one of training
    like: Bool[Tensor, " N"]  # whether a picture looks like one of training, itself apart


@dataclass
class Met:
    """Pairs that look alike."""

    pairs: int = 0
    nearest: list[Near] = field(default_factory=list)  # of these, the nearest first

    def add(self, distances: Tensor, rows: Tensor, others: Tensor) -> None:
        """Count some more in."""
        self.pairs += len(rows)
        if len(self.nearest) == CLOSEST:
            nearer = distances < self.nearest[-1].distance
            distances, rows, others = distances[nearer], rows[nearer], others[nearer]
        order = distances.argsort(stable=True)[:CLOSEST]
        values = zip(distances[order].tolist(), rows[order].tolist(), others[order].tolist(), strict=True)
        found = [Near(round(distance, 4), row, other) for distance, row, other in values]
        self.nearest = sorted([*self.nearest, *found])[:CLOSEST]


def find_alike(pictures: UInt8[Tensor, "N 3 s s"], trained: int, bound: float = NEAR_DUPLICATE) -> Found:
    """All pairs of a picture and one of training that look alike.

    Memory is bounded whatever is alike, and so is time: at worst that of all pairs in full.

    Args:
        pictures: those of training first.
        trained: how many these are.
        bound: RMS difference on [0, 1] up to which two look alike.
    """
    found = Found(Met(), Met(), torch.zeros(len(pictures), dtype=torch.bool))
    if not trained:
        return found
    own = torch.cat([_descriptors(part) for part in pictures.split(1024)])
    # |a - b|² = |a|² + |b|² - 2ab, as one product: nothing else of that size is held.
    norms, ones = own.square().sum(1, keepdim=True), torch.ones(len(own), 1)
    sides = torch.cat([-2 * own, norms, ones], 1), torch.cat([own, ones, norms], 1)
    for first in range(0, trained, ROWS):  # each with those after it
        rows = range(first, min(first + ROWS, trained))
        for distances, ours, theirs in _meet(pictures, sides, rows, range(first, trained), bound):
            found.within.add(distances, ours, theirs)
            found.like[ours] = found.like[theirs] = True
    for first in range(trained, len(pictures), ROWS):
        rows = range(first, min(first + ROWS, len(pictures)))
        for distances, ours, theirs in _meet(pictures, sides, rows, range(trained), bound):
            found.across.add(distances, ours, theirs)
            found.like[ours] = True
    return found


def _meet(
    pictures: UInt8[Tensor, "N 3 s s"],
    sides: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]],
    rows: range,
    columns: range,
    bound: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Distances, rows and columns of the pairs that look alike; where both begin with the same picture, of
    each row and the columns after it."""
    apart = sides[0][rows.start : rows.stop] @ sides[1][columns.start : columns.stop].T  # squared
    near = apart <= bound**2 + 1e-5  # what rounding may add
    if rows.start == columns.start:
        near[:, : len(rows)] = near[:, : len(rows)].triu(1)
    some = near.any(1).nonzero()[:, 0]
    near = near[some]
    ours = _flat(pictures, rows.start + some)
    for part in near.any(0).nonzero()[:, 0].split(COLUMNS):
        theirs = _flat(pictures, columns.start + part)
        squares = ours.square().sum(1)[:, None] + theirs.square().sum(1) - 2 * ours @ theirs.T
        distances = (squares.clamp_min(0) / ours.shape[1]).sqrt()
        i, j = ((distances <= bound) & near[:, part]).nonzero().unbind(1)
        yield distances[i, j], rows.start + some[i], columns.start + part[j]


def _flat(pictures: UInt8[Tensor, "N 3 s s"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
    return pictures[rows].flatten(1).float() / 255


def _descriptors(pictures: UInt8[Tensor, "N 3 s s"]) -> Float[Tensor, "N D"]:
    """The lowest frequencies of pictures, scaled: their distance is at most the pictures' RMS difference."""
    side = pictures.shape[-1]
    frequency = torch.arange(min(FREQUENCIES, side), dtype=torch.float32)[:, None]
    waves = (math.pi * (torch.arange(side) + 0.5) * frequency / side).cos() * math.sqrt(2 / side)
    waves[0] *= math.sqrt(0.5)  # rows of an orthonormal matrix: the DCT-II
    lowest = waves @ (pictures.float() / 255) @ waves.T
    return lowest.flatten(1) / math.sqrt(3 * side * side)


def _each_once(near: Iterable[Near]) -> list[Near]:
    """Some of the nearest pairs, no picture in two of them."""
    met: set[int] = set()
    apart: list[Near] = []
    for one in near:
        if not {one.row, one.other} & met:
            met |= {one.row, one.other}
            apart.append(one)
    return [apart[i] for i in spread(len(apart), PAIRS)]


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────


def _shown(data: bytes, caption: str) -> Picture:
    kind: Literal["image/png", "image/jpeg"] = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    image = Image.open(io.BytesIO(data))
    if image.width > THUMBNAIL:
        buffer = io.BytesIO()
        image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).save(
            buffer, "JPEG", quality=80
        )
        kind, data = "image/jpeg", buffer.getvalue()
    return Picture(mime=kind, data=base64.b64encode(data).decode(), caption=_short(caption))


def _short(text: str) -> str:
    return text.strip() if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…".strip()


def _reasons(images: Manifest) -> list[Reason]:
    """Why pictures were left out, the most frequent reason first."""
    counted: Counter[str] = Counter()
    first: dict[str, dict[str, str]] = {}
    for entry in _quarantine(images):
        kind = kind_of(entry["reason"])
        counted[kind] += 1
        first.setdefault(kind, entry)
    return [
        Reason(reason=first[kind]["reason"], source=first[kind]["source"], pictures=number)
        for kind, number in _first(counted, FREQUENT)
    ]


def _quarantine(images: Manifest) -> Iterator[dict[str, str]]:
    with cache.use(
        images, [QUARANTINE], lambda: cache.path(images, QUARANTINE).open(encoding="utf-8")
    ) as lines:
        yield from map(json.loads, lines)


def _missing(images: Manifest) -> list[Missing]:
    try:
        found = json.loads(storage.read_bytes(storage.join(images.uri, PICTURES, QUARANTINED)))
        return [Missing.model_validate(one) for one in found]
    except (storage.NotFound, ValueError, TypeError):
        return []
