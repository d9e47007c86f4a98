"""Subtitles say what was said, when it was said, in lines and times that can be read."""

from __future__ import annotations

import html
import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import KNOWN_TAGS, plan
from engine.types import Chunk, Segment
from jobs.subtitles import write_subtitles

Format = Literal["srt", "vtt"]

PROSE = (
    "Dr. Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations "
    "in it. “And what is the use of a book,” thought Alice, “without pictures or conversations?” So she was "
    "considering in her own mind, as well as she could, whether the pleasure of making a daisy-chain would be "
    "worth the trouble of getting up at 10.30 and picking the daisies. Yes. When suddenly a White Rabbit ran by."
)


@dataclass(frozen=True)
class Cue:
    """What a player reads: milliseconds and lines."""

    start_ms: int
    end_ms: int
    lines: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.lines)

    @property
    def duration_ms(self) -> int:
        return self.end_ms - self.start_ms


def read(subtitles: str, format: Format) -> list[Cue]:
    """Read a file strictly by its specification, escapes undone."""
    assert "\r" not in subtitles
    blocks = re.split(r"\n\n", subtitles)
    assert blocks.pop() == ""
    if format == "vtt":
        assert blocks.pop(0) == "WEBVTT"
    cues = []
    for number, block in enumerate(blocks, 1):
        lines = block.split("\n")
        if format == "srt":
            assert lines.pop(0) == str(number)
        point = "," if format == "srt" else r"\."
        times = re.fullmatch(
            rf"((\d\d+):([0-5]\d):([0-5]\d){point}(\d{{3}})) --> (\d\d+):([0-5]\d):([0-5]\d){point}(\d{{3}})",
            lines.pop(0),
        )
        assert times is not None
        numbers = [int(group) for group in times.groups()[1:]]
        start_ms, end_ms = (((h * 60 + m) * 60 + s) * 1000 + ms for h, m, s, ms in (numbers[:4], numbers[4:]))
        assert lines
        assert all(line and "-->" not in line for line in lines)
        if format == "vtt":
            assert not any(re.search(r"[<>]|&(?!amp;|lt;|gt;)", line) for line in lines)
            lines = [html.unescape(line) for line in lines]
        cues.append(Cue(start_ms, end_ms, lines))
    return cues


def cues_of(text: str, duration_s: float = 0.0, language: str = "en", format: Format = "srt") -> list[Cue]:
    """Of one chunk from 1 s on, said at an ordinary pace where no duration is given."""
    duration_s = duration_s or len(text) / 14.0
    return read(write_subtitles([Chunk(0, text, 1.0, 1.0 + duration_s)], format, language), format)


def spoken(text: str, letters_per_second: float = 14.0, language: str = "en") -> list[Chunk]:
    """Chunks as an engine gives them, said at an even pace."""
    chunks: list[Chunk] = []
    time_s = 0.2
    for chunk in plan([Segment(text)], language=language, tags=KNOWN_TAGS):
        end_s = time_s + len(chunk.text) / letters_per_second
        chunks.append(Chunk(chunk.index, chunk.text, time_s, end_s))
        time_s = end_s + chunk.pause_after_s
    return chunks


def num_columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def test_subrip_is_written_as_players_read_it() -> None:
    chunks = [Chunk(0, "One.", 1.0, 2.5), Chunk(1, "Two.", 3661.25, 3662.0)]
    assert write_subtitles(chunks, "srt") == (
        "1\n00:00:01,000 --> 00:00:02,500\nOne.\n\n2\n01:01:01,250 --> 01:01:02,000\nTwo.\n\n"
    )


def test_webvtt_is_written_as_players_read_it() -> None:
    chunks = [Chunk(0, "One.", 1.0, 2.5), Chunk(1, "Two.", 360_000.25, 360_002.0)]
    assert write_subtitles(chunks, "vtt") == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:02.500\nOne.\n\n100:00:00.250 --> 100:00:02.000\nTwo.\n\n"
    )


@pytest.mark.parametrize(("format", "empty"), [("srt", ""), ("vtt", "WEBVTT\n\n")])
def test_chunks_with_nothing_to_show_give_no_cue(format: Format, empty: str) -> None:
    texts = ["", " \n", "[laugh]", "[Clear Throat] [sigh].", "...", "\u200b\x00"]
    assert write_subtitles([], format) == empty
    assert write_subtitles([Chunk(0, text, 0.0, 1.0) for text in texts], format) == empty


