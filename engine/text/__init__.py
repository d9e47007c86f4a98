"""Text, from what a caller wrote to what T3 is given.

`plan` cuts a request's segments into chunks; a `TextFrontEnd` normalises and tokenises a chunk as
its model was trained to read it, and says which languages and tags there are; a `Lexicon` says words as
a caller wants them said. Needs no torch.
"""

from engine.text.languages import base_language
from engine.text.lexicon import Lexicon
from engine.text.markup import KNOWN_TAGS
from engine.text.normalize import is_speakable, normalize_punctuation
from engine.text.planning import DEFAULT_MAX_CHARS, PlannedChunk, plan
from engine.text.tokenizers import MAX_TEXT_TOKENS, TextFrontEnd, load_text_front_end

__all__ = [
    "DEFAULT_MAX_CHARS",
    "KNOWN_TAGS",
    "MAX_TEXT_TOKENS",
    "Lexicon",
    "PlannedChunk",
    "TextFrontEnd",
    "base_language",
    "is_speakable",
    "load_text_front_end",
    "normalize_punctuation",
    "plan",
]
