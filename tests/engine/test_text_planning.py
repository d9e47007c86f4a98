"""The plan covers the text, keeps to its limits and depends on nothing else."""

from __future__ import annotations

import itertools
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SpeechError
from engine.text import KNOWN_TAGS, is_speakable, plan, splitting
from engine.text.markup import MARKUP
from engine.text.planning import PAUSE_S, SEGMENT_PAUSE_S, SHORT_CHUNK_CHARS
from engine.text.splitting import Break
from engine.types import Segment

SENTENCE = "The quick brown fox jumps over the lazy dog. "

_WORDS = st.sampled_from(
    ["word", "Dr.", "3.5", "http://a.b/c?d=e", "好", "你好世界。", "สวัสดีครับ", "नमस्ते", "한국어", "…", "—", "😀",
     "👩‍👩‍👧", "e\u0301", "[laugh]", "[clear throat]", "\n\n", "!", "?!", '"', "“", "a" * 60, "، ",
     "\t", "\x00", "\u200d", "שלום", "مرحبا؟", "\u202babc\u202c", "🇩🇪", "👍🏽", "\ud83d", "i. e.", "M."]
)  # fmt: skip


def _is_plain(text: str) -> bool:
    """Whether there is something to speak, and no markup but tags."""
    return any(map(str.isalnum, text)) and all(match[0].lower() in KNOWN_TAGS for match in MARKUP.finditer(text))


_TEXTS = (
    st.text(max_size=400)
    | st.lists(_WORDS, max_size=200).map(" ".join)
    | st.lists(_WORDS, max_size=200).map("".join)
    | st.text(st.sampled_from("ab .,!?\n«»\"'好。，😀\u0301\u200d-"), max_size=1200)
    | st.text(st.characters(), max_size=300)
).filter(_is_plain)
_LANGUAGES = st.sampled_from(["en", "de", "ar", "zh", "ja", "hi", "xx", "th"])


def texts_of(text: str, max_chars: int = 280, language: str = "en") -> list[str]:
    return [chunk.text for chunk in plan([Segment(text)], language=language, max_chars=max_chars, tags=KNOWN_TAGS)]


def without_space(text: str) -> str:
    return "".join(repaired(text).split())


