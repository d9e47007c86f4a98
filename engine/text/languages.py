"""What a language needs before its text is spelled in the multilingual model's tokens.

The model was trained on text that went through these: Chinese as Cangjie codes, Japanese as kana,
Hebrew with its vowel points, Russian with stress marks, Korean as jamo. Unprocessed text would be
read as gibberish, so a language whose preprocessor, word list or model is not there is refused with
the name of what is missing. Nothing here asks the network for anything.

Results are those of upstream's MTLTokenizer (chatterbox/models/tokenizers/tokenizer.py) where the
same packages are installed. The instances belong to one text front end: what they load, they load
once, at first use, under their own lock.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.errors import SpeechError

Convert = Callable[[str], str]

_ALIASES: Mapping[str, str] = {"nb": "no", "nn": "no", "iw": "he", "cmn": "zh"}


def base_language(code: str) -> str:
    """The ISO 639-1 code of a language tag: en-US, EN and en_GB are en."""
    base = code.strip().replace("_", "-").split("-")[0].lower()
    return _ALIASES.get(base, base)


class Preprocessor(ABC):
    """Turns a language's text (lower case, NFKD) into what the tokenizer spells."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._convert: Convert | None = None
        self._lock = threading.Lock()

    def __call__(self, text: str) -> str:
        """
        Raises:
            SpeechError: language_unsupported, naming what is missing.
        """
        with self._lock:  # neither the loading nor the packages' own calls are known to be thread-safe
            if self._convert is None:
                self._convert = self._checked_load()
            return self._convert(text)

    def _checked_load(self) -> Convert:
        missing = self.missing()
        if missing is not None:
            raise unsupported(self.language, missing)
        try:
            return self._load()
        except (ImportError, OSError, ValueError, TypeError, LookupError) as error:
            raise unsupported(self.language, f"its preprocessor does not load ({error})") from error

    @abstractmethod
    def missing(self) -> str | None:
        """What is not there, in words; None when all is. Cheap: nothing is loaded."""

    @abstractmethod
    def _load(self) -> Convert: ...


def unsupported(language: str, reason: str) -> SpeechError:
    return SpeechError("language_unsupported", f"language {language!r} cannot be spoken: {reason}", "language")


