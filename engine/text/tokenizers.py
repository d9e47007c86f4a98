"""A chunk's text → the token ids that T3 is given, family by family, as upstream's generate() does.

transformers is not used: it takes seconds to import, and GPT-2's byte-level BPE is a few lines on
the `tokenizers` library that it uses itself.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.errors import SpeechError
from engine.models import START_TEXT_TOKEN, STOP_TEXT_TOKEN, ModelSpec
from engine.text.languages import Preprocessor, base_language, preprocessors, unsupported
from engine.text.markup import unknown_tags
from engine.text.normalize import normalize
from engine.text.planning import DEFAULT_MAX_CHARS, PlannedChunk, plan
from engine.types import IntArray, Segment

MAX_TEXT_TOKENS = 2048
"""Text positions of the original and the multilingual T3 (T3Config.max_text_tokens); Turbo's GPT-2
has more, and its chunks stay far below as well. Upstream cuts longer text off or crashes."""

_TAG = re.compile(r"\[[a-z ]+\]")


class TextFrontEnd(ABC):
    """All that a model needs to know of text. Immutable after loading, safe to share across threads.

    Args:
        spec: the family member.
        tokenizer: its tokenizer.
        preprocessors: what languages need first, by language.
        tags: the tags that are tokens of this model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        *,
        preprocessors: dict[str, Preprocessor] | None = None,
        tags: frozenset[str] = frozenset(),
    ) -> None:
        self.spec = spec
        self.tags = tags
        self._tokenizer = tokenizer
        self._preprocessors = preprocessors or {}

    def encode(self, text: str, language: str) -> IntArray:
        """Normalise and tokenise one chunk.

        Returns:
            int32 (N,): final ids, with the start and stop tokens where the family has them.

        Raises:
            SpeechError: text_empty, language_unsupported, or text_too_long past MAX_TEXT_TOKENS.
        """
        code = self.check_language(language)
        ids = self._ids(normalize(text, self.spec.family, self.tags), code)
        if len(ids) > MAX_TEXT_TOKENS:
            raise SpeechError(
                "text_too_long", f"{len(ids)} text tokens in one chunk, expected at most {MAX_TEXT_TOKENS}", "text"
            )
        return np.asarray(ids, dtype=np.int32)

    def plan(
        self, segments: Sequence[Segment], *, language: str, max_chars: int = DEFAULT_MAX_CHARS
    ) -> list[PlannedChunk]:
        """`planning.plan` for this model; every language is checked first.

        Raises:
            SpeechError: language_unsupported, and what `planning.plan` raises.
        """
        for code in dict.fromkeys(segment.language or language for segment in segments):
            self.check_language(code)
        return plan(segments, language=language, max_chars=max_chars, tags=self.tags)

    def warnings(self, segments: Sequence[Segment]) -> tuple[str, ...]:
        """What in the text this model does not have, in words."""
        dropped = unknown_tags([segment.text for segment in segments], self.tags)
        return tuple(f"{self.spec.name} has no tag {tag}: it was dropped" for tag in dropped)

    def languages_ready(self) -> tuple[str, ...]:
        """The model's languages whose preprocessors are all there."""
        return tuple(code for code in self.spec.languages if self._missing(code) is None)

    def check_language(self, code: str) -> str:
        """The model's code for a language tag: en for en-US.

        Raises:
            SpeechError: language_unsupported, listing the languages or naming what is missing.
        """
        language = base_language(code)
        if language not in self.spec.languages:
            known = ", ".join(self.spec.languages)
            raise unsupported(code, f"{self.spec.name} speaks {known}")
        missing = self._missing(language)
        if missing is not None:
            raise unsupported(code, missing)
        return language

    def _missing(self, language: str) -> str | None:
        preprocessor = self._preprocessors.get(language)
        return None if preprocessor is None else preprocessor.missing()

    @abstractmethod
    def _ids(self, text: str, language: str) -> list[int]: ...

    def _spaced_ids(self, text: str) -> list[int]:
        """Ids between start and stop, spaces as tokens of their own (original, multilingual)."""
        ids = self._tokenizer.encode(text.replace(" ", "[SPACE]")).ids
        return [START_TEXT_TOKEN, *ids, STOP_TEXT_TOKEN]


