"""Token ids are upstream's, for each family, on tokenizer files in upstream's layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import upstream
from engine.errors import SpeechError
from engine.models import MODELS, get_model
from engine.random_tokenizers import (
    write_multilingual_tokenizer,
    write_original_tokenizer,
    write_turbo_tokenizer,
)
from engine.text import KNOWN_TAGS, TextFrontEnd, load_text_front_end, normalize_punctuation
from engine.text.markup import TAG
from engine.types import Segment

_WRITERS: dict[str, Callable[[Path], None]] = {
    "original": write_original_tokenizer,
    "multilingual": write_multilingual_tokenizer,
    "turbo": write_turbo_tokenizer,
    "nano": write_turbo_tokenizer,
}
_TEXTS = (
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Cn", "So"]), min_size=1)
    | st.lists(
        st.sampled_from(
            ["hello", " ", "World", "'s", "42", "[laugh]", "[clear throat]", "<|endoftext|>", "é", "你", "."]
        ),
        min_size=1,
    ).map("".join)
).filter(lambda text: any(map(str.isalnum, text)))  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer folder per family member."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, write in _WRITERS.items():
        write(root / name)
    return {name: root / name for name in _WRITERS}


@pytest.fixture(scope="module")
def front_ends(folders: dict[str, Path]) -> dict[str, TextFrontEnd]:
    return {name: load_text_front_end(get_model(name), folder) for name, folder in folders.items()}


def code_of(function: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(SpeechError) as error:
        function()
    return error.value.code, error.value.message


# -- original -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def en_tokenizer(folders: dict[str, Path]) -> Any:
    return upstream.chatterbox("models.tokenizers").EnTokenizer(str(folders["original"] / "tokenizer.json"))


@settings(max_examples=200, deadline=None)
@given(text=_TEXTS.filter(lambda text: not TAG.search(text)))
def test_original_ids_are_upstreams_between_start_and_stop(
    front_ends: dict[str, TextFrontEnd], en_tokenizer: Any, text: str
) -> None:
    ids = front_ends["original"].encode(text, "en")
    assert ids.dtype == np.int32
    assert ids.tolist() == [255, *en_tokenizer.encode(normalize_punctuation(text, "original")), 0]


# -- turbo and nano -----------------------------------------------------------------------------------


def _with_tokenizer_json(source: Path, folder: Path) -> None:
    import transformers

    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()


def _without_decoder_list(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _as_written(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


@pytest.fixture(scope="module", params=[_as_written, _with_tokenizer_json, _without_decoder_list])
def turbo_pair(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextFrontEnd, Any]:
    import transformers

    folder = tmp_path_factory.mktemp("turbo")
    request.param(folders["turbo"], folder)
    return load_text_front_end(get_model("turbo"), folder), transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(text=_TEXTS)
def test_turbo_ids_are_those_of_auto_tokenizer(turbo_pair: tuple[TextFrontEnd, Any], text: str) -> None:
    front_end, auto = turbo_pair
    if auto.pad_token is None:
        auto.pad_token = auto.eos_token
    expected = auto(normalize_punctuation(text, "turbo"), padding=True, truncation=True)["input_ids"]
    assert front_end.encode(text, "en").tolist() == expected


def test_turbo_tags_are_one_token_each_however_the_folder_is_written(turbo_pair: tuple[TextFrontEnd, Any]) -> None:
    front_end, _ = turbo_pair
    assert front_end.tags == set(KNOWN_TAGS)
    ids = front_end.encode("".join(KNOWN_TAGS), "en")
    assert ids[:-1].tolist() == list(range(50257, 50276))


def test_turbo_reads_its_tokenizer_without_transformers_or_torch(folders: dict[str, Path]) -> None:
    program = (
        "import sys; from pathlib import Path; from engine.models import get_model; from engine.text import *;"
        f"load_text_front_end(get_model('turbo'), Path({str(folders['turbo'])!r})).encode('Hello', 'en');"
        "assert not {'transformers', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_tags_are_kept_by_turbo_and_dropped_elsewhere_with_a_warning(front_ends: dict[str, TextFrontEnd]) -> None:
    segments = [Segment("Ha [laugh] ha [laugh]"), Segment("Hm [sigh] [note]")]
    assert front_ends["turbo"].warnings(segments) == ()
    warnings = front_ends["original"].warnings(segments)
    assert len(warnings) == 2
    assert "[laugh]" in warnings[0]
    assert "[sigh]" in warnings[1]
    original = front_ends["original"]
    assert original.encode("Ha [laugh] ha", "en").tolist() == original.encode("Ha ha", "en").tolist()


# -- multilingual -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mtl_tokenizer(folders: dict[str, Path]) -> Any:
    """Upstream's, its Cangjie table and segmenter left out: both come over the network."""
    module = upstream.chatterbox("models.tokenizers.tokenizer")
    tokenizer = module.MTLTokenizer.__new__(module.MTLTokenizer)
    path = folders["multilingual"] / "grapheme_mtl_merged_expanded_v1.json"
    tokenizer.tokenizer = module.Tokenizer.from_file(str(path))
    return tokenizer


