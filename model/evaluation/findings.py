"""What the figures of a set of pictures mean for a model trained on it: one rule each, in plain sentences.

Bounds are judgement, not measurement: where something is worth a person's minute before hours of training. A
rule that does not apply says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from model.config import RunConfig
from model.data.sources import TABLES
from model.evaluation.benchmark import FEWEST, SWEEPS
from model.evaluation.census import Census

CONTEXT = 77  # tokens that pretrained text encoders read
FEW = 500  # training pictures below which a model rather copies than learns
SHORT = 1.5  # words of a caption on average, below which captions name little
NAMELESS = 0.05  # of pictures whose captions have no word
SHARED = 0.1  # of pictures with a caption that others have as well
OWN = 0.2  # of pictures with a word that no other has
UNHEARD = 0.1  # of held-out pictures with a word that training never saw
ACROSS = 0.02  # of held-out pictures that look like one of training
WITHIN = 0.1  # of training pictures that look like another one
LEFT_OUT = 0.01  # of pictures
OTHERS = 0.1  # of files that are no pictures
DUPLICATES = 0.1  # of pictures
ENLARGED = 0.05  # of pictures that were smaller than they are now
CUT = 0.01  # of captions that are longer than the text encoder reads
SPLIT = 0.8  # byte pairs per letter, above which CLIP's vocabulary does not know a script's words
SCRIPT = 0.01  # of captions in a script of which something is said


class Finding(NamedTuple):
    """Something that a person should know before training on these pictures."""

    name: str  # a few words
    text: str


def findings(census: Census, context_length: int) -> list[Finding]:
    """What is to be said of a set of pictures; empty where nothing stands in the way.

    Args:
        census: its figures.
        context_length: tokens that the text encoder reads, its start and end among them.
    """
    said = (rule(census, context_length) for rule in RULES)
    return [one for one in said if one]


def context_length(config: RunConfig) -> int:
    """How many tokens the text encoder of a run reads."""
    return config.clip.context_length if config.clip.kind == "trained" else CONTEXT


def lines(census: Census, context: int) -> list[str]:
    """The same for a terminal, in a line or two."""
    captions, counts = census.captions, census.counts
    differ = f" ({captions.distinct:,} different)" if captions.captions != captions.distinct else ""
    first = f"data: {census.pictures:,} pictures, {captions.captions:,} captions{differ}"
    first += f", {share(counts['quarantined'], counts['read'])} left out"
    alike, held_out = sum(census.alike.held_out.values()), held_out_of(census)
    if held_out:
        first += f"; {alike:,} of {held_out:,} held-out pictures look like one of training"
    if census.seen < census.pictures:
        first += f" (of {census.seen:,} pictures that were looked at)"
    names = "; ".join(one.name for one in findings(census, context))
    return [first, *([f"data: to know before training: {names}"] if names else [])]


def share(part: float, whole: float) -> str:
    """A share in percent; "0 %" is none at all."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "less than 0.1 %"
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"


def held_out_of(census: Census) -> int:
    """Held-out pictures that were looked at."""
    return census.seen - census.looked["train"]


def _of(part: int, whole: int, things: str) -> str:
    return f"{part:,} of {whole:,} {things} ({share(part, whole)})"


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────


def few_pictures(census: Census, _: int) -> Finding | None:
    """Too few to learn from."""
    trained = census.counts["train"]
    if trained >= FEW:
        return None
    return Finding(
        f"only {trained:,} pictures to train on",
        f"{trained:,} pictures to train on are few. A model learns such a set by heart sooner than it learns"
        " what words mean: expect samples close to training pictures, and little for prompts that no caption"
        " has.",
    )


