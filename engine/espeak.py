"""The one door to eSpeak NG: text in, 16-bit samples out, the same samples every time.

eSpeak NG is a C library with one global state per process: two calls at once corrupt each other, and
a voice, pitch or rate set for one text stays for the next. So a process has one `EspeakLibrary`,
one lock around every call, and every call sets everything.

Two things that colour the sound survive even that, because nothing in its interface resets them:

- a slow random walk of the pitch (flutter) goes on where the last text left it. The voice variant used
  here has none.
- trills and rough vowels weaken every second or fourth cycle of the voice, counted from the first text
  ever spoken. `_rewind` speaks a single trilled r until it sounds as it did in the fresh library: then
  the count stands where it stood, modulo four.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import tempfile
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import SpeechError

NORMAL_RATE_WPM = 175
MIN_RATE_WPM, MAX_RATE_WPM = 80, 450

# from espeak_lib.h / speak_lib.h of eSpeak NG 1.52
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1  # neither SSML (0x10) nor phoneme markup (0x100): the text is plain text
_POS_CHARACTER = 1
_RATE, _VOLUME, _PITCH, _RANGE, _PUNCTUATION, _CAPITALS, _WORDGAP = range(1, 8)

_VARIANT = "+Alex"
"""A neutral male variant without flutter and with a pitch of its own, so one calibration serves every language."""

_LOUDNESS = 70  # of 100: peaks stay below the point where the gain control, another state, sets in
_INTONATION = 99  # of 99: the variant alone speaks rather flatly
_REWIND_TRIES = 8

_MAX_PATH_BYTES = 150

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_LOADING = threading.Lock()


@dataclass(frozen=True)
class _Utterance:
    """All that eSpeak is told of one text."""

    text: str
    voice: str
    pitch: int = 50
    rate_wpm: int = NORMAL_RATE_WPM
    intonation: int = _INTONATION


_TRILL = _Utterance("r", "roa/es" + _VARIANT, intonation=50)
"""An r alone in Spanish, of an odd number of cycles with these settings: speaking it again and again
goes through all four states of the count."""


class _Voice(ctypes.Structure):
    """espeak_VOICE. `languages` is a list of (priority byte, NUL-ended code), ended by a zero priority."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


def library() -> EspeakLibrary:
    """This process's eSpeak NG, loaded by the first call.

    Raises:
        SpeechError: model_unavailable when the package or its library cannot be used.
    """
    with _LOADING:  # functools.cache alone would let two threads initialise it at once
        return _library()