def test_tags_are_not_shown_and_white_space_is_single() -> None:
    (cue,) = cues_of("[sigh] Ha [laugh] [LAUGH], so\n\n it\tgoes [note].\n")
    assert cue.text == "Ha, so it goes [note]."


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_text_cannot_break_the_format(format: Format) -> None:
    (cue,) = cues_of("A --> B,\n\n\n2\n<b>1 & 2</b> &amp; {x}", format=format)
    arrow = "→" if format == "srt" else "-->"
    assert cue.text == f"A {arrow} B, 2 <b>1 & 2</b> &amp; {{x}}"


def test_a_chunk_that_fits_is_one_cue_of_one_line_or_two_about_even_ones() -> None:
    assert [cue.lines for cue in cues_of("It fits in one line as it is.")] == [["It fits in one line as it is."]]
    (cue,) = cues_of("It takes a second line but not much more of it.")
    assert cue.lines == ["It takes a second line", "but not much more of it."]


def test_lines_part_behind_a_mark_where_both_are_long_enough() -> None:
    (cue,) = cues_of("She took a jar, and found that it was quite empty.")
    assert cue.lines == ["She took a jar,", "and found that it was quite empty."]
    (cue,) = cues_of("Well, she found that the jar was quite empty.")
    assert cue.lines == ["Well, she found that", "the jar was quite empty."]


def test_a_long_chunk_is_cut_at_sentences_then_clauses_then_words() -> None:
    sentence = "This sentence of about forty characters ends."
    assert [cue.text for cue in cues_of(f"{sentence} {sentence} {sentence}")] == [sentence] * 3
    clause = "this is a clause of nearly fifty characters or so,"
    assert [cue.text for cue in cues_of(f"{clause} {clause} {clause[:-1]}.")] == [clause, clause, f"{clause[:-1]}."]
    cues = cues_of("word " * 29 + "word.")
    assert len(cues) == 2
    assert all(60 < len(cue.text) <= 85 for cue in cues)


def test_a_sentence_is_not_cut_to_fill_a_cue() -> None:
    first, second = "The first one is short.", "The second one takes more than a line, and would be cut at its clause."
    assert [cue.text for cue in cues_of(f"{first} {second}")] == [first, second]


def test_one_cue_more_is_better_than_a_sentence_cut_at_a_clause() -> None:
    sentence = "This is a sentence of forty letters now."
    clauses = "This one has a clause of forty letters, and then has another of forty letters."
    texts = [cue.text for cue in cues_of(f"{sentence} {clauses} {sentence}")]
    assert texts == [sentence, clauses, sentence]


def test_a_sentence_too_short_for_a_cue_joins_a_clause_of_the_next() -> None:
    clauses = "Then they all went up into the house on the hill, and it was quite dark in there."
    assert [cue.text for cue in cues_of(f"No. {clauses}")] == [
        "No. Then they all went up into the house on the hill,",
        "and it was quite dark in there.",
    ]


def test_abbreviations_end_no_cue() -> None:
    for cue in cues_of("We all met Dr. Smith and Mr. Jones at 3.15 in front of the very old house. " * 3, 15.0):
        assert cue.text == "We all met Dr. Smith and Mr. Jones at 3.15 in front of the very old house."


def test_time_is_shared_by_how_long_the_parts_take_to_say() -> None:
    numbers, words = "Call 555 0123 or 555 0199 or 555 0123 or 555 01.", "Or do not call any of these numbers at all."
    first, second = cues_of(f"{numbers} {words}", 8.0)
    assert first.duration_ms > 1.8 * second.duration_ms
    assert (first.start_ms, first.end_ms, second.end_ms) == (1_000, second.start_ms, 9_000)


def test_a_cue_of_a_word_borrows_time_to_be_read() -> None:
    text = "Yes. " + "Then nobody in the whole wide house could find the smallest word to say about all of it."
    first, *_ = cues_of(text, 7.0)
    assert first.duration_ms >= 800


def test_slow_speech_is_cut_into_more_cues_and_none_stays_too_long() -> None:
    assert len(cues_of(PROSE, 120.0)) > len(cues_of(PROSE, 32.0))
    (cue,) = cues_of("Hi.", 20.0)
    assert (cue.start_ms, cue.end_ms) == (1_000, 8_000)