def alike_across(census: Census, _: int) -> Finding | None:
    """Held-out pictures that are as good as known."""
    number, held_out = sum(census.alike.held_out.values()), held_out_of(census)
    if number < max(1, ACROSS * held_out):
        return None
    return Finding(
        f"{number:,} held-out pictures look like one of training",
        f"{_of(number, held_out, 'held-out pictures')} look like one of training: what is measured on them"
        " flatters the model, which has all but seen them. Copies in several sizes, frames of one film and"
        " variants of one drawing do this; of true copies keep one.",
    )


def few_held_out(census: Census, _: int) -> Finding | None:
    """Too few to measure on."""
    held = census.counts["validation"]
    if held * (256 - SWEEPS) // 256 >= FEWEST:
        return None
    return Finding(
        f"only {held:,} pictures held out",
        f"{held:,} held-out pictures are too few to measure on: with fewer than {FEWEST} of them, those that"
        " sampling settings are chosen by apart, the figures on top of the report are of captions seen in"
        " training. More pictures, or a larger data.validation_share, make them say more.",
    )


def nameless(census: Census, _: int) -> Finding | None:
    """Captions without words."""
    number = census.captions.nameless
    if number < max(1, NAMELESS * census.seen):
        return None
    return Finding(
        "captions without words",
        f"{_of(number, census.seen, 'pictures')} have no caption with a word that names anything, but numbers"
        " or names that cameras give. Prompts cannot ask for what they show: write captions for them.",
    )


def short_captions(census: Census, _: int) -> Finding | None:
    """Captions that name little."""
    words = census.captions.words
    mean = sum(length * number for length, number in words.items()) / max(1, census.captions.captions)
    if not words or mean >= SHORT:
        return None
    return Finding(
        "captions name little",
        f"Captions have {mean:.1f} words on average. What a caption does not name (colour, number, place,"
        " background) a prompt cannot ask for: the model draws it as it happens to be. The more of what"
        " differs between pictures captions name, the more a prompt decides.",
    )


def same_caption(census: Census, _: int) -> Finding | None:
    """Captions that many pictures share."""
    number = census.captions.shared
    if census.captions.distinct == 1 and census.seen > 1:
        return Finding(
            "all pictures have the same caption",
            "All pictures have the same caption, so prompts make no difference: the model draws any of the"
            " pictures for any prompt.",
        )
    if number < max(1, SHARED * census.seen):
        return None
    return Finding(
        f"{share(number, census.seen)} of pictures share their caption",
        f"{_of(number, census.seen, 'pictures')} have no caption of their own: others have the same. For such"
        " a prompt the model draws any of them, and what tells them apart cannot be asked for.",
    )


def words_once(census: Census, _: int) -> Finding | None:
    """Too few pictures per word."""
    words = census.words
    if words.own < max(1, OWN * census.seen):
        return None
    return Finding(
        "too few pictures per word",
        f"{_of(words.own, census.seen, 'pictures')} have a word that no other picture has; so have"
        f" {_of(words.once, words.distinct, 'words')} a single picture. What such a word means cannot be told"
        " from the rest of the picture: the model can only learn that one picture. More pictures of the same"
        " things, or fewer different words for them, help.",
    )


def unheard_words(census: Census, _: int) -> Finding | None:
    """Words of held-out captions that are never trained on."""
    words, held_out = census.words, held_out_of(census)
    if words.unheard < max(1, UNHEARD * held_out):
        return None
    some = ", ".join(words.unheard_words[:5])
    return Finding(
        "held-out captions with unknown words",
        f"{_of(words.unheard, held_out, 'held-out pictures')} have a word that no training caption has (such"
        f" as {some}). What it means cannot be learned here, so figures of held-out captions stay low"
        " whatever is trained.",
    )


def alike_within(census: Census, _: int) -> Finding | None:
    """Training pictures that add little."""
    number, trained = census.alike.training, census.looked["train"]
    if number < max(2, WITHIN * trained):
        return None
    return Finding(
        f"{share(number, trained)} of training pictures look like another",
        f"{_of(number, trained, 'training pictures')} look like another one: there is less variety than their"
        " number says, and what differs within such pairs is hard to learn.",
    )