def _missing_package(module: str, package: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"the package {package} is not installed"


def preprocessors(model_dir: Path) -> dict[str, Preprocessor]:
    """The preprocessors by language; a language without one needs none."""
    return {
        "zh": Cangjie(model_dir),
        "ja": Kana("ja"),
        "he": HebrewPoints(model_dir),
        "ko": Jamo("ko"),
        "ru": RussianStress("ru"),
    }


class Jamo(Preprocessor):
    """Korean: syllables become their initial, medial and final sounds. Needs nothing."""

    def missing(self) -> str | None:
        return None

    def _load(self) -> Convert:
        return lambda text: "".join(map(_decompose_syllable, text)).strip()


def _decompose_syllable(character: str) -> str:
    """Hangul decomposition (The Unicode Standard, 3.12): 588 syllables per initial, 28 per medial.

    The characters behind U+D7A3 are no syllables; upstream's formula takes U+D7A4 to U+D7AF too.
    """
    if not "\uac00" <= character <= "\ud7af":
        return character
    initial, rest = divmod(ord(character) - 0xAC00, 588)
    medial, final = divmod(rest, 28)
    return chr(0x1100 + initial) + chr(0x1161 + medial) + (chr(0x11A7 + final) if final else "")


class Kana(Preprocessor):
    """Japanese: words with kanji become hiragana, by pykakasi; katakana stays."""

    def missing(self) -> str | None:
        return _missing_package("pykakasi", "pykakasi")

    def _load(self) -> Convert:
        kakasi = importlib.import_module("pykakasi").kakasi()
        return lambda text: unicodedata.normalize("NFKD", "".join(map(_reading, kakasi.convert(text))))


def _reading(word: Mapping[str, str]) -> str:
    """A particle-like reading keeps apart from the word before it with a space, as in training."""
    if not any("\u4e00" <= character <= "\u9fff" for character in word["orig"]):
        return word["orig"]
    return f" {word['hira']}" if word["hira"].startswith(("は", "へ")) else word["hira"]


class HebrewPoints(Preprocessor):
    """Hebrew: vowel points by dicta_onnx, whose model file lies in the model folder."""

    MODEL_FILE = "dicta-1.0.onnx"

    def __init__(self, model_dir: Path) -> None:
        super().__init__("he")
        self._model_file = model_dir / self.MODEL_FILE

    def missing(self) -> str | None:
        package = _missing_package("dicta_onnx", "dicta-onnx")
        if package is None and not self._model_file.is_file():
            return f"{self._model_file} (the model of dicta-onnx) is not there"
        return package

    def _load(self) -> Convert:
        convert: Convert = importlib.import_module("dicta_onnx").Dicta(str(self._model_file)).add_diacritics
        return convert


class RussianStress(Preprocessor):
    """Russian: stress marks by russian_text_stresser, which brings its own word list and spaCy model."""

    def missing(self) -> str | None:
        return _missing_package("russian_text_stresser", "russian-text-stresser")

    def _load(self) -> Convert:
        module = importlib.import_module("russian_text_stresser.text_stresser")
        convert: Convert = module.RussianTextStresser().stress_text
        return convert


class Cangjie(Preprocessor):
    """Chinese: words apart (spacy_pkuseg), each character as its Cangjie code (the folder's table).

    The segmenter's model is looked for in the model folder, then where spacy_pkuseg keeps its own.
    """

    TABLE_FILE = "Cangjie5_TC.json"
    SEGMENTER_MODEL = "spacy_ontonotes"

    def __init__(self, model_dir: Path) -> None:
        super().__init__("zh")
        self._table_file = model_dir / self.TABLE_FILE
        self._model_dir = model_dir

    def missing(self) -> str | None:
        if not self._table_file.is_file():
            return f"{self._table_file} is not there"
        package = _missing_package("spacy_pkuseg", "spacy-pkuseg")
        if package is None and self._segmenter_dir() is None:
            places = " or ".join(str(place) for place in self._segmenter_places())
            return f"the segmenter model {self.SEGMENTER_MODEL} of spacy-pkuseg is not at {places}"
        return package

    def _load(self) -> Convert:
        codes = load_cangjie_codes(self._table_file)
        # Given a path, and not the model's name, pkuseg does not fetch.
        segmenter = importlib.import_module("spacy_pkuseg").pkuseg(str(self._segmenter_dir()))
        return lambda text: spell_cangjie(" ".join(segmenter.cut(text)), codes)

    def _segmenter_dir(self) -> Path | None:
        return next((place for place in self._segmenter_places() if _is_segmenter(place)), None)

    def _segmenter_places(self) -> tuple[Path, ...]:
        home = Path(os.environ.get("PKUSEG_HOME", "~/.pkuseg")).expanduser()
        return self._model_dir / self.SEGMENTER_MODEL, home / self.SEGMENTER_MODEL


def _is_segmenter(folder: Path) -> bool:
    return (folder / "features.msgpack").is_file() and (folder / "weights.npz").is_file()


def load_cangjie_codes(table_file: Path) -> dict[str, str]:
    """Character → code. Characters that share a code are told apart by a number behind it, from the
    second on, in the table's order."""
    codes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for entry in json.loads(table_file.read_text(encoding="utf-8")):
        character, code = entry.split("\t")[:2]
        count = counts.get(code, 0)
        codes[character] = f"{code}{count}" if count else code
        counts[code] = count + 1
    return codes


def spell_cangjie(text: str, codes: Mapping[str, str]) -> str:
    """Spell letters of scripts without case that are in the table; all else stays."""
    return "".join(_spell(character, codes) for character in text)


def _spell(character: str, codes: Mapping[str, str]) -> str:
    if unicodedata.category(character) != "Lo" or character not in codes:
        return character
    return "".join(f"[cj_{symbol}]" for symbol in codes[character]) + "[cj_.]"
