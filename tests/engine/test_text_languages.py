"""A language is ready or refused by name, and the network is never asked."""

from __future__ import annotations

import importlib.util
import socket
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import upstream
from engine.errors import SpeechError
from engine.models import MODELS, get_model
from engine.random_tokenizers import CANGJIE_SAMPLE, write_multilingual_tokenizer
from engine.text import TextFrontEnd, load_text_front_end, normalize_punctuation
from engine.text.languages import Cangjie, Jamo, Kana, load_cangjie_codes, spell_cangjie

_PREPROCESSED = ("zh", "ja", "he", "ru")


@pytest.fixture
def front_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextFrontEnd:
    """A multilingual front end on a machine without a network or a segmenter model."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("PKUSEG_HOME", str(tmp_path / "pkuseg"))
    write_multilingual_tokenizer(tmp_path)
    return load_text_front_end(get_model("multilingual"), tmp_path)


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(SpeechError) as error:
        function()
    assert error.value.code == "language_unsupported"
    return error.value.message


@pytest.mark.parametrize("language", _PREPROCESSED)
def test_a_language_without_its_package_is_refused_with_the_packages_name(
    front_end: TextFrontEnd, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    package = {"zh": "spacy-pkuseg", "ja": "pykakasi", "he": "dicta-onnx", "ru": "russian-text-stresser"}[language]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert package in message_of(lambda: front_end.encode("好 は ש я", language))
    assert language not in front_end.languages_ready()


def test_every_other_language_is_ready(front_end: TextFrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(front_end.languages_ready()) == set(MODELS["multilingual"].languages) - set(_PREPROCESSED)
    for language in front_end.languages_ready():
        assert front_end.encode("abc", language)[0] == 255


def test_chinese_without_its_table_or_segmenter_model_is_refused_with_the_files_name(
    front_end: TextFrontEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "spacy_ontonotes" in message_of(lambda: front_end.encode("你好", "zh"))
    (tmp_path / "Cangjie5_TC.json").unlink()
    assert "Cangjie5_TC.json" in message_of(lambda: front_end.encode("你好", "zh"))


def test_hebrew_without_its_model_file_is_refused_with_the_files_name(
    front_end: TextFrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "dicta-1.0.onnx" in message_of(lambda: front_end.encode("שלום", "he"))


def test_a_preprocessor_that_does_not_load_refuses_its_language(
    front_end: TextFrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("pykakasi")  # installed, and without the name that is needed
    broken.kakasi = lambda: open("/nonexistent/kanwadict4.db")  # type: ignore[attr-defined] # noqa: SIM115
    monkeypatch.setitem(sys.modules, "pykakasi", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "kanwadict4.db" in message_of(lambda: front_end.encode("日本", "ja"))


def test_a_preprocessor_loads_once_for_all_threads() -> None:
    class Counting(Jamo):
        loads = 0

        def _load(self) -> Callable[[str], str]:
            self.loads += 1
            return super()._load()

    counting = Counting("ko")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(counting, ["가"] * 64)) == {"\u1100\u1161"}
    assert counting.loads == 1


# -- the conversions themselves, against upstream's ---------------------------------------------------


@pytest.fixture(scope="module")
def upstream_module() -> Any:
    return upstream.chatterbox("models.tokenizers.tokenizer")


@given(text=st.text(st.characters(min_codepoint=0xABF0, max_codepoint=0xD7FF)))
def test_korean_syllables_become_upstreams_jamo(upstream_module: Any, text: str) -> None:
    assert Jamo("ko")(text) == upstream_module.korean_normalize(text)


@given(text=st.text(st.sampled_from(CANGJIE_SAMPLE + "一丁丂七abc ，。ひカ가")))
def test_chinese_characters_become_upstreams_cangjie_codes(
    upstream_module: Any, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "cangjie"
    if not folder.exists():
        write_multilingual_tokenizer(folder)
    table = folder / "Cangjie5_TC.json"
    converter = upstream_module.ChineseCangjieConverter.__new__(upstream_module.ChineseCangjieConverter)
    converter.word2cj, converter.cj2word, converter.segmenter = {}, {}, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream_module, "hf_hub_download", lambda **_: str(table))
        converter._load_cangjie_mapping()
    assert spell_cangjie(text, load_cangjie_codes(table)) == converter(text)


def test_japanese_becomes_upstreams_kana(upstream_module: Any) -> None:
    pytest.importorskip("pykakasi")
    for text in ("今日は東京へ行きます。", "カタカナとひらがな", "abc 123", "母は八時に橋へ", "がぎぐ パピプ", ""):
        assert Kana("ja")(text) == upstream_module.hiragana_normalize(text)


def test_chinese_is_cut_into_upstreams_words(upstream_module: Any, front_end: TextFrontEnd, tmp_path: Path) -> None:
    """With a segmenter model made here: the package, its formats and both ways to it are the real ones."""
    pkuseg = pytest.importorskip("spacy_pkuseg")
    folder = tmp_path / "spacy_ontonotes"
    _write_segmenter(folder)
    text = normalize_punctuation("你好世界，今天天气很好。", "multilingual")
    assert "zh" in front_end.languages_ready()
    tokenizer = upstream_module.MTLTokenizer.__new__(upstream_module.MTLTokenizer)
    tokenizer.tokenizer = upstream_module.Tokenizer.from_file(str(tmp_path / "grapheme_mtl_merged_expanded_v1.json"))
    converter = upstream_module.ChineseCangjieConverter.__new__(upstream_module.ChineseCangjieConverter)
    converter.word2cj, converter.cj2word, converter.segmenter = {}, {}, pkuseg.pkuseg(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream_module, "hf_hub_download", lambda **_: str(tmp_path / Cangjie.TABLE_FILE))
        converter._load_cangjie_mapping()
    tokenizer.cangjie_converter = converter
    expected = [255, *tokenizer.encode(text, language_id="zh"), 0]
    assert front_end.encode("你好世界，今天天气很好。", "zh").tolist() == expected
    assert front_end._tokenizer.token_to_id("[SPACE]") in expected  # it did cut


def _write_segmenter(folder: Path) -> None:
    """A model of one feature whose transitions favour words of two characters."""
    srsly = pytest.importorskip("srsly")
    folder.mkdir(parents=True)
    tags = {"B": 0, "I": 1}
    features = {"$$": 0}
    srsly.write_msgpack(
        folder / "features.msgpack",
        {"unigram": [], "bigram": [], "feature_to_idx": features, "tag_to_idx": tags},
    )
    weights = np.zeros(len(tags) * (len(features) + len(tags)))  # (feature, tag), then (tag, tag before)
    transitions = weights[-4:].reshape(2, 2)
    transitions[0, 1] = transitions[1, 0] = 5.0
    np.savez(folder / "weights.npz", sizes=np.array([len(tags), len(features)]), w=weights)
