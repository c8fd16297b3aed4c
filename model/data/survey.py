"""A look at a source before anything expensive: what kind it is, and the numbers that sizes follow from.

Some three hundred pictures are judged and resized as an ingest would, for ten seconds at most from the first
one on, spread over the source where its format allows. What they show is taken for all. All names are looked
through, and the first picture is waited for: a good source may be slow.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from PIL import Image

from model.config import DataConfig, Source
from model.data import sources
from model.data.captions import clean_captions, damage, shown
from model.data.ingest import kind_of
from model.data.sources import DRAWN, HOW_TO_CAPTION, TABLES, Record
from model.data.sources.folder import NAMES
from model.errors import UserError
from model.plumbing.parallel import single_threaded
from model.recipe import Survey

MOST = 300  # pictures that are opened
SECONDS = 10.0  # in which more are opened, from the first on
EXAMPLES = 3  # pictures that are shown
OF = {"archive": "an archive of ", "hub": "a data set of the hub, "}  # what sources lie in
LISTED = "files within this folder, which a list names relative to its own"
OPENS = "JPEG, PNG or WEBP files that open elsewhere, too"
WOULD_DO = {  # by words of a reason; the others say it themselves
    "no caption": HOW_TO_CAPTION,
    "below min_side": "larger pictures, or a smaller data.min_side",
    "exceed max_pixels": "smaller pictures, or a larger data.max_pixels",
    "No such file": LISTED,
    "it is not there": LISTED,
    "outside the folder": LISTED,
    "empty file": OPENS,
    "not one of": OPENS,
    "broken header": OPENS,
    "truncated or corrupt": OPENS,
}
LONGEST_LINE = 100  # characters of a name or caption that is shown


@dataclass(frozen=True)
class Example:
    """A picture as it was found."""

    name: str
    image: bytes
    captions: list[str]
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class Look:
    """What a look at a source found."""

    survey: Survey
    kind: str  # for people: "a folder with captions in .txt files beside the pictures"
    advice: list[str]  # what would make more of it
    examples: list[Example]  # the first pictures
    smallest: int  # least side of those that can be used, pixels
    worst: str  # why most of the others cannot be used, and what would do; "" where there are none

    def lines(self) -> list[str]:
        """What a terminal shows: kind, counts, the first pictures, advice."""
        survey = self.survey
        about = "" if survey.counted else "about "
        bad = f", {survey.bad:.1%} of those cannot be used" if survey.bad else ""
        said = [
            f"{self.kind}: {about}{survey.pictures:,} pictures ({survey.looked:,} looked at{bad}),"
            f" {about}{survey.captions:,} different caption{'s' * (survey.captions != 1)}"
        ]
        for example in self.examples:
            name, caption = (_short(text) for text in (example.name, "; ".join(example.captions)))
            said.append(f"e.g. {name}  {example.width}x{example.height}  {caption}")
        return said + self.advice


@dataclass
class _Found:
    """What the pictures that were opened have shown."""

    sides: list[int] = field(default_factory=list)  # the shorter ones, pixels
    lossy: int = 0
    captions: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)  # of those that cannot be used, by their kind
    bad: dict[str, str] = field(default_factory=dict)  # the first of each: its reason and its name
    others: Counter[str] = field(default_factory=Counter)  # files that are no pictures
    examples: list[Example] = field(default_factory=list)

    @property
    def looked(self) -> int:
        return len(self.sides) + self.reasons.total()


def look(source: Source, side: int = 64, data: DataConfig | None = None) -> Look:
    """Open a few hundred pictures of a source.

    Args:
        source: the pictures.
        side: that they would be resized to, pixels.
        data: the settings whose limits they are judged by; left out, the usual ones.

    Raises:
        UserError: nothing of it can be used, with the reason and what would do; or as `sources.iterate`.
    """
    named, source = source, sources.content(source)
    sample = sources.sample(source, side, MOST, SECONDS)
    limits = data.model_dump(include={"min_side", "max_pixels"}) if data else {}
    found, config = _Found(), DataConfig(source=source, image_size=side, **limits)
    until = math.inf
    with single_threaded():
        for record in sample.records:
            until = min(until, time.monotonic() + SECONDS)
            _open(record, config, found)
            if found.looked and time.monotonic() > until:
                break
    if not found.sides:
        raise UserError(_nothing(named, found))
    kind = OF.get(named.kind, "") + sample.kind
    worst = _worst(found) if found.reasons else ""
    advice = _advice(source, found)
    return Look(_survey(source, sample, found), kind, advice, found.examples, min(found.sides), worst)


def _open(record: Record, config: DataConfig, found: _Found) -> None:
    from model.data.images import BadImage, decode, is_lossy  # torch

    if record.others:
        found.others.update(record.others)
        return
    captions = clean_captions(record.captions)
    problem = record.problem or damage(record.captions) or ("" if captions else "no caption")
    began = time.thread_time()
    try:
        if not problem:
            decode(record.image, config)
    except BadImage as error:
        problem = str(error)
    if problem:
        found.reasons[kind_of(problem)] += 1
        found.bad.setdefault(kind_of(problem), f"{shown(problem)} ({shown(record.key)})")
        return
    found.seconds += time.thread_time() - began
    with Image.open(io.BytesIO(record.image)) as image:
        width, height = image.size
    found.sides.append(min(width, height))
    found.lossy += is_lossy(record.image)
    found.captions.append(captions)
    if len(found.examples) < EXAMPLES:
        found.examples.append(Example(shown(record.key), record.image, captions, width, height))


def _survey(source: Source, sample: sources.Sample, found: _Found) -> Survey:
    usable, looked = len(found.sides), found.looked
    total = max(sample.total, looked)
    pictures = max(usable, round(total * usable / looked))
    said = [caption for captions in found.captions for caption in captions]
    return Survey(
        pictures=pictures,
        counted=sample.exact and (looked == total or source.kind in DRAWN),
        looked=looked,
        bad=1 - usable / looked,
        side=statistics.median(found.sides),
        lossy=found.lossy / usable,
        captions=_distinct(said, round(len(said) * pictures / usable)),
        length=sum(len(caption.split()) for caption in said) / len(said),
        seconds=found.seconds / usable,
    )


def _distinct(captions: list[str], total: int) -> int:
    """Distinct captions among `total` of which these are some.

    From how many were met once and twice, bias-corrected (Chao, "Nonparametric estimation of the number of
    classes in a population", Scandinavian Journal of Statistics 11, 1984).
    """
    met = Counter(captions)
    if total <= len(captions):
        return len(met)
    times = Counter(met.values())
    return min(len(met) + times[1] * (times[1] - 1) // (2 * (times[2] + 1)), total)


def _advice(source: Source, found: _Found) -> list[str]:
    advice = []
    taken = getattr(source, "captions", "files")
    if taken != "files":
        unread = ", ".join(f"{found.others[kind]} {kind}" for kind in TABLES if found.others[kind])
        other = f" (not read as captions: {unread})" if unread else ""
        advice.append(f"captions are {NAMES[taken]}{other}; better ones: {HOW_TO_CAPTION}")
    for kind, count in found.reasons.most_common(EXAMPLES):
        advice.append(f"cannot be used: {count} of {found.looked} looked at, {found.bad[kind]}")
    return advice


def _nothing(source: Source, found: _Found) -> str:
    """Why a source is of no use, and what would do."""
    what = next(
        (getattr(source, name) for name in ("path", "urls", "repo") if hasattr(source, name)), source.kind
    )
    if not found.reasons:
        there = ", ".join(f"{count} {kind}" for kind, count in found.others.most_common(5)) or "nothing"
        return f"data: {what} holds no pictures ({there}); data is a folder of them, {sources.KNOWN}"
    why = _worst(found)
    return f"data: none of the {found.looked} pictures of {what} that were looked at can be used: {why}"


def _worst(found: _Found) -> str:
    """Why most of those that cannot be used cannot, and what would do."""
    kind, count = found.reasons.most_common(1)[0]
    would_do = next((advice for words, advice in WOULD_DO.items() if words in kind), "")
    return f"{count} x {found.bad[kind]}" + (f"; what would do: {would_do}" if would_do else "")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 1]}…"
