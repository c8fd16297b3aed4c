"""What is said of a set of pictures: each rule where it applies, and not before."""

from __future__ import annotations

from typing import Any

import pytest

from model.evaluation import findings
from model.evaluation.census import Alike, Captions, Census, Reason, Script, Words
from model.evaluation.findings import share
from tests.instances import config

COUNTS = {"read": 1100, "train": 1000, "validation": 100, "composition": 0, "duplicates": 0, "quarantined": 0}
CAPTIONS = {
    "captions": 1100, "distinct": 1090, "several": 0, "shared": 20, "nameless": 0, "words": {4: 1100},
    "tokens": {5: 1100},
}  # fmt: skip
WORDS = {
    "distinct": 100,
    "once": 10,
    "own": 10,
    "median": 20.0,
    "frequent": [("a", 900)],
    "unheard": 1,
    "unheard_words": ["x"],
}
ALIKE = {"pairs": 2, "training": 4, "across": 1, "held_out": {"validation": 1}}


def census(**changes: dict[str, Any]) -> Census:
    """A set in which nothing stands in the way, but for what is said; by section."""
    values: dict[str, Any] = {
        "images": "0" * 16,
        "side": 64,
        "counts": COUNTS | changes.get("counts", {}),
        "others": changes.get("others", {}),
        "reasons": [Reason(reason="empty file", source="a.png", pictures=3)],
        "sizes": changes.get("sizes", {"pictures": 1100, "side 96": 1100, "longer 1.0": 1100}),
        "looked": {"train": 1000, "validation": 100, "composition": 0} | changes.get("looked", {}),
        "captions": Captions(**{**CAPTIONS, **changes.get("captions", {})}),
        "words": Words(**{**WORDS, **changes.get("words", {})}),
        "scripts": [Script(**one) for one in changes.get("scripts", {}).values()],
        "alike": Alike(**{**ALIKE, **changes.get("alike", {})}),
    }
    return Census(**values, across=[], within=[], groups=[], missing=[])


# Just before a rule applies, where it does, and a word of what it says.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "few pictures": (
        {"counts": {"train": 500}}, {"counts": {"train": 499}}, "499 pictures to train on are few"),
    "across": (
        {"alike": {"held_out": {"validation": 1}}}, {"alike": {"held_out": {"validation": 2}}},
        "2 of 100 held-out pictures (2.0 %) look like one of training"),
    "few held out": (
        {"counts": {"validation": 22}}, {"counts": {"validation": 21}}, "21 held-out pictures are too few"),
    "nameless": (
        {"captions": {"nameless": 54}}, {"captions": {"nameless": 55}}, "55 of 1,100 pictures (5.0 %)"),
    "short": (
        {"captions": {"words": {1: 550, 2: 550}}}, {"captions": {"words": {1: 600, 2: 500}}},
        "1.5 words on average"),
    "same caption": (
        {"captions": {"shared": 109}}, {"captions": {"shared": 110}},
        "110 of 1,100 pictures (10 %) have no caption"),
    "one caption": (
        {"captions": {"distinct": 2}}, {"captions": {"distinct": 1}}, "All pictures have the same caption"),
    "words once": (
        {"words": {"own": 219}}, {"words": {"own": 220}},
        "220 of 1,100 pictures (20 %) have a word that no other picture has; so have 10 of 100 words (10 %)"),
    "unheard": (
        {"words": {"unheard": 9}}, {"words": {"unheard": 10, "unheard_words": list("abcdefgh")}},
        "(such as a, b, c, d, e)"),
    "within": (
        {"alike": {"training": 99}}, {"alike": {"training": 100}}, "100 of 1,000 training pictures (10 %)"),
    "left out": (
        {"counts": {"quarantined": 10}}, {"counts": {"quarantined": 11}},
        "11 of 1,100 pictures (1.0 %) could not be used, most often: empty file"),
    "other files": (
        {"others": {".json": 1100, ".pdf": 122}}, {"others": {".json": 1100, ".pdf": 120, ".svg": 3}},
        "123 files beside 1,100 pictures were not read as pictures (120 .pdf, 3 .svg)"),
    "duplicates": (
        {"counts": {"duplicates": 109}}, {"counts": {"duplicates": 110}}, "at 64 px, to the last pixel"),
    "enlarged": (
        {"sizes": {"pictures": 1100, "enlarged": 54}}, {"sizes": {"pictures": 1100, "enlarged": 55}},
        "were smaller than 64 px"),
    "cut": (
        {"captions": {"tokens": {22: 1090, 23: 10}}}, {"captions": {"tokens": {22: 1089, 23: 11}}},
        "11 of 1,100 captions (1.0 %) are longer than the 22 tokens"),
    "script": (
        {"scripts": {"a": {"name": "Han", "captions": 10, "letters": 50, "tokens": 100},
                     "b": {"name": "Latin", "captions": 1090, "letters": 100, "tokens": 80}}},
        {"scripts": {"a": {"name": "Han", "captions": 11, "letters": 50, "tokens": 100}}}, "Han 2.0"),
}  # fmt: skip


def test_nothing_is_said_where_nothing_stands_in_the_way():
    assert findings.findings(census(), 24) == []
    assert len(ROWS) == len(findings.RULES) + 1, "one rule says two things"


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_speaks_from_its_bound_on(name):
    before, after, words = ROWS[name]
    assert findings.findings(census(**before), 24) == []
    (said,) = findings.findings(census(**after), 24)
    assert words in said.text
    assert said.name
    assert said.text.endswith(".")


def test_an_empty_set_and_one_without_captions_fail_nothing():
    counts, looked = dict.fromkeys(COUNTS, 0), {"train": 0, "validation": 0}
    none = {"captions": 0, "distinct": 0, "shared": 0, "words": {}, "tokens": {}}
    words = {"distinct": 0, "once": 0, "own": 0, "frequent": [], "unheard": 0}
    empty = census(
        counts=counts, looked=looked, captions=none, words=words, alike={"held_out": {}, "training": 0}
    )
    assert {one.name for one in findings.findings(empty, 24)} == {
        "only 0 pictures to train on",
        "only 0 pictures held out",
    }
    assert findings.lines(empty, 24)[0] == "data: 0 pictures, 0 captions, 0 % left out"


def test_a_terminal_reads_a_line_or_two():
    assert findings.lines(census(), 24) == [
        "data: 1,100 pictures, 1,100 captions (1,090 different), 0 % left out;"
        " 1 of 100 held-out pictures look like one of training"
    ]
    part = census(
        counts={"train": 99_900, "quarantined": 1, "read": 100_001}, captions={"distinct": 1}, alike=ALIKE
    )
    assert findings.lines(part, 24) == [
        "data: 100,000 pictures, 1,100 captions (1 different), less than 0.1 % left out;"
        " 1 of 100 held-out pictures look like one of training (of 1,100 pictures that were looked at)",
        "data: to know before training: all pictures have the same caption",
    ]


def test_the_context_is_the_text_encoder_s():
    assert findings.context_length(config()) == 24
    clip = {"kind": "pretrained", "name": "ViT-B-32", "weights": "openai"}
    assert findings.context_length(config(clip=clip)) == 77


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 0, "0 %"), (0, 5, "0 %"), (1, 10_000, "less than 0.1 %"), (1, 200, "0.5 %"), (1, 3, "33 %"),
        (5, 5, "100 %"), (995, 10_000, "10 %"),
    ],
)  # fmt: skip
def test_shares(part, whole, said):
    assert share(part, whole) == said
