"""A lexicon replaces whole words, each once, wherever they stand, and nothing else."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SpeechError
from engine.text import KNOWN_TAGS, Lexicon


def said(text: str, **pronunciations: str) -> str:
    return Lexicon(pronunciations).apply(text)


def test_only_whole_words_are_replaced() -> None:
    assert said("SQL, MySQL, SQL_x, SQL2, 2SQL, (SQL) SQL's “SQL”", SQL="sequel") == (
        "sequel, MySQL, SQL_x, SQL2, 2SQL, (sequel) sequel's “sequel”"
    )
    assert said("é\u0301t ét été", t="x", ét="y") == "é\u0301t y été"
    assert said("مرحبا ومرحبا مرحباً", مرحبا="x") == "x ومرحبا مرحباً"
    assert said("می\u200cخواهم می", می="x") == "می\u200cخواهم x"


def test_a_key_in_lower_case_matches_any_case_and_one_with_capitals_only_itself() -> None:
    assert said("it It IT iT", it="x") == "x x x x"
    assert said("it It IT iT", IT="x") == "it It x iT"
    assert said("it It IT", it="x", IT="y") == "x x y"
    assert said("οδος ΟΔΟΣ İSTANBUL Éa", οδος="x", istanbul="y", éa="z") == "x x y z"


def test_the_longest_key_is_taken_first_and_what_is_replaced_is_left() -> None:
    lexicon = Lexicon({"new": "old", "new york": "NYC", "york": "Y", "NYC": "new", "new york times": "NYT"})
    assert lexicon.apply("new york new york times york new nyc NYC") == "NYC NYT Y old nyc new"


def test_a_longer_key_that_does_not_match_leaves_the_shorter() -> None:
    assert Lexicon({"US Army": "x", "us": "y"}).apply("us army, US Army") == "y army, x"
    assert Lexicon({"US": "x", "us army": "y"}).apply("US army, US") == "y, x"
    assert Lexicon({"a b c": "x", "b": "y"}).apply("a b d") == "a y d"


def test_words_of_a_key_may_stand_apart_by_any_white_space() -> None:
    assert (
        Lexicon({"New  York": "NYC"}).apply("New York, New\n\tYork, New\u3000York, NewYork") == "NYC, NYC, NYC, NewYork"
    )


def test_keys_may_begin_and_end_with_symbols_that_no_word_adjoins() -> None:
    lexicon = Lexicon({"C++": "see plus plus", ".NET": "dot net", "e.g.": "for example", "AT&T": "A T and T"})
    assert lexicon.apply("C++, C++x aC++ .NET ASP.NET E.G. (e.g. e.g.x AT&T") == (
        "see plus plus, C++x aC++ dot net ASP.NET for example (for example e.g.x A T and T"
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_characters_are_the_same(form: Literal["NFC", "NFD"]) -> None:
    normal = "café CAFÉ が a≠b 한국"
    lexicon = Lexicon({unicodedata.normalize(form, key): "x" for key in ("café", "が", "a≠b", "한국")})
    for text in (normal, unicodedata.normalize("NFD", normal)):
        assert lexicon.apply(text) == "x x x x x"
    untouched = unicodedata.normalize("NFD", "cafés ngữ")
    assert lexicon.apply(untouched) == untouched


def test_scripts_without_spaces_have_no_boundary_but_between_syllables() -> None:
    assert said("我在重庆银行。", 重庆="Chóngqìng") == "我在Chóngqìng银行。"
    assert said("キャキ 人々人 カード カ", キ="x", 人="y", カ="z") == "キャx 人々y カード z"
    assert said("ฉันกินข้าว เกา กา กี", กิน="x", กา="y", ก="z") == "ฉันxข้าว เกา y กี"
    assert said("ខ្មែរ មែ", មែ="x") == "ខ្មែរ x"
    assert said("SQLを使う、SQL文", SQL="x") == "xを使う、x文"


def test_markup_is_left_alone_and_never_made() -> None:
    lexicon = Lexicon({"laugh": "x", "pause": "y", "1s": "z", "giggle": "w", "HA": "laugh", "clear": "v"})
    text = "[laugh] [LAUGH] [clear throat] [pause 1s] [giggle] <break time='1s'/>"
    assert lexicon.apply(text) == text
    assert lexicon.apply("Laugh, [HA] pause") == "x, (laugh) y"


def test_an_empty_value_leaves_the_word_out() -> None:
    assert said("so um it goes", um="") == "so  it goes"


def test_an_empty_lexicon_changes_nothing() -> None:
    assert Lexicon({}).apply("any [laugh] text") == "any [laugh] text"


@pytest.mark.parametrize(
    ("pronunciations", "problem"),
    [
        ([("a", "b")], "got list"),
        ({1: "a"}, "expected text for text"),
        ({"a": None}, "expected text for text"),
        ({"": "a"}, "expected a word"),
        ({"+": "a"}, "letter or digit"),
        ({"a" * 101: "a"}, "1 to 100 characters"),
        ({"a": "b" * 201}, "at most 200 characters"),
        ({f"w{number}": "" for number in range(1_001)}, "at most 1,000 words"),
        ({"a": "so [laugh]"}, "markup '[laugh]'"),
        ({"a": "[pause 1s]"}, "markup '[pause 1s]'"),
        ({"a": "<break/>"}, "markup '<break/>'"),
        ({"[Giggle] [giggle]": "a"}, "markup '[giggle]'"),
        ({"é": "a", "e\u0301": "b"}, "twice"),
        ({"a b": "a", "a  b": "b"}, "twice"),
    ],
)
def test_what_cannot_be_a_lexicon_is_refused(pronunciations: object, problem: str) -> None:
    with pytest.raises(SpeechError) as error:
        Lexicon(pronunciations)  # type: ignore[arg-type]
    assert (error.value.code, error.value.field) == ("invalid_request", "pronunciations")
    assert problem in error.value.message


def test_a_lexicon_may_be_as_large_as_is_said() -> None:
    assert said("a" * 100 + " w999", **{f"w{number}": str(number) for number in range(999)}, **{"a" * 100: "b" * 200})
    assert Lexicon({"a": "b", "A": "b"}).apply("a A") == "b b"


_LETTERS = st.text(st.sampled_from("abAB_1"), min_size=1, max_size=3)
_KEYS = st.lists(_LETTERS, min_size=1, max_size=3).map(" ".join).filter(lambda key: any(map(str.isalnum, key)))
_VALUES = st.text(st.sampled_from("abx- "), max_size=4)
_TEXTS = st.lists(_LETTERS | st.sampled_from([" ", "\n ", ".", "-", "[laugh]", "ß", "é"]), max_size=40).map("".join)


def by_regular_expression(pronunciations: dict[str, str], text: str) -> str:
    """The same from one alternation, longest key first, keys with capitals before those of any case."""
    keys = sorted(pronunciations, key=lambda key: (-len(key), key == key.lower()))
    choices = [
        ("(?i:{})" if key == key.lower() else "{}").format(r"\s+".join(map(re.escape, key.split()))) for key in keys
    ]
    tags = "|".join(map(re.escape, KNOWN_TAGS))
    pattern = re.compile(rf"{tags}|(?<!\w)(?:{'|'.join(f'({choice})' for choice in choices)})(?!\w)")

    def replaced(match: re.Match[str]) -> str:
        return match[0] if match.lastindex is None else pronunciations[keys[match.lastindex - 1]]

    return pattern.sub(replaced, text)


@settings(max_examples=500, deadline=None)
@given(pronunciations=st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=8), text=_TEXTS)
def test_a_lexicon_does_what_one_alternation_of_its_keys_does(pronunciations: dict[str, str], text: str) -> None:
    assert Lexicon(pronunciations).apply(text) == by_regular_expression(pronunciations, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | _TEXTS, key=_KEYS)
def test_text_without_the_words_is_left_as_it_is(text: str, key: str) -> None:
    assert Lexicon({f"{key} qqq": "x"}).apply(text) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_characters="[]<>"), max_size=60))
def test_the_same_word_by_word_gives_the_text_again(text: str) -> None:
    words = {word for word in text.split() if any(map(str.isalnum, word)) and len(word) <= 100}
    assert Lexicon({word: word for word in words if word != word.lower()}).apply(text) == text


@pytest.mark.parametrize(
    "text", ["a " * 250_000, "一" * 500_000, "a" + "\u0301" * 500_000, "[" * 500_000, "." * 500_000]
)
def test_a_thousand_keys_are_looked_for_in_half_a_million_characters(text: str) -> None:
    keys = {f"{text[:2].strip()}{number}": "x" for number in range(999)} if text[0].isalpha() else {"a": "x"}
    assert Lexicon(keys | {"zz": "y"}).apply(text) == text
