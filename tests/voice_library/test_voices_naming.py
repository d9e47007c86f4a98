"""Whatever is given as a name or id: it is refused with a code, or safe as a path and found again."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voice_library import LibraryError
from voice_library.metadata import claim_key, record_key
from voice_library.naming import MAX_ID_CHARS, MAX_NAME_CHARS, check_id, check_name, fold, make_id
from voice_library.store import is_key


def accepted(check: Callable[[object], str], text: str, field: str) -> str | None:
    """What a check gives back; None if it refuses, which it has to do properly."""
    try:
        return check(text)
    except LibraryError as error:
        found = (error.code, error.field)
        error.message.encode("utf-8")
    assert found == ("invalid_request", field)
    return None


ANY_TEXT = st.text(st.characters(categories=None), max_size=120) | st.from_regex(r"[./\\~a-z\x00]{0,12}")


@given(ANY_TEXT)
def test_an_accepted_id_is_one_plain_part_of_a_path(text: str) -> None:
    voice_id = accepted(check_id, text, "voice_id")
    if voice_id is None:
        return
    assert voice_id.isascii() and is_key(claim_key(voice_id))
    for path in (PurePosixPath(voice_id), PureWindowsPath(voice_id)):
        assert path.parts == (voice_id,) and not path.is_absolute()


@given(ANY_TEXT)
def test_an_accepted_name_is_composed_bounded_printable_and_stays_as_it_is(text: str) -> None:
    name = accepted(check_name, text, "name")
    if name is None:
        return
    assert unicodedata.is_normalized("NFC", name)
    assert 0 < len(name) <= MAX_NAME_CHARS and name == name.strip()
    assert not {unicodedata.category(char) for char in name} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(name) & set("/\\")
    assert check_name(name) == name
    assert is_key(record_key(name))
    name.encode("utf-8")


@given(ANY_TEXT, st.text("0123456789abcdef", min_size=32, max_size=32))
def test_an_id_can_be_made_of_every_accepted_name(text: str, audio_hash: str) -> None:
    name = accepted(check_name, text, "name")
    if name is None:
        return
    voice_id = make_id(name, audio_hash)
    assert check_id(voice_id) == voice_id == make_id(name, audio_hash) == voice_id.lower()
    assert len(voice_id) <= MAX_ID_CHARS


@given(st.text(max_size=40))
def test_folding_joins_what_differs_in_case_or_composition_only(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    assert fold(unicodedata.normalize("NFD", text)) == fold(unicodedata.normalize("NFC", text))


def test_equal_names_in_other_spellings_of_unicode_are_one_name() -> None:
    assert check_name("A\u0308nna ") == check_name("\u00c4nna")
    assert fold("STRASSE") == fold("straße")


@pytest.mark.parametrize("name", ["नमस्ते क्‍ष", "آوای من", "佐藤さん", "👩‍🚀", "O’Brien (old)", "Ελένη"])
def test_names_of_all_scripts_are_accepted(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "  ", "..", "../x", "a/b", "a\\b", ".hidden", "a\0b", "a\nb", "\u202eanna", "x" * 101, None, 7, "\u200d"],
)
def test_path_tricks_and_invisible_names_are_refused(name: object) -> None:
    with pytest.raises(LibraryError) as refused:
        check_name(name)
    assert (refused.value.code, refused.value.field) == ("invalid_request", "name")


@pytest.mark.parametrize(
    "voice_id", ["", ".", "..", "../x", "a/b", "a\\b", "-a", "_a", "ä", "a b", "a.b", "x" * 65, "a\n", None, 3]
)
def test_path_tricks_in_ids_are_refused(voice_id: object) -> None:
    with pytest.raises(LibraryError) as refused:
        check_id(voice_id)
    assert (refused.value.code, refused.value.field) == ("invalid_request", "voice_id")
