"""The generated tokenizer files load in upstream's own classes, at the published sizes and ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import upstream
from engine.models import MODELS
from engine.random_tokenizers import (
    TURBO_TAGS,
    write_multilingual_tokenizer,
    write_original_tokenizer,
    write_turbo_tokenizer,
)


def test_upstream_loads_the_original_tokenizer_with_its_control_tokens_in_place(tmp_path: Path) -> None:
    write_original_tokenizer(tmp_path)
    tokenizer = upstream.chatterbox("models.tokenizers").EnTokenizer(str(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert len(vocabulary) == 704
    assert [vocabulary[name] for name in ("[STOP]", "[UNK]", "[SPACE]", "[START]")] == [0, 1, 2, 255]
    assert 1 not in tokenizer.encode("Hello, World 42!")


def test_upstream_loads_the_multilingual_tokenizer_with_a_token_for_each_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_multilingual_tokenizer(tmp_path)
    module = upstream.chatterbox("models.tokenizers.tokenizer")
    table = tmp_path / "Cangjie5_TC.json"
    monkeypatch.setattr(module, "hf_hub_download", lambda **_: str(table))
    monkeypatch.setattr(module.ChineseCangjieConverter, "_init_segmenter", lambda self: None)
    tokenizer = module.MTLTokenizer(str(tmp_path / "grapheme_mtl_merged_expanded_v1.json"))
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert len(vocabulary) == 2454
    assert [vocabulary[name] for name in ("[STOP]", "[UNK]", "[SPACE]", "[START]")] == [0, 1, 2, 255]
    for code in MODELS["multilingual"].languages:
        assert tokenizer.encode("abc", language_id=code)[0] == vocabulary[f"[{code}]"]
    assert len(tokenizer.cangjie_converter.word2cj) > 256


def test_auto_tokenizer_loads_the_turbo_folder_with_every_tag_as_one_token(tmp_path: Path) -> None:
    import transformers

    write_turbo_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 50276
    for index, tag in enumerate(TURBO_TAGS):
        assert tokenizer(tag)["input_ids"] == [50257 + index]
    assert tokenizer.decode(tokenizer("Hello [laugh] wörld 你好")["input_ids"]) == "Hello [laugh] wörld 你好"