class _OriginalFrontEnd(TextFrontEnd):
    def _ids(self, text: str, language: str) -> list[int]:
        return self._spaced_ids(text)


class _MultilingualFrontEnd(TextFrontEnd):
    def _ids(self, text: str, language: str) -> list[int]:
        text = unicodedata.normalize("NFKD", text.lower())
        preprocessor = self._preprocessors.get(language)
        if preprocessor is not None:
            text = preprocessor(text)
        return self._spaced_ids(f"[{language}]{text}")


class _TurboFrontEnd(TextFrontEnd):
    def _ids(self, text: str, language: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


def load_text_front_end(spec: ModelSpec, model_dir: Path) -> TextFrontEnd:
    """Read a model folder's tokenizer files.

    Raises:
        SpeechError: weights_missing, naming the file that is not there or not readable.
    """
    model_dir = Path(model_dir)
    if spec.family == "turbo":
        tokenizer = _load_gpt2(model_dir)
        tags = frozenset(filter(_TAG.fullmatch, _added_contents(tokenizer)))
        return _TurboFrontEnd(spec, tokenizer, tags=tags)
    tokenizer = _load_word_pieces(model_dir / spec.tokenizer_files[0])
    if spec.family == "multilingual":
        return _MultilingualFrontEnd(spec, tokenizer, preprocessors=preprocessors(model_dir))
    return _OriginalFrontEnd(spec, tokenizer)


def _added_contents(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def _load_word_pieces(path: Path) -> Tokenizer:
    tokenizer = _load_file(path)
    vocabulary = tokenizer.get_vocab()
    if vocabulary.get("[START]") != START_TEXT_TOKEN or vocabulary.get("[STOP]") != STOP_TEXT_TOKEN:
        raise SpeechError("weights_missing", f"{path} is not this model's tokenizer: no [START] and [STOP]")
    return tokenizer


def _load_file(path: Path) -> Tokenizer:
    _check_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise SpeechError("weights_missing", f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise SpeechError("weights_missing", f"the tokenizer file {path} is not there")


def _read_json(path: Path) -> Any:
    _check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpeechError("weights_missing", f"{path} cannot be read: {error}") from error


def _load_gpt2(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer with the folder's added tokens, as transformers' AutoTokenizer builds it."""
    config_file = folder / "tokenizer_config.json"
    config: dict[str, Any] = _read_json(config_file) if config_file.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        tokenizer = _load_file(folder / "tokenizer.json")
    else:
        tokenizer = _build_gpt2(folder, add_prefix_space=bool(config.get("add_prefix_space", False)))
    for index, token in sorted(_added_tokens(folder, config).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise SpeechError("weights_missing", f"{folder}: the added token {token.content} is not at {index}")
    tokenizer.add_special_tokens(_special_contents(folder, config))
    return tokenizer


def _build_gpt2(folder: Path, *, add_prefix_space: bool) -> Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        _check_file(folder / name)
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise SpeechError("weights_missing", f"{folder}: vocab.json or merges.txt cannot be read: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Token by id: tokenizer_config.json's list, which says how each matches, else added_tokens.json."""
    if config.get("added_tokens_decoder"):
        return {int(index): AddedToken(**facts) for index, facts in config["added_tokens_decoder"].items()}
    legacy = folder / "added_tokens.json"
    contents: dict[str, int] = _read_json(legacy) if legacy.is_file() else {}
    return {index: AddedToken(content, special=False) for content, index in contents.items()}


def _special_contents(folder: Path, config: dict[str, Any]) -> list[str]:
    """The texts of the tokens with a role; GPT-2 has its end of text in every role that is not said."""
    map_file = folder / "special_tokens_map.json"
    roles: dict[str, Any] = (_read_json(map_file) if map_file.is_file() else {}) | config
    tokens = [roles.get(role) or "<|endoftext|>" for role in ("bos_token", "eos_token", "unk_token")]
    return [token if isinstance(token, str) else token["content"] for token in tokens]
