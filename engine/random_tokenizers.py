"""Writes tokenizer files in upstream's exact layout, with generated vocabularies.

Tests and benchmarks need checkpoint folders that upstream's own classes load, and the published
vocabularies belong to their repositories. Here the files have the published sizes, formats and
special tokens at their published ids, while the pieces of words are made up by rule: every file is
the same on every machine and at every call.

What is fixed by T3 is only this: [STOP] is 0 and [START] 255 (original, multilingual), and each
vocabulary is as large as the text embedding. Tags and language tokens have upstream's names.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.models import MODELS, START_TEXT_TOKEN, STOP_TEXT_TOKEN
from engine.text.markup import KNOWN_TAGS

TURBO_TAGS = KNOWN_TAGS
"""The 19 added tokens between GPT-2's 50257 and Turbo's 50276."""

CANGJIE_SAMPLE = "你好世界今天天氣很好我們一起學習中文明日月"
"""Characters that the written Cangjie table is sure to hold, beside U+4E00 to U+4EFF."""

END_OF_TEXT = "<|endoftext|>"
_LETTERS = string.ascii_lowercase
_SCRIPTS: tuple[tuple[int, int], ...] = (
    (0x0300, 0x0345),  # combining marks, which NFKD leaves behind
    (0x03B1, 0x03C9),  # Greek
    (0x0430, 0x045F),  # Cyrillic
    (0x05B0, 0x05EA),  # Hebrew with points
    (0x0621, 0x0652),  # Arabic with marks
    (0x0901, 0x094D),  # Devanagari
    (0x1100, 0x1112),  # Hangul jamo: initials
    (0x1161, 0x1175),  # medials
    (0x11A8, 0x11C2),  # finals
    (0x3001, 0x3002),  # CJK punctuation
    (0x3041, 0x309A),  # hiragana with sound marks
    (0x30A1, 0x30FC),  # katakana
)


def write_original_tokenizer(folder: Path) -> None:
    """Write tokenizer.json with the original model's 704 tokens."""
    size = MODELS["original"].text_vocab_size
    _write_json(folder / "tokenizer.json", _word_piece_file(size, added=(), characters=()))


def write_multilingual_tokenizer(folder: Path) -> None:
    """Write grapheme_mtl_merged_expanded_v1.json (2454 tokens) and a small Cangjie5_TC.json."""
    spec = MODELS["multilingual"]
    languages = [f"[{code}]" for code in spec.languages]
    cangjie = [f"[cj_{symbol}]" for symbol in [*_LETTERS, *string.digits, "."]]
    characters = [chr(code) for low, high in _SCRIPTS for code in range(low, high + 1)]
    contents = _word_piece_file(spec.text_vocab_size, added=[*languages, *cangjie], characters=characters)
    _write_json(folder / spec.tokenizer_files[0], contents)
    write_cangjie_table(folder)


def write_turbo_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt, added_tokens.json, special_tokens_map.json and
    tokenizer_config.json: 50276 tokens, the tags last. There is no tokenizer.json, as upstream."""
    size = MODELS["turbo"].text_vocab_size - len(TURBO_TAGS)
    vocabulary = {character: index for index, character in enumerate(_byte_characters())}
    merges = list(itertools.islice(_turbo_merges(), size - len(vocabulary) - 1))
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    vocabulary[END_OF_TEXT] = len(vocabulary)
    assert len(vocabulary) == size, len(vocabulary)
    tags = {tag: size + index for index, tag in enumerate(TURBO_TAGS)}
    _write_json(folder / "vocab.json", vocabulary)
    merge_lines = "\n".join(f"{left} {right}" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merge_lines}\n", encoding="utf-8")
    _write_json(folder / "added_tokens.json", tags)
    _write_json(folder / "special_tokens_map.json", dict.fromkeys(_SPECIAL_ROLES, END_OF_TEXT))
    _write_json(folder / "tokenizer_config.json", _turbo_config(vocabulary[END_OF_TEXT], tags))


def write_cangjie_table(folder: Path) -> None:
    """Write a small Cangjie5_TC.json: a list of "character<TAB>code" lines.

    The codes are made up, two letters from the code point, so that many characters share one and
    the table needs its disambiguating index.
    """
    characters = dict.fromkeys([*CANGJIE_SAMPLE, *map(chr, range(0x4E00, 0x4F00))])
    _write_json(folder / "Cangjie5_TC.json", [f"{c}\t{_cangjie_code(ord(c))}" for c in characters])


_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token")


def _turbo_config(end_id: int, tags: dict[str, int]) -> dict[str, object]:
    decoder = {str(end_id): _added_token(END_OF_TEXT, special=True, normalized=True)}
    decoder |= {str(index): _added_token(tag, special=False, normalized=True) for tag, index in tags.items()}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1024,
        "tokenizer_class": "GPT2Tokenizer",
        **dict.fromkeys(_SPECIAL_ROLES, END_OF_TEXT),
    }


def _added_token(content: str, *, special: bool, normalized: bool) -> dict[str, object]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }


def _word_piece_file(size: int, added: Iterable[str], characters: Iterable[str]) -> dict[str, object]:
    """A `tokenizers` file: BPE over whitespace-separated words, special tokens as added tokens."""
    merges: list[str] = []
    specials = {"[STOP]": STOP_TEXT_TOKEN, "[UNK]": 1, "[SPACE]": 2, "[START]": START_TEXT_TOKEN}
    vocabulary = dict(specials)
    free_ids = iter(sorted(set(range(size)) - set(specials.values())))
    for token in [*added, *_ascii_characters(), *characters]:
        vocabulary[token] = next(free_ids)
    for (left, right), index in zip(_letter_merges(), free_ids, strict=False):
        vocabulary[left + right] = index
        merges.append(f"{left} {right}")
    assert len(vocabulary) == size, len(vocabulary)
    added_tokens = [
        {"id": vocabulary[token]} | _added_token(token, special=True, normalized=False)
        for token in sorted([*specials, *added], key=vocabulary.__getitem__)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def _ascii_characters() -> list[str]:
    return [*"!'\"(),-.:;?", *string.digits, *string.ascii_uppercase, *_LETTERS]


def _letter_merges() -> Iterator[tuple[str, str]]:
    """Pairs of letters, then triples: each merge's halves exist before it."""
    yield from itertools.product(_LETTERS, _LETTERS)
    yield from ((a + b, c) for a, b, c in itertools.product(_LETTERS, repeat=3))


def _turbo_merges() -> Iterator[tuple[str, str]]:
    """As `_letter_merges`, with GPT-2's sign for a leading space, and words of four letters."""
    space = _byte_characters()[ord(" ")]
    yield from _letter_merges()
    yield from ((space, letter) for letter in string.ascii_letters)
    yield from ((space, a + b) for a, b in itertools.product(_LETTERS, _LETTERS))
    yield from ((a + b, c + d) for a, b, c, d in itertools.product(_LETTERS, repeat=4))


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes, in byte order.

    Bytes that print stand for themselves, the rest move to U+0100 and up in byte order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = itertools.count(0x100)
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]


def _cangjie_code(code_point: int) -> str:
    return _LETTERS[code_point % 26] + _LETTERS[code_point // 26 % 5]


def _write_json(path: Path, contents: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, ensure_ascii=False, indent=1), encoding="utf-8")