def left_out(census: Census, _: int) -> Finding | None:
    """Pictures that could not be used."""
    bad, read = census.counts["quarantined"], census.counts["read"]
    if bad < max(1, LEFT_OUT * read):
        return None
    most = f", most often: {census.reasons[0].reason}" if census.reasons else ""
    return Finding(
        f"{share(bad, read)} of pictures left out",
        f"{_of(bad, read, 'pictures')} could not be used{most}. If they are all of one kind, the model does"
        " not learn that kind.",
    )


def other_files(census: Census, _: int) -> Finding | None:
    """Files that are not read, but for texts: img2dataset writes a .json beside the .txt of each picture."""
    kept = {kind: number for kind, number in census.others.items() if kind not in TABLES}
    others, read = sum(kept.values()), census.counts["read"]
    if others < max(1, OTHERS * (others + read)):
        return None
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in list(kept.items())[:3])
    return Finding(
        f"{others:,} files are no pictures",
        f"{others:,} files beside {read:,} pictures were not read as pictures ({kinds}). If some should be,"
        " save them as JPEG, PNG or WEBP.",
    )


def duplicates(census: Census, _: int) -> Finding | None:
    """The same picture again and again."""
    same, read = census.counts["duplicates"], census.counts["read"]
    if same < max(1, DUPLICATES * read):
        return None
    return Finding(
        f"{share(same, read)} of pictures are duplicates",
        f"{_of(same, read, 'pictures')} are the same as another one at {census.side} px, to the last pixel,"
        " and are used once. If they should differ, a larger data.image_size tells them apart.",
    )


def enlarged(census: Census, _: int) -> Finding | None:
    """Pictures that are smaller than what is made of them."""
    number, counted = census.sizes.get("enlarged", 0), census.sizes.get("pictures", 0)
    if number < max(1, ENLARGED * counted):
        return None
    return Finding(
        f"{share(number, counted)} of pictures are smaller than {census.side} px",
        f"{_of(number, counted, 'pictures')} were smaller than {census.side} px and had to be enlarged: the"
        " model learns that pictures are blurred. A smaller data.image_size avoids it, and data.min_side"
        " leaves them out.",
    )


def cut_captions(census: Census, context: int) -> Finding | None:
    """Captions that are longer than what is read."""
    number, captions = cut(census, context), census.captions.captions
    if number < max(1, CUT * captions):
        return None
    return Finding(
        "captions longer than what is read",
        f"{_of(number, captions, 'captions')} are longer than the {context - 2} tokens that the text encoder"
        " reads, and lose their end. What matters should stand first; a text encoder that is trained here"
        " reads more with a larger clip.context_length.",
    )


def cut(census: Census, context: int) -> int:
    """Captions that lose their end."""
    return sum(number for tokens, number in census.captions.tokens.items() if tokens > context - 2)


def scripts(census: Census, _: int) -> Finding | None:
    """Scripts that CLIP's vocabulary does not know."""
    fewest = max(1, SCRIPT * census.captions.captions)
    badly = [one for one in census.scripts if one.captions >= fewest and one.tokens > SPLIT * one.letters]
    if not badly:
        return None
    which = ", ".join(f"{one.name} {one.tokens / one.letters:.1f}" for one in badly)
    return Finding(
        f"captions in {', '.join(one.name for one in badly)}",
        "The text encoder's vocabulary is made for English, and breaks these captions into single letters or"
        f" less (tokens a letter: {which}; English has 0.2 to 0.4). They take longer to learn, are cut"
        " sooner, and mean little to a pretrained encoder. English captions in their place help.",
    )


RULES: tuple[Callable[[Census, int], Finding | None], ...] = (
    few_pictures,
    alike_across,
    few_held_out,
    nameless,
    short_captions,
    same_caption,
    words_once,
    unheard_words,
    alike_within,
    left_out,
    other_files,
    duplicates,
    enlarged,
    cut_captions,
    scripts,
)
