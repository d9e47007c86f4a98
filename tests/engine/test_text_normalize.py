"""Normalisation is upstream's, family by family, except that empty text is an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import upstream
from engine.errors import SpeechError
from engine.text import KNOWN_TAGS, normalize_punctuation
from engine.text.normalize import clean_text, normalize

_MODULES = {"original": "tts", "multilingual": "mtl_tts", "turbo": "tts_turbo"}
_FAMILIES = sorted(_MODULES)
_MARKS = [
    "...", "…", ":", " - ", ";", "—", "–", " ,", "“", "”", "‘", "’", ".", "!", "?", "-", ",", "、", "，", "。",
    "？", "！", " ", "\n", "a", "ß", "ǆ", "Ä", "7", "\u3000", "\x1c", "[laugh]",
]  # fmt: skip
_TEXTS = st.text(min_size=1) | st.lists(st.sampled_from(_MARKS), min_size=1, max_size=12).map("".join)


@pytest.fixture(scope="module", params=_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def upstream_punc_norm(family: str) -> Callable[[str], str]:
    function: Callable[[str], str] = upstream.chatterbox(_MODULES[family]).punc_norm
    return function


@settings(max_examples=500, deadline=None)
@given(text=_TEXTS)
def test_punctuation_is_normalised_as_upstream_does(
    family: str, upstream_punc_norm: Callable[[str], str], text: str
) -> None:
    assert normalize_punctuation(text, family) == upstream_punc_norm(text)


@pytest.mark.parametrize("text", ["", " ", "\n\t", "😀🎉", "...", "\x00\x07", "\u200b\ufeff", "\ud800", "[laugh]"])
def test_text_with_nothing_to_speak_is_refused_and_never_replaced(family: str, text: str) -> None:
    with pytest.raises(SpeechError) as error:
        normalize(text, family)
    assert error.value.code == "text_empty"


def test_what_has_no_sound_is_removed_and_what_spelling_needs_stays() -> None:
    assert clean_text("a\x00b\x07c\x9f d\tz\n") == "abc d\tz\n"
    assert clean_text("\ufeffsoft\u00adware\u200b \u202bx\u202c\ufffd\uffff\ud83d") == "software x"
    assert clean_text("می\u200cخواهم \ud83d\ude00 é e\u0301 क्\u200dष") == "می\u200cخواهم 😀 é e\u0301 क्\u200dष"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Cn", "So"])))
def test_cleaning_leaves_text_without_controls_alone(text: str) -> None:
    assert clean_text(text) == text


def test_tags_of_the_model_stay_and_others_go() -> None:
    assert normalize("Ha [laugh] ha [Cough], [note]", "turbo", {"[laugh]"}) == "Ha [laugh] ha, [note]."
    assert normalize("Ha [LAUGH]!", "turbo", {"[laugh]"}) == "Ha [laugh]!"
    assert normalize("".join(KNOWN_TAGS) + "ha", "original") == "ha."
