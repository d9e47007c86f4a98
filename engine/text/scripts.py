"""Scripts that put no space between words, as patterns for the `regex` module (its VERSION1).

What a reader sees as one syllable is one unit there: nothing may be replaced, and no line may break,
inside it. Korean, which does put spaces between words, is not among them.
"""

from __future__ import annotations

SPACELESS = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]&&[\p{L}\p{Nl}]]"
"""A letter of such a script."""

_BEFORE = r"[\u0e40-\u0e44\u0ec0-\u0ec4]"  # vowels of Thai and Lao that are written before their consonant
_BEHIND = (
    r"[\p{M}\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3"  # and those written behind it
    r"ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ"  # small kana
    r"\u30fc\uff70\uff9e\uff9f々ゝゞヽヾ]"  # marks of length, voice and repetition
)
_STACKED = rf"[\u17d2\u1039]{SPACELESS}"  # a consonant below the one before it (Khmer, Myanmar)

SYLLABLE = rf"{_BEFORE}?{SPACELESS}(?:{_STACKED}|{_BEHIND})*+"
"""A letter with what is read along with it."""
