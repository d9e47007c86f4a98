"""What has the form of markup and is none is refused, by name and place; all else in brackets is text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SpeechError
from engine.text import KNOWN_TAGS, plan
from engine.types import Segment


def refusal(text: str, *others: str) -> SpeechError | None:
    """What planning says to a text."""
    try:
        plan([Segment(text), *map(Segment, others)], language="en", tags=KNOWN_TAGS)
    except SpeechError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("markup", "nearest"),
    [
        ("[giggle]", "[chuckle]"),
        ("[laughs]", "[laugh]"),
        ("[wisper]", "[whispering]"),
        ("[ laugh ]", "[laugh]"),
        ("[clear_throat]", "[clear throat]"),
        ("[clear  throat]", "[clear throat]"),
        ("[/whispering]", "[whispering]"),
        ("[sobbing]", "[crying]"),
        ("[break 1s]", "[pause 1s]"),
        ("[break=500ms]", "[pause 500ms]"),
        ("[silence 2 seconds]", "[pause 2s]"),
        ("[pause]", "[pause 0.8s]"),
        ("[Pause]", "[pause 0.8s]"),
        ("[pause long]", "[pause 0.8s]"),
        ("[PAUSE: 1 s]", "[pause 1s]"),
        ("[pause1s]", "[pause 1s]"),
        ("[pause -1s]", "[pause 1s]"),
        ("[pause and no end", "[pause 0.8s]"),
        ("[speed 1.5x]", "[laugh]"),
        ("[emphasis strong]", "[laugh]"),
        ('<break time="1s"/>', "[pause 1s]"),
        ('<break time="1s"', "[pause 1s]"),
        ("<BREAK/>", "[pause 0.8s]"),
        ("<speak>", "[laugh]"),
        ("</prosody>", "[laugh]"),
        ("<say-as interpret-as='date'>", "[laugh]"),
        ("<emphasis strong>", "[laugh]"),
        ("<p>", "[laugh]"),
        ("</s>", "[laugh]"),
        ('<w role="x">', "[laugh]"),
        ('<amazon:effect name="whispered">', "[laugh]"),
        ('<?xml version="1.0"?>', "[laugh]"),
    ],
)
def test_markup_that_is_not_known_is_refused_by_name_and_place_with_the_nearest(markup: str, nearest: str) -> None:
    error = refusal(f"So it goes: {markup}")
    assert error is not None
    assert (error.code, error.field) == ("invalid_request", "text")
    assert f"unknown markup {markup!r} at character 12;" in error.message
    assert nearest in error.message
    assert "round brackets" in error.message


@pytest.mark.parametrize(
    "text",
    [
        "[1]", "[12:30]", "[sic]", "[ibid]", "[later editions continued as follows", "[Illustration: a hare]",
        "[Editor's note]", "[HARE]", "[the hare and the cat]", "[]", "[a]", "[s]he", "x[i] = y[j]", "[[x]]",
        "[smith2020]", "[here](https://a.b)", "a < b and b > c", "a<b>c", "I <3 you", "<b>bold</b>", "<speaker>",
        "1 <mark", "if p <s and t> q", "http://a.b/?q=[1]&r=<x>", "<https://a.b>", "[...]", "[weiß]",
    ],
)  # fmt: skip
def test_other_text_in_brackets_is_text(text: str) -> None:
    chunks = plan([Segment(f"So: {text}")], language="en")
    assert "".join(chunk.text for chunk in chunks) == f"So: {text}"


@pytest.mark.parametrize(
    "text", ["[laugh](so)", "[LAUGH]", "[Clear Throat]", "[PAUSE 1 S]", "[pause  800 ms]", "[pause 2]"]
)
def test_known_markup_is_known_in_any_case(text: str) -> None:
    assert refusal(f"So {text} it goes.") is None


def test_what_is_refused_can_be_read_in_round_brackets() -> None:
    assert refusal("So (giggle) it goes (break 1s).") is None


def test_of_several_segments_the_one_at_fault_is_named() -> None:
    error = refusal("One.", "Two.", "Three [giggle]")
    assert error is not None
    assert "at character 6 of segment 2;" in error.message


def test_a_long_element_is_clipped_in_the_message() -> None:
    error = refusal(f'So <voice name="{"x" * 190}">')
    assert error is not None
    assert len(error.message) < 500


_PARTS = st.sampled_from(
    ["[", "]", "<", ">", "/", " ", "laugh", "giggle", "pause", "break", "1s", "0.8s", "clear", "throat", "A", "é", "x",
     "[laugh]", "[clear throat]", "[pause 1s]", "[sic]", "[1]", ":", "=", '"', "\n"]
)  # fmt: skip
_KNOWN = re.compile(rf"(?i){'|'.join(map(re.escape, KNOWN_TAGS))}|\[pause\s+[0-9.]+\s*[a-z]*\]|\[sic\]")
_FORM = re.compile(r"\[[a-z]{2,}( [a-z]{2,})?( [0-9]+(\.[0-9]+)?[a-z]*)?\](?!\()|\[pause|</?break ?/?>")


@settings(max_examples=500, deadline=None)
@given(st.lists(_PARTS, max_size=30).map("".join))
def test_no_plan_holds_markup_but_tags_and_every_refusal_is_of_what_is_there(text: str) -> None:
    text = f"a {text}"
    error = refusal(text)
    if error is None:
        assert _FORM.search(_KNOWN.sub("·", text)) is None
    elif "unknown markup" in error.message:
        place = re.search(r"unknown markup (.*) at character (\d+);", error.message)
        assert place is not None
        assert repr(text[int(place[2]) :])[1:-1].startswith(place[1][1:-1])


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "<" * 500_000, "[aa " * 125_000, "<p " * 160_000, "<voice a " * 55_000]
)
def test_half_a_million_opening_brackets_are_looked_at(text: str) -> None:
    assert refusal(f"a {text}") is None
