"""Captions: right, or named as bad."""

from __future__ import annotations

import codecs
import io
import re

import pytest

from model.data.captions import (
    LARGEST_TEXT,
    MOST_CAPTIONS,
    clean_captions,
    damage,
    decode,
    file_lines,
    lines,
    lookup,
    parse,
    shown,
)

TEXT = "Café crème, 红苹果 🍎"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
)
def test_utf_8_and_marked_utf_16_are_read(data):
    assert decode(data) == TEXT
    assert damage([decode(data)]) == ""
    assert list(file_lines(io.BufferedReader(io.BytesIO(data)))) == [TEXT]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Café".encode("cp1252"), r"not UTF-8 \(byte 0xe9\)"),
        ("红苹果".encode("gbk"), r"not UTF-8 \(byte 0xba\)"),
        ("a red apple".encode("utf-16-le"), "every other byte is a control"),
        ("a red apple".encode("utf-16-be"), "every other byte is a control"),
        ("a red apple".encode("utf-32"), "every other byte is a control"),
        ("красное яблоко".encode("utf-16-le"), "every other byte is a control"),
        ("تفاحة حمراء".encode("utf-16-be"), "every other byte is a control"),
        ("लाल सेब".encode("utf-16-le"), "every other byte is a control"),
        ("赤いりんご".encode("iso2022_jp"), "they shift, as in ISO-2022-JP"),
        ("빨간 사과".encode("iso2022_kr"), "they shift, as in ISO-2022-JP"),
        ("a red apple".encode("utf-16")[:-1], r"not UTF-8 \(byte 0xff\)"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a\x00", r"half a character \(U\+D800\)"),
    ],
)
def test_any_other_encoding_is_named_and_not_guessed(data, reason):
    assert re.search(reason, damage([decode(data)]))


def test_a_control_or_a_tab_here_and_there_is_no_damage():
    assert damage(["a\x01b", "\x01\x02\x03", "\t\t\t\t\t\ta cat", "a\n\n\n\nb", "a cat\0\0", "a\tcat"]) == ""


def test_only_line_ends_end_a_line():
    assert lines("a\r\nb\rc\nd") == ["a", "b", "c", "d"]
    one = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g"
    assert lines(one) == [one]
    assert clean_captions([one]) == ["a b c d e f g"]
    assert list(file_lines(io.BufferedReader(io.BytesIO(one.encode() + b"\n" + b"x")))) == [one + "\n", "x"]


def test_no_mark_of_byte_order_stays_in_a_caption():
    assert clean_captions(["\ufeffa red apple", "a red\ufeff apple"]) == ["a red apple"]


def test_a_line_without_end_is_not_read_to_its_end():
    with pytest.raises(ValueError, match="longer than"):
        list(file_lines(io.BufferedReader(io.BytesIO(b"a" * (LARGEST_TEXT + 1)))))


def test_json_nested_a_million_deep_is_refused_as_json():
    for text in ("[" * 10**6, '{"a":' * 10**6, "[" * 10**6 + "]" * 10**6):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse(text)


def test_more_captions_than_a_picture_has_are_damage():
    assert damage(["x"] * MOST_CAPTIONS) == ""
    assert damage(["x"] * (MOST_CAPTIONS + 1)) == "10,001 captions, more than the 10,000 that are read"


def test_fields_are_found_in_any_case():
    assert lookup({" Caption ": "x", "TEXT": "y"}, ("caption", "text")) == ("caption", "x")
    assert lookup({"words": "x"}, ("caption", "text")) is None


def test_a_name_that_cannot_be_printed_is_escaped_and_a_long_one_is_cut():
    assert shown("stra\udcdfe\nx\u202e.png") == "stra\\udcdfe\\nx\\u202e.png"
    assert shown("红苹果 🍎 it's.png") == "红苹果 🍎 it's.png"
    assert len(shown("n" * 10**6)) < 1000