@functools.cache
def _library() -> EspeakLibrary:
    try:
        import espeakng_loader
    except ImportError as error:
        raise SpeechError(
            "model_unavailable",
            f"the draft voice needs eSpeak NG ({error}); install it with `pip install -r requirements-draft.txt`",
            "model",
        ) from error
    try:
        return EspeakLibrary(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
    except (OSError, RuntimeError) as error:
        raise SpeechError("model_unavailable", f"eSpeak NG cannot be loaded: {error}", "model") from error


class EspeakLibrary:
    """eSpeak NG behind a lock. Use `library()`: a second instance would share the first one's state.

    Args:
        library_path: the shared library.
        data_path: its espeak-ng-data folder.

    Raises:
        OSError: when either cannot be loaded.
    """

    def __init__(self, library_path: str, data_path: str) -> None:
        self._lock = threading.Lock()
        self._espeak = ctypes.CDLL(library_path)
        self._links = tempfile.TemporaryDirectory(prefix="espeak-")
        self._espeak.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        self.sample_rate: int = self._espeak.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(_short(data_path, self._links.name)), _INITIALIZE_DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise OSError(f"no usable data in {data_path}")
        self._fresh = self._speak(_TRILL).tobytes()
        self.voices: Mapping[str, str] = _by_language(self._list_voices(), Path(data_path))

    def speak(self, text: str, language: str, pitch: int = 50, rate_wpm: int = NORMAL_RATE_WPM) -> NDArray[np.int16]:
        """Speak plain text.

        Args:
            text: anything; what is not text (control characters, lone surrogates) is read as a space.
            language: a code of `voices`.
            pitch: 0 to 99, see `engine.draft` for Hz.
            rate_wpm: words per minute, 80 to 450.

        Returns:
            int16 (T,) at `sample_rate`; empty where eSpeak finds nothing to say. Equal arguments give
            equal samples, whatever was spoken before.

        Raises:
            SpeechError: language_unsupported, generation_failed.
        """
        with self._lock:
            self._rewind()
            return self._speak(_Utterance(_plain(text), self.voices[language] + _VARIANT, pitch, rate_wpm))

    def _rewind(self) -> None:
        for _ in range(_REWIND_TRIES):
            if self._speak(_TRILL).tobytes() == self._fresh:
                return
        raise SpeechError("generation_failed", "eSpeak NG did not come back to the state it started in")

    def _speak(self, utterance: _Utterance) -> NDArray[np.int16]:
        pieces: list[bytes] = []

        def collect(samples: ctypes._Pointer, count: int, _events: object) -> int:
            if samples and count > 0:
                pieces.append(ctypes.string_at(samples, count * 2))
            return 0

        callback = _CALLBACK(collect)  # the library keeps the pointer: alive until the call is over
        self._espeak.espeak_SetSynthCallback(callback)
        self._set_everything(utterance)
        data = utterance.text.encode("utf-8") + b"\0"
        size = ctypes.c_size_t(len(data))
        status = self._espeak.espeak_Synth(data, size, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status != 0:
            raise SpeechError("generation_failed", f"eSpeak NG gave up on the text (status {status})")
        return np.frombuffer(b"".join(pieces), np.int16)

    def _set_everything(self, utterance: _Utterance) -> None:
        if self._espeak.espeak_SetVoiceByName(os.fsencode(utterance.voice)) != 0:
            raise SpeechError("language_unsupported", f"eSpeak NG cannot load {utterance.voice!r}", "language")
        settings = {
            _RATE: utterance.rate_wpm,
            _VOLUME: _LOUDNESS,
            _PITCH: utterance.pitch,
            _RANGE: utterance.intonation,
            _PUNCTUATION: 0,
            _CAPITALS: 0,
            _WORDGAP: 0,
        }
        for parameter, value in settings.items():
            self._espeak.espeak_SetParameter(parameter, value, 0)

    def _list_voices(self) -> Iterator[tuple[int, str, str]]:
        """(priority, language code, voice identifier), in eSpeak's own order."""
        voices = self._espeak.espeak_ListVoices(None)
        for index in itertools.count():
            if not voices[index]:  # the list ends with a null pointer
                return
            voice = voices[index].contents
            for priority, code in _languages(voice.languages):
                yield priority, code, os.fsdecode(voice.identifier)


def _short(path: str, links: str) -> str:
    """The path, or a link to it where it is longer than eSpeak's buffer (160 bytes with its NUL) holds."""
    if len(os.fsencode(path)) < _MAX_PATH_BYTES:
        return path
    link = Path(links) / "data"
    link.symlink_to(path, target_is_directory=True)
    return str(link)


def _languages(address: int) -> Iterator[tuple[int, str]]:
    while priority := ctypes.string_at(address, 1)[0]:
        code = ctypes.string_at(address + 1)
        yield priority, code.decode()
        address += len(code) + 2


def _by_language(voices: Iterator[tuple[int, str, str]], data: Path) -> Mapping[str, str]:
    """The voice of each language: of several the one eSpeak prefers (the lower number, the earlier)."""
    ready = ((priority, code, voice) for priority, code, voice in voices if _has_dictionary(data, voice, code))
    chosen: dict[str, str] = {}
    for _, code, voice in sorted(ready, key=lambda entry: entry[0]):
        chosen.setdefault(code.lower(), voice)
    return chosen


def _has_dictionary(data: Path, voice: str, code: str) -> bool:
    """Some voices come without their word list, and then read letters at best."""
    named = re.search(r"^dictionary\s+(\S+)", (data / "lang" / voice).read_text("utf-8", "replace"), re.MULTILINE)
    name = named[1] if named else code.split("-")[0].lower()
    return (data / f"{name}_dict").is_file()


def _plain(text: str) -> str:
    """Without the characters that eSpeak takes as commands (control, private use) or UTF-8 cannot hold."""
    return "".join(" " if unicodedata.category(character) in ("Cc", "Co", "Cs") else character for character in text)