@pytest.mark.parametrize("letters_per_second", [8.0, 14.0, 17.0])
def test_prose_can_be_read_at_an_ordinary_pace(letters_per_second: float) -> None:
    cues = read(write_subtitles(spoken(PROSE, letters_per_second), "vtt"), "vtt")
    assert " ".join(cue.text for cue in cues) == PROSE
    for cue in cues:
        assert len(cue.lines) <= 2
        assert all(len(line) <= 42 for line in cue.lines)
        assert 800 <= cue.duration_ms <= 7_000
        assert len(cue.text) / cue.duration_ms <= 0.0201


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh", "今天天气很好，我们一起去公园散步吧。公园里有很多人，他们有的在跑步，有的在唱歌，还有一些孩子在玩。"),
        ("ja", "吾輩は猫である。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーと泣いていた。"),
        ("ko", "오늘은 날씨가 아주 좋아서 공원에 산책하러 갔습니다. 거기에는 많은 사람들이 있었고, 행복해 보였습니다."),
    ],
)  # fmt: skip
def test_full_width_lines_are_short_and_break_where_such_lines_may(language: str, text: str) -> None:
    cues = read(write_subtitles(spoken(text, 5.0, language), "srt", language), "srt")
    lines = [line for cue in cues for line in cue.lines]
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert all(num_columns(line) <= 32 and line[0] not in "、。，．！？」』）ーゃゅょっ" for line in lines)
    assert any(line[-1] in "，、。." for line in lines)
    if language == "ko":
        assert set(" ".join(lines).split()) == set(text.split())


def test_opening_marks_stay_with_what_follows_and_closing_ones_with_what_is_before() -> None:
    for cue in cues_of("他说「好」" * 40, 60.0, "zh"):
        assert all(line[0] not in "」" and line[-1] not in "「" for line in cue.lines)


def test_a_line_of_japanese_ends_with_a_word_where_it_can() -> None:
    (cue,) = cues_of("吾輩はここで始めて人間というものを見た。", 3.0, "ja")
    assert cue.lines == ["吾輩はここで始めて", "人間というものを見た。"]
    first, second = (
        "どこで生れたかとんと見当がつかぬ。",
        "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。",
    )
    lines = [line for cue in cues_of(first + second, 9.0, "ja") for line in cue.lines]
    assert lines[:3] == ["どこで生れたかとんと", "見当がつかぬ。", "何でも薄暗いじめじめした所で"]


def test_cues_of_chunks_that_touch_or_overlap_do_not_overlap() -> None:
    chunks = [Chunk(0, "One.", 0.0, 1.0004), Chunk(1, "Two.", 1.0004, 2.0), Chunk(2, "Three.", 1.9, 3.0)]
    cues = read(write_subtitles(chunks, "srt"), "srt")
    assert [(cue.start_ms, cue.end_ms) for cue in cues] == [(0, 1_000), (1_001, 2_000), (2_000, 3_000)]


def test_a_region_of_a_language_is_that_language() -> None:
    text = "今天天气很好我们一起去公园散步吧好不好呢"
    assert cues_of(text, language="zh-CN") == cues_of(text, language="zh")
    assert len(cues_of(text, 5.0, "zh_TW")[0].lines) == 2


_WORDS = st.sampled_from(
    ["a", "word", "longer,", "sentence.", "Dr.", "3.14", "1,000,000", "“quoted”", "--", "—", "-->", "<b>", "&", "é",
     "مرحبا؟", "नमस्ते।", "שלום", "😀", "👩‍👩‍👧", "x" * 50, "[laugh]", "[Clear throat]", "\n\n", "WEBVTT", "NOTE", "1"]
)  # fmt: skip
_SPACED = st.lists(_WORDS, max_size=60).map(" ".join)
_UNSPACED = st.lists(st.sampled_from("好天气。，「」ひらがなカナー々ไทยเกา iPhone 한국 "), max_size=120).map("".join)
_ANY = st.text(max_size=200)
_DURATIONS = st.floats(0.2, 40.0)


def chunks_of(parts: list[tuple[str, float, float]]) -> list[Chunk]:
    """Chunks of (text, seconds of silence before it, seconds of speech)."""
    chunks: list[Chunk] = []
    time_s = 0.0
    for index, (text, pause_s, duration_s) in enumerate(parts):
        chunks.append(Chunk(index, text, time_s + pause_s, time_s + pause_s + duration_s))
        time_s = chunks[-1].end_s
    return chunks