def repaired(text: str) -> str:
    """A text as UTF-16 has it: half of a character is U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def spans_of(text: str, chunks: list[str]) -> list[tuple[int, int]]:
    """Where in the text the chunks lie."""
    spans = [(0, 0)]
    for chunk in chunks:
        start = text.index(chunk, spans[-1][1])
        spans.append((start, start + len(chunk)))
    return spans[1:]


def joins_of(text: str, chunks: list[str]) -> list[int]:
    """Where in the text a chunk ends and the next begins at once, without white space between."""
    spans = spans_of(text, chunks)
    return [end for (_, end), (start, _) in itertools.pairwise(spans) if end == start]


@settings(max_examples=300, deadline=None)
@given(text=_TEXTS, max_chars=st.integers(1, 300), language=_LANGUAGES)
def test_nothing_is_lost_doubled_or_reordered_and_no_chunk_is_longer_than_asked(
    text: str, max_chars: int, language: str
) -> None:
    chunks = plan([Segment(text)], language=language, max_chars=max_chars, tags=KNOWN_TAGS)
    assert without_space("".join(chunk.text for chunk in chunks)) == without_space(text)
    position = 0
    text = repaired(text)
    for index, chunk in enumerate(chunks):
        assert chunk.index == index
        assert 0 < len(chunk.text) <= max_chars
        assert chunk.text == chunk.text.strip()
        found = text.find(chunk.text, position)  # as the caller wrote it, white space inside included
        assert found >= position
        assert not text[position:found].strip()
        position = found + len(chunk.text)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(_TEXTS, min_size=1, max_size=4), max_chars=st.integers(40, 300))
def test_segments_keep_to_themselves_and_their_order(texts: list[str], max_chars: int) -> None:
    chunks = plan([Segment(text) for text in texts], language="en", max_chars=max_chars, tags=KNOWN_TAGS)
    assert [chunk.segment_index for chunk in chunks] == sorted(chunk.segment_index for chunk in chunks)
    for index, text in enumerate(texts):
        own = "".join(chunk.text for chunk in chunks if chunk.segment_index == index)
        assert without_space(own) == without_space(text)


@settings(max_examples=200, deadline=None)
@given(text=_TEXTS, max_chars=st.integers(40, 300))
def test_a_silent_chunk_is_marked_and_would_fit_in_no_neighbour(text: str, max_chars: int) -> None:
    chunks = plan([Segment(text)], language="en", max_chars=max_chars, tags=KNOWN_TAGS)
    assert any(chunk.speakable for chunk in chunks)
    assert all(chunk.speakable == is_speakable(chunk.text, KNOWN_TAGS) for chunk in chunks)
    spans = spans_of(repaired(text), [chunk.text for chunk in chunks])
    for (left, right), (start, _), (_, end) in zip(itertools.pairwise(chunks), spans, spans[1:], strict=False):
        assert (left.speakable and right.speakable) or end - start > max_chars


@settings(max_examples=200, deadline=None)
@given(text=_TEXTS)
def test_no_cut_parts_a_combining_mark_or_a_joiner_from_its_character(text: str) -> None:
    chunks = [chunk.text for chunk in plan([Segment(text)], language="en", max_chars=40, tags=KNOWN_TAGS)]
    for before, after in itertools.pairwise(chunks):
        if before + after in text and len(before) < 40:
            assert after[0] not in "\u0301\u200d"


_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]|[^\0-\uffff]")


@settings(max_examples=200, deadline=None)
@given(text=_TEXTS, max_chars=st.integers(70, 300), language=st.sampled_from(["en", "de", "ar", "hi", "xx"]))
def test_no_cut_goes_through_a_word_or_number_that_fits_in_a_chunk(text: str, max_chars: int, language: str) -> None:
    text = repaired(text)
    for join in joins_of(text, texts_of(text, max_chars, language)):
        before, after = re.search(r"\S+$", text[:join]), re.match(r"\S+", text[join:])
        assert before and after
        is_too_long = len(before[0] + after[0]) > max_chars
        is_in_number = before[0][-1] in ".," and before[0][-2:-1].isdigit() and after[0][0].isdigit()
        is_in_word = is_of_word(before[0][-1]) and is_of_word(after[0][0])
        assert is_too_long or not (is_in_word or is_in_number) or _UNSPACED.search(before[0][-1] + after[0][0])


def is_of_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


@settings(max_examples=200, deadline=None)
@given(
    sentences=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=50), min_size=1, max_size=20),
    max_chars=st.integers(120, 300),
    comma=st.sampled_from(["", ","]),
)
def test_no_chunk_of_prose_is_short_unless_it_is_all(sentences: list[list[int]], max_chars: int, comma: str) -> None:
    text = " ".join(f"{comma} ".join("x" * length for length in words).capitalize() + "." for words in sentences)
    chunks = texts_of(text, max_chars)
    assert len(chunks) == 1 or min(map(len, chunks)) >= min(SHORT_CHUNK_CHARS, max_chars // 4)


@pytest.mark.parametrize("unit", ["天地玄黄宇宙洪荒、\u0301", "天地玄黄宇宙洪荒。\u0301", "x\u200d、\u200d"])
def test_marks_after_a_possible_cut_stay_with_the_character_before(unit: str) -> None:
    chunks = texts_of("x" + unit * 60, max_chars=43)
    assert len(chunks) > 3
    assert all(text[0] not in "\u0301\u200d" for text in chunks)


def test_a_sentence_that_must_be_cut_starts_a_chunk_of_its_own() -> None:
    first, second, *_ = texts_of(SENTENCE + "It goes on and on, " * 20 + "and ends.")
    assert first == SENTENCE.strip()
    assert second.startswith("It goes on")


def test_sentences_do_not_depend_on_the_windows_they_are_looked_for_in(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"Dr. No said {number}.5 to Mrs. Yes, e.g. at 10 p.m., and more. " for number in range(400))
    windowed = texts_of(text, max_chars=80)
    monkeypatch.setattr(splitting, "_WINDOW", len(text) + 1)
    assert windowed == texts_of(text, max_chars=80)


def test_chunks_are_whole_sentences_packed_to_the_limit() -> None:
    chunks = texts_of(SENTENCE * 20, max_chars=150)
    assert all(len(text) == 3 * len(SENTENCE) - 1 for text in chunks[:-1])
    assert all(text.endswith("dog.") for text in chunks)


def test_abbreviations_do_not_end_a_chunk() -> None:
    assert texts_of("I met Dr. Smith in his very own office at noon. He paid 3.50 for it.", max_chars=50) == [
        "I met Dr. Smith in his very own office at noon.",
        "He paid 3.50 for it.",
    ]


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("en", ["I met J. R. R. Tolkien and C. S. Lewis there.", "Then we left."]),
        ("en", ["Eat fruit, e.g. apples, i.e. the red ones, vs. pears.", "Then rest."]),
        ("en", ["Prof. Smith, Mrs. Smith and Mr. Jones of St. John's met at 5 p.m. on Monday.", "We fear Dr. No."]),
        ("en", ["It costs $3.50, not 3.14 or 2,000.75.", "Version 2.0.1 is here."]),
        ("en", ["Well... I do not know... perhaps.", "Wait… what?", "Yes."]),
        ("en", ['"Stop."', "“Really?” she asked.", "“No.”", "They ran."]),
        ("en", ["What?!", "No!!", "See http://a.b.c/d.html?x=1.", "Done."]),
        ("en", ["1. The first item.", "2. The second."]),
        ("de", ["Er kam z. B. am 3. Mai um 5 Uhr.", "Dr. Meier u. a. waren da."]),
        ("fr", ["M. Dupont dit « Oui. »", "Puis il partit."]),
        ("es", ["El Sr. García llegó.", "¿Qué tal?", "¡Bien!"]),
        ("ru", ["Он жил там, т. е. здесь.", "А. С. Пушкин писал."]),
        ("zh", ["今天很好。", "我们走吧！", "你来吗？", "“好的。”", "他说。"]),
        ("ja", ["今日は。", "「はい。」", "行きましょう！", "いいですか？"]),
        ("ar", ["هل أنت بخير؟", "نعم، أنا بخير؛ شكرا.", "مع السلامة!"]),
        ("ur", ["آپ کیسے ہیں؟", "میں ٹھیک ہوں۔", "شکریہ۔"]),
        ("hi", ["यह अच्छा है।", "क्या आप आएंगे?", "हाँ॥", "ठीक है।"]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(language: str, sentences: list[str]) -> None:
    text = ("" if language in ("zh", "ja") else " ").join(sentences)
    pieces = splitting.split_text(text, 0, len(text), language, 280)
    assert [text[piece.start : piece.end] for piece in pieces] == sentences


def test_a_long_sentence_is_cut_at_its_clauses() -> None:
    clause = "a clause of some thirty letters, "
    for text in texts_of(clause * 20 + "and that is the end.", max_chars=100):
        assert text.endswith((",", "end."))


def test_a_wrapped_line_of_prose_is_no_clause_and_a_line_of_verse_is() -> None:
    wrapped = "a line of prose that goes\non and " * 12 + "ends here."
    assert any(not text.endswith("goes") for text in texts_of(wrapped, max_chars=100)[:-1])
    verse = "A line of verse that rhymes\n" * 12 + "And it ends."
    assert all(text.endswith(("rhymes", "ends.")) for text in texts_of(verse, max_chars=100))


@pytest.mark.parametrize("mark", ["，", "、", "；", "،"])
def test_clauses_end_at_the_marks_of_scripts_without_spaces(mark: str) -> None:
    assert all(
        text.endswith((mark, "。")) for text in texts_of(("天地玄黄宇宙洪荒" + mark) * 30 + "完。", max_chars=60)
    )


def test_a_sentence_without_clauses_is_cut_between_words() -> None:
    chunks = texts_of("word " * 200 + "end.", max_chars=100)
    assert set(" ".join(chunks).split()) == {"word", "end."}


def test_a_word_without_spaces_is_cut_between_grapheme_clusters() -> None:
    family = "👩‍👩‍👧"
    chunks = texts_of("x" + family * 60, max_chars=41)
    assert "".join(chunks) == "x" + family * 60
    assert all(text.lstrip("x") == family * text.count(family) for text in chunks)


def test_a_tag_with_a_space_is_never_cut() -> None:
    text = "[clear throat] " * 40 + "so"
    for chunk in plan([Segment(text)], language="en", max_chars=40, tags=KNOWN_TAGS):
        assert chunk.text.replace("[clear throat]", "").strip() in ("", "so")


def test_the_last_chunk_takes_a_sentence_over_rather_than_being_short() -> None:
    chunks = texts_of(SENTENCE * 6 + "Yes.", max_chars=6 * len(SENTENCE) + 2)
    assert len(chunks) == 2
    assert min(map(len, chunks)) >= SHORT_CHUNK_CHARS


def test_a_short_first_sentence_is_not_left_alone_before_a_long_one() -> None:
    chunks = texts_of("Yes. " + "this one goes on, and on, " * 12 + "and ends.", max_chars=200)
    assert min(map(len, chunks)) >= SHORT_CHUNK_CHARS


@pytest.mark.parametrize("clause", ["it goes on, ", "it goes on "])
def test_a_short_sentence_beside_one_that_fills_a_chunk_takes_half_of_it(clause: str) -> None:
    for text in (f"{clause * 23}and ends. Yes.", f"Yes. {clause * 23}and ends."):
        chunks = texts_of(text, max_chars=len(text) - 3)
        assert len(chunks) == 2
        assert min(map(len, chunks)) > len(text) // 3
        assert chunks[0].endswith(clause.strip().split()[-1]) or not clause.endswith(", ")


def test_symbols_join_the_sentence_before_them() -> None:
    assert texts_of("One sentence here.\n\n😀😀😀") == ["One sentence here.\n\n😀😀😀"]


def test_symbols_too_long_for_a_neighbour_are_a_chunk_with_nothing_to_speak() -> None:
    chunks = plan([Segment(f"{SENTENCE * 6}\n{'-' * 100}\n{SENTENCE * 6}")], language="en", max_chars=280)
    silent = [chunk for chunk in chunks if not chunk.speakable]
    assert [chunk.text for chunk in silent] in ([], ["-" * 100])
    assert sum(chunk.speakable for chunk in chunks) >= 2


def test_chinese_chunks_last_about_as_long_as_english_ones() -> None:
    assert max(map(len, texts_of("今天天气很好，我们走吧。" * 60, language="zh-CN"))) <= 280 // 3


def test_the_plan_of_a_text_is_the_plan_of_its_beginning_as_far_as_that_is_settled() -> None:
    short, long = texts_of(SENTENCE * 30), texts_of(SENTENCE * 60)
    assert long[: len(short) - 2] == short[:-2]


def test_pauses_follow_the_break_and_end_with_the_last_chunk() -> None:
    segments = [Segment(SENTENCE * 8 + "\n\n" + SENTENCE), Segment(SENTENCE, pause_after_s=2.0), Segment(SENTENCE)]
    pauses = [chunk.pause_after_s for chunk in plan(segments, language="en", max_chars=280)]
    assert pauses == [PAUSE_S[Break.SENTENCE], PAUSE_S[Break.PARAGRAPH], SEGMENT_PAUSE_S, 2.0, 0.0]


def test_pause_markup_splits_and_is_not_spoken() -> None:
    chunks = plan([Segment("Wait for it [pause 0.8s] now. And [PAUSE 250ms] then [pause 2]")], language="en")
    assert [(chunk.text, chunk.pause_after_s) for chunk in chunks] == [
        ("Wait for it", 0.8),
        ("now. And", 0.25),
        ("then", 2.0),
    ]


def test_pauses_side_by_side_add_up_and_a_leading_one_comes_first() -> None:
    first, second = plan([Segment("[pause 1s] Hi [pause 1s] ... [pause 2s] there")], language="en")
    assert (first.text, first.pause_before_s, first.pause_after_s) == ("Hi   ...", 1.0, 3.0)
    assert (second.text, second.pause_before_s) == ("there", 0.0)


def test_a_segment_of_nothing_but_a_pause_lengthens_the_pause_before_it() -> None:
    only = plan([Segment("Hi."), Segment("[pause 3s]"), Segment("You.")], language="en")
    assert [(chunk.text, chunk.pause_after_s) for chunk in only] == [("Hi.", SEGMENT_PAUSE_S + 3.0), ("You.", 0.0)]


@pytest.mark.parametrize("markup", ["[pause 61s]", "[pause 1h]", "[pause 1.2.3s]"])
def test_a_pause_that_cannot_be_is_refused(markup: str) -> None:
    with pytest.raises(SpeechError, match="expected a pause") as error:
        plan([Segment(f"a {markup} b")], language="en")
    assert error.value.code == "invalid_request"


@pytest.mark.parametrize("text", ["[pause 1s]", "[laugh]", "[Cough] ...", "[pause 1s] 😀"])
def test_a_text_of_pauses_and_foreign_tags_is_empty(text: str) -> None:
    with pytest.raises(SpeechError) as error:
        plan([Segment(text)], language="en")
    assert error.value.code == "text_empty"


def test_a_tag_of_the_model_alone_can_be_spoken() -> None:
    assert [chunk.text for chunk in plan([Segment("[laugh]")], language="en", tags=("[laugh]",))] == ["[laugh]"]


def test_surrogate_pairs_are_joined_and_lone_ones_replaced() -> None:
    assert texts_of("a \ud83d\ude00 \ud800 b") == ["a 😀 \ufffd b"]


def test_the_segments_language_goes_before_the_requests() -> None:
    chunks = plan([Segment("Eins.", language="de"), Segment("Two.")], language="en")
    assert [chunk.language for chunk in chunks] == ["de", "en"]


@pytest.mark.parametrize("text", ["«" * 500_000 + "a", "a" + "." * 500_000, "a" + "\n" * 500_000, "a, " * 160_000])
def test_half_a_million_characters_of_the_worst_kind_are_planned(text: str) -> None:
    assert without_space("".join(texts_of(text))) == without_space(text)
