"""Text as each family member was trained to read it.

Two steps, in this order: `clean_text` takes out what no tokenizer should see, `normalize_punctuation`
is upstream's punc_norm, family by family (chatterbox tts.py, tts_turbo.py, mtl_tts.py; the release
0.1.7 and the repository's main have the same). Upstream speaks a sentence of its own when the text is
empty; here that is a text_empty error before it comes to it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping

from engine.errors import SpeechError
from engine.text.markup import drop_unknown_tags

_SHARED_REPLACEMENTS = (
    ("—", "-"),
    ("–", "-"),
    (" ,", ","),
    ("“", '"'),
    ("”", '"'),
    ("‘", "'"),
    ("’", "'"),
)
_TURBO_REPLACEMENTS = (("…", ", "), (":", ","), *_SHARED_REPLACEMENTS)
_LLAMA_REPLACEMENTS = (
    ("...", ", "),
    ("…", ", "),
    (":", ","),
    (" - ", ", "),
    (";", ", "),
    *_SHARED_REPLACEMENTS,
)
_REPLACEMENTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "original": _LLAMA_REPLACEMENTS,
    "multilingual": _LLAMA_REPLACEMENTS,
    "turbo": _TURBO_REPLACEMENTS,
}
_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "original": (".", "!", "?", "-", ","),
    "multilingual": (".", "!", "?", "-", ",", "、", "，", "。", "？", "！"),
    "turbo": (".", "!", "?", "-", ","),
}

_INVISIBLE = re.compile(
    "["
    "\u00ad"  # soft hyphen
    "\u200b\u2060\ufeff"  # zero-width space, word joiner, byte order mark
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction marks
    "\ufff9-\ufffd"  # annotation marks, object and character replacements
    "\ufffe\uffff"  # noncharacters
    "\ud800-\udfff"  # surrogates
    "]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def repair_surrogates(text: str) -> str:
    """Join surrogate pairs to the character they mean; a lone one becomes U+FFFD.

    Text with a lone surrogate cannot be written out again (UTF-8 has no form for it).
    """
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def clean_text(text: str) -> str:
    """Remove what has no sound and no place in a tokenizer's vocabulary.

    Removed: control characters (category Cc) other than white space, surrogates that pair with
    nothing, soft hyphens, zero-width spaces and joints of words, byte order marks, direction marks,
    replacement characters, U+FFFE and U+FFFF. Kept: white space of every kind (it becomes plain
    spaces later), and the zero-width joiner and non-joiner, which spelling needs in several scripts.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _INVISIBLE.sub("", repair_surrogates(text))
    return "".join(character for character in text if unicodedata.category(character) != "Cc" or character.isspace())


def is_speakable(text: str, tags: Collection[str] = ()) -> bool:
    """Whether the text holds a letter or a digit, or one of the model's own tags."""
    if not any(map(str.isalnum, text)):
        return False
    return "[" not in text or any(map(str.isalnum, drop_unknown_tags(text, tags)))


def normalize_punctuation(text: str, family: str) -> str:
    """Upstream's punc_norm for `family` (original, multilingual or turbo), on text that is not empty.

    Raises:
        SpeechError: text_empty.
    """
    if not text:
        raise SpeechError("text_empty", "the text holds nothing that can be spoken", "text")
    if text[0].islower():
        text = text[0].upper() + text[1:]
    text = " ".join(text.split())
    for old, new in _REPLACEMENTS[family]:
        text = text.replace(old, new)
    text = text.rstrip(" ")
    return text if text.endswith(_ENDINGS[family]) else text + "."


def normalize(text: str, family: str, tags: Collection[str] = ()) -> str:
    """Clean a chunk's text, drop tags that are not the model's, and normalise its punctuation.

    Raises:
        SpeechError: text_empty when nothing speakable is left.
    """
    cleaned = drop_unknown_tags(clean_text(text), tags)
    if not is_speakable(cleaned, tags):
        raise SpeechError("text_empty", "the text holds nothing that can be spoken", "text")
    return normalize_punctuation(cleaned, family)