_PARTS = st.lists(st.tuples(_SPACED | _UNSPACED | _ANY, st.floats(0.0, 1.0), _DURATIONS), max_size=4)
_LANGUAGES = st.sampled_from(["en", "de", "zh", "ja", "ko", "ar", "xx"])
_TAG = re.compile("|".join(map(re.escape, KNOWN_TAGS)), re.IGNORECASE)
_UNSEEN = re.compile(r"[\u00ad\u200b\u2060\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufff9-\uffff\ud800-\udfff]")


def shown(text: str) -> str:
    """All that is to be seen of a text, without white space."""
    visible = "".join(
        character
        for character in _UNSEEN.sub("", text)
        if unicodedata.category(character) != "Cc" or character.isspace()
    )
    return "".join(_TAG.sub("", visible).split())


@settings(max_examples=300, deadline=None)
@given(parts=_PARTS, language=_LANGUAGES, format=st.sampled_from(["srt", "vtt"]))
def test_cues_show_all_words_once_in_order_within_their_chunk(
    parts: list[tuple[str, float, float]], language: str, format: Format
) -> None:
    chunks = chunks_of(parts)
    cues = read(write_subtitles(chunks, format, language), format)
    for before, after in itertools.pairwise(cues):
        assert before.end_ms <= after.start_ms
    left = list(cues)
    for chunk in chunks:
        own = list(itertools.takewhile(lambda cue: cue.start_ms < chunk.end_s * 1_000 - 1e-3, left))  # noqa: B023
        del left[: len(own)]
        text = shown(chunk.text)
        if any(unicodedata.category(character)[0] in "LNS" for character in text):
            expected = text.replace("-->", "→") if format == "srt" else text
            assert "".join("".join(cue.text.split()) for cue in own) == expected
            assert chunk.start_s * 1_000 - 1e-3 <= own[0].start_ms and own[-1].end_ms <= chunk.end_s * 1_000 + 1e-3
        else:
            assert not own
    assert not left


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(_SPACED, max_size=3), duration_s=_DURATIONS)
def test_words_with_spaces_between_them_are_never_cut(texts: list[str], duration_s: float) -> None:
    chunks = chunks_of([(text, 0.1, duration_s) for text in texts])
    words = " ".join(cue.text for cue in read(write_subtitles(chunks, "vtt"), "vtt")).split()
    visible = [text for text in texts if any(map(str.isalnum, _TAG.sub("", text))) or set(text) & set("<>😀👩")]
    expected = [word for text in visible for word in _TAG.sub(" ", text).split()]
    assert [word for word in words if word not in ("-->", "--")] == [w for w in expected if w not in ("-->", "--")]


@settings(max_examples=300, deadline=None)
@given(parts=_PARTS, language=_LANGUAGES)
def test_cues_keep_to_their_lines_and_times(parts: list[tuple[str, float, float]], language: str) -> None:
    limit = 32 if language in ("zh", "ja", "ko") else 42
    for cue in read(write_subtitles(chunks_of(parts), "vtt", language), "vtt"):
        assert 0 < cue.duration_ms <= 7_000
        assert len(cue.lines) <= 2
        for line in cue.lines:
            assert num_columns(line) <= limit or " " not in line


@settings(max_examples=200, deadline=None)
@given(text=_SPACED | _UNSPACED, duration_s=_DURATIONS, language=_LANGUAGES)
def test_no_cue_is_too_short_to_be_read_where_there_is_room(text: str, duration_s: float, language: str) -> None:
    cues = cues_of(text, duration_s, language)
    if duration_s * 1_000 >= 800 * len(cues):
        assert all(cue.duration_ms >= 800 for cue in cues)
    if duration_s * 1_000 >= sum(max(800, num_columns(cue.text) * 50) for cue in cues):
        assert all(
            cue.duration_ms >= min(7_000, 50 * num_columns(cue.text.replace("→", "-->")) - 1_000) for cue in cues
        )


@pytest.mark.parametrize(
    "text", ["[laugh] " * 12_000 + "a", "a, " * 30_000, "好" * 30_000, "(" * 50_000 + "a", "a" * 99_999]
)
def test_a_chunk_of_the_worst_kind_is_written(text: str) -> None:
    assert write_subtitles([Chunk(0, text, 0.0, 6_000.0)], "srt").count("a" if "a" in text else "好")