_SENTENCES = {
    "en": "Hello there: it's “me”!",
    "de": "Größe und Straße – schön…",
    "el": "Καλημέρα, τι κάνεις;",
    "ar": "مرحبا، كيف حالك؟",
    "hi": "नमस्ते दुनिया।",
    "ko": "안녕하세요, 세계! 값",
    "fr": "Ça va ? L’été",
    "tr": "İyi günler",
    "pl": "Zażółć gęślą jaźń",
}


@pytest.mark.parametrize("language", sorted(_SENTENCES))
def test_multilingual_ids_are_upstreams(front_ends: dict[str, TextFrontEnd], mtl_tokenizer: Any, language: str) -> None:
    text = _SENTENCES[language]
    expected = mtl_tokenizer.encode(normalize_punctuation(text, "multilingual"), language_id=language)
    assert front_ends["multilingual"].encode(text, language).tolist() == [255, *expected, 0]


@settings(max_examples=100, deadline=None)
@given(text=_TEXTS.filter(lambda text: not TAG.search(text)))
@pytest.mark.parametrize("language", ["en", "ko"])
def test_any_text_is_spelled_as_upstream_spells_it(
    front_ends: dict[str, TextFrontEnd], mtl_tokenizer: Any, language: str, text: str
) -> None:
    expected = mtl_tokenizer.encode(normalize_punctuation(text, "multilingual"), language_id=language)
    assert front_ends["multilingual"].encode(text, language).tolist() == [255, *expected, 0]


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["en", "EN", "en-US", "en_GB", " en "])
def test_a_language_tag_stands_for_its_language(front_ends: dict[str, TextFrontEnd], code: str) -> None:
    assert front_ends["multilingual"].check_language(code) == "en"
    assert front_ends["turbo"].encode("Hi", code).size > 0


@pytest.mark.parametrize("code", ["xx", "", "english", "de"])
def test_an_unknown_language_is_refused_with_the_known_ones(front_ends: dict[str, TextFrontEnd], code: str) -> None:
    assert code_of(lambda: front_ends["turbo"].encode("Hallo", code)) == (
        "language_unsupported",
        f"language {code!r} cannot be spoken: turbo speaks en",
    )


def test_a_plan_checks_every_segments_language(front_ends: dict[str, TextFrontEnd]) -> None:
    segments = [Segment("Hello."), Segment("Hallo.", language="de")]
    assert code_of(lambda: front_ends["turbo"].plan(segments, language="en"))[0] == "language_unsupported"
    assert len(front_ends["multilingual"].plan(segments, language="en")) == 2


def test_a_chunk_beyond_the_text_positions_is_refused(front_ends: dict[str, TextFrontEnd]) -> None:
    assert code_of(lambda: front_ends["original"].encode("7" * 3000, "en"))[0] == "text_too_long"


@pytest.mark.parametrize("name", sorted(_WRITERS))
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_missing_or_broken_tokenizer_file_is_named(
    folders: dict[str, Path], tmp_path: Path, name: str, damage: str
) -> None:
    shutil.copytree(folders[name], tmp_path, dirs_exist_ok=True)
    file = tmp_path / MODELS[name].tokenizer_files[0]
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("{")
    code, message = code_of(lambda: load_text_front_end(get_model(name), tmp_path))
    assert code == "weights_missing"
    assert file.name in message
