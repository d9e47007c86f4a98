"""Brings voices over from libraries of an older kind: a catalogue in JSON, and audio in gzipped pickles.

    voice_catalog.json        what is known of each voice, by id
    name_mapping.json         names to ids
    embeddings/<id>.pkl.gz    {audio: float32 (T,), sample_rate, duration, format}, or the bare array at 24 kHz
    metadata/<id>.json        what is known of one voice

Nothing in such a folder is trusted: pickles are read as data (`voice_library.pickles`), sizes are bounded
before and while reading, and no id that a file names becomes part of a path. Each voice is imported, skipped
or refused by itself, and the report says which and why.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from voice_library import naming
from voice_library.errors import LibraryError
from voice_library.frames import FloatArray
from voice_library.library import VoiceLibrary
from voice_library.metadata import Voice
from voice_library.pickles import PickleError, is_array, read_pickle, to_array, to_number
from voice_library.quality import MAX_RATE_HZ, MIN_RATE_HZ, assess, prepare_reference

LEGACY_RATE_HZ = 24_000
"""Of a bare array, and of a dict that does not say."""

MIN_LEGACY_S = 1.0
"""Shorter than what is asked of new voices: these are in use already."""

MAX_AUDIO_BYTES = 64 << 20
"""Of a decompressed pickle: eleven minutes of float32 at 24 kHz, more than the library keeps of a voice."""

MAX_JSON_BYTES = 16 << 20

Outcome = Literal["imported", "skipped", "refused"]

_SUFFIX = ".pkl.gz"
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "voice_name", "display_name"),
    "language": ("language", "lang", "language_code"),
    "gender": ("gender",),
    "description": ("description", "voice_description"),
    "tags": ("tags",),
    "consent": ("consent",),
    "created": ("created", "created_at", "created_date", "timestamp"),
}
"""Where the facts of a voice are found in these files: the first of each that is there counts."""


@dataclass(frozen=True)
class LegacyVoice:
    """A voice as an older library has it.

    Args:
        legacy_id: its id there, whatever that is made of.
        name: its name there, or the id.
        about: its facts, in our words, unchecked.
        recording: the pickle; None when there is none.
        aliases: other names that lead to it.
        problem: why its own metadata could not be read, or "".
    """

    legacy_id: str
    name: str
    about: Mapping[str, Any]
    recording: Path | None
    aliases: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Imported:
    """What became of one voice.

    Args:
        legacy_id: its id in the older library.
        outcome: imported, skipped (it is there already) or refused.
        why: the reason, when it was not imported.
        voice_id, name: what it is called now; "" when it was refused before that was known.
        notes: what was changed or is not as it should be.
    """

    legacy_id: str
    outcome: Outcome
    why: str = ""
    voice_id: str = ""
    name: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportReport:
    """Args:
    voices: what became of each, in order of their ids.
    problems: files that could not be read and do not belong to one voice.
    """

    voices: tuple[Imported, ...]
    problems: tuple[str, ...] = ()

    def count(self, outcome: Outcome) -> int:
        return Counter(voice.outcome for voice in self.voices)[outcome]


@dataclass
class _Catalogue:
    """The folder's JSON files, as far as they can be read."""

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def import_legacy(
    folder: Path | str,
    library: VoiceLibrary,
    *,
    trim: bool = False,
    on_found: Callable[[int], None] = lambda count: None,
    on_voice: Callable[[Imported], None] = lambda voice: None,
) -> ImportReport:
    """Bring all voices of an older library over, keeping their ids, names and audio.

    Running it again imports what is still missing and nothing twice.

    Args:
        folder: of the older library.
        library: where to.
        trim: keep the best part of each recording rather than all of it, as for a new voice. A trimmed voice
            may sound different: models hear the start of a recording.
        on_found: told how many voices there are, before the first.
        on_voice: told of each voice when it is done.

    Raises:
        LibraryError: invalid_request when the folder is not such a library; storage_failed and
            voice_library_full, which would hold for every further voice too.
    """
    found, problems = find_voices(Path(folder))
    on_found(len(found))
    done = []
    for voice in found:
        done.append(_import_voice(voice, library, trim))
        on_voice(done[-1])
    return ImportReport(tuple(done), tuple(problems))


def find_voices(folder: Path) -> tuple[list[LegacyVoice], list[str]]:
    """All voices that any file of the folder tells of, by id, and what could not be read.

    Raises:
        LibraryError: invalid_request.
    """
    embeddings, metadata = folder / "embeddings", folder / "metadata"
    if not embeddings.is_dir() and not (folder / "voice_catalog.json").is_file():
        message = f"{folder} holds neither embeddings/ nor voice_catalog.json: not a library of the older kind"
        raise LibraryError("invalid_request", message, "folder")
    # Files are found by listing and compared by name: an id from a file never becomes a path.
    recordings = {path.name.removesuffix(_SUFFIX): path for path in _files(embeddings, _SUFFIX)}
    facts = {path.name.removesuffix(".json"): path for path in _files(metadata, ".json")}
    catalogue = _read_catalogue(folder, recordings.keys() | facts.keys())
    ids = sorted(recordings.keys() | facts.keys() | catalogue.about.keys() | catalogue.names.keys())
    voices = [_describe(each, catalogue, facts.get(each), recordings.get(each)) for each in ids]
    return voices, catalogue.problems


def read_recording(path: Path) -> tuple[FloatArray, int, tuple[str, ...]]:
    """The audio of one pickle: float32 (T,), its rate in Hz, and what was changed about it.

    Raises:
        PickleError: damaged, too large, malicious or not of the known form.
        OSError: it cannot be read.
    """
    content = read_pickle(_gunzip(path))
    facts = content if isinstance(content, dict) else {"audio": content}
    if "audio" not in facts or not is_array(facts["audio"]):
        raise PickleError("holds no array under 'audio'")
    audio, notes = _to_mono(facts["audio"])
    rate = to_number(facts.get("sample_rate", LEGACY_RATE_HZ))
    if rate is None or rate != rate or not MIN_RATE_HZ <= rate <= MAX_RATE_HZ or rate != int(rate):
        raise PickleError(f"expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {rate}")
    return audio, int(rate), notes


# ----------------------------------------------------------------------------------------- one voice


def _import_voice(voice: LegacyVoice, library: VoiceLibrary, trim: bool) -> Imported:
    voice_id, name, notes = _safe_id(voice), _safe_name(voice), list(_renaming_notes(voice))
    if (there := _already_there(library, voice_id)) is not None:
        return Imported(voice.legacy_id, "skipped", "already in the library", voice_id, there.name)
    if voice.recording is None:
        return Imported(voice.legacy_id, "refused", f"no recording: embeddings/<id>{_SUFFIX} is not there")
    try:
        audio, rate, changes = read_recording(voice.recording)
        audio, rate, quality, warnings = _judge(audio, rate, trim)
        added, left_out = _add(library, name, audio, rate, voice_id, {**voice.about, "quality": quality})
    except PickleError as error:
        return Imported(voice.legacy_id, "refused", f"{voice.recording.name} {error}", name=name)
    except OSError as error:
        return Imported(voice.legacy_id, "refused", f"cannot be read: {error.strerror or error}", name=name)
    except LibraryError as error:
        if error.code in ("storage_failed", "voice_library_full"):
            raise
        return Imported(voice.legacy_id, "refused", f"{error.code}: {error.message}", name=name)
    notes += [*changes, *warnings, *left_out]
    return Imported(voice.legacy_id, "imported", "", added.voice_id, added.name, tuple(notes))


def _already_there(library: VoiceLibrary, voice_id: str) -> Voice | None:
    try:
        return library.get(voice_id)
    except LibraryError as error:
        if error.code != "voice_not_found":
            raise
        return None


def _judge(audio: FloatArray, rate: int, trim: bool) -> tuple[FloatArray, int, dict[str, Any], tuple[str, ...]]:
    if trim:
        prepared = prepare_reference(audio, rate, min_s=MIN_LEGACY_S)
        return prepared.audio, prepared.sample_rate, prepared.quality, prepared.warnings
    quality = assess(audio, rate, min_s=MIN_LEGACY_S)
    return audio, rate, quality.to_dict(), quality.warnings


def _add(
    library: VoiceLibrary, name: str, audio: FloatArray, rate: int, voice_id: str, about: dict[str, Any]
) -> tuple[Voice, list[str]]:
    """Add a voice; a fact that the library does not take is left out and named, rather than the voice."""
    left_out: list[str] = []
    while True:
        try:
            voice = library.add(name, audio, rate, voice_id=voice_id, source="imported", **about)
            return voice, left_out
        except LibraryError as error:
            if error.code != "invalid_request" or error.field not in about:
                raise
            left_out.append(f"{error.field} left out: {error.message}")
            about = {key: value for key, value in about.items() if key != error.field}


def _safe_id(voice: LegacyVoice) -> str:
    """The id itself, or one made of it that is always the same."""
    try:
        return naming.check_id(voice.legacy_id)
    except LibraryError:
        return naming.make_id(voice.legacy_id, "legacy")


def _safe_name(voice: LegacyVoice) -> str:
    """The name itself, or what is left of it without what a name may not hold."""
    try:
        return naming.check_name(voice.name)
    except LibraryError:
        kept = (" " if char in "/\\" or naming.has_refused_char(char) else char for char in voice.name)
        plain = " ".join("".join(kept).split()).lstrip(". ")[: naming.MAX_NAME_CHARS].strip()
        return plain or _safe_id(voice)


def _renaming_notes(voice: LegacyVoice) -> Iterable[str]:
    if (voice_id := _safe_id(voice)) != voice.legacy_id:
        yield f"its id is not safe in a path and is now {voice_id}"
    if (name := _safe_name(voice)) != voice.name:
        yield f"its name is now {name}"
    if voice.aliases:
        yield f"was also called {', '.join(voice.aliases)}"
    if voice.problem:
        yield voice.problem


# ------------------------------------------------------------------------------------- the recording


def _gunzip(path: Path) -> bytes:
    """A pickle's bytes; never more than `MAX_AUDIO_BYTES` of them, whatever the file unpacks to."""
    with path.open("rb") as file:
        packed = file.read(MAX_AUDIO_BYTES + 1)
    if len(packed) > MAX_AUDIO_BYTES:
        raise PickleError(f"is larger than {MAX_AUDIO_BYTES >> 20} MB")
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            data = file.read(MAX_AUDIO_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PickleError(f"is damaged: {error}") from error
    if len(data) > MAX_AUDIO_BYTES:
        raise PickleError(f"unpacks to more than {MAX_AUDIO_BYTES >> 20} MB")
    return data


def _to_mono(value: object) -> tuple[FloatArray, tuple[str, ...]]:
    """float32 (T,) in [-1, 1] of an array of one channel."""
    array = to_array(value)
    if array.size != max(array.shape, default=0):
        raise PickleError(f"holds audio of shape {array.shape}, not of one channel")
    flat = array.reshape(-1)
    if flat.dtype.kind == "i" and flat.dtype.itemsize > 1:
        flat = flat / -float(np.iinfo(flat.dtype).min)
    elif flat.dtype.kind != "f":
        raise PickleError(f"holds audio of type {flat.dtype}")
    with np.errstate(over="ignore"):
        audio = np.array(flat, dtype=np.float32)
    peak = float(np.abs(audio).max(initial=0.0))
    if not np.isfinite(peak):
        raise PickleError("holds NaN or infinity")
    return (audio / np.float32(peak), (f"its peak of {peak:.2f} is now 1",)) if peak > 1.0 else (audio, ())


# ------------------------------------------------------------------------------------ the JSON files


def _files(folder: Path, suffix: str) -> list[Path]:
    """Plain files of that suffix; anything else, such as a pipe, would hold up whoever reads it."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and path.is_file())


def _read_catalogue(folder: Path, ids: Iterable[str]) -> _Catalogue:
    catalogue = _Catalogue()
    content = _read_json(folder / "voice_catalog.json", catalogue.problems)
    catalogue.about = _by_id(content)
    known = {*ids, *catalogue.about}
    mapping = _read_json(folder / "name_mapping.json", catalogue.problems)
    for left, right in mapping.items() if isinstance(mapping, dict) else ():
        if isinstance(right, str):
            name, voice_id = (right, left) if left in known and right not in known else (left, right)
            catalogue.names.setdefault(voice_id, []).append(name)
    return catalogue


def _by_id(content: object) -> dict[str, dict[str, Any]]:
    """A catalogue as id → facts: a dict by id or a list of voices, bare or under "voices"."""
    if isinstance(content, dict) and isinstance(content.get("voices"), dict | list):
        content = content["voices"]
    if isinstance(content, list):
        voices = [voice for voice in content if isinstance(voice, dict)]
        ids = [voice.get("voice_id", voice.get("id")) for voice in voices]
        return {each: voice for each, voice in zip(ids, voices, strict=True) if isinstance(each, str)}
    items = content.items() if isinstance(content, dict) else ()
    return {each: voice for each, voice in items if isinstance(voice, dict)}


def _read_json(path: Path, problems: list[str]) -> object:
    """A file's content; None, and a problem noted, when it cannot be read. None also when it is not there."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MB")
        content: object = json.loads(data)
        return content
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None


def _describe(legacy_id: str, catalogue: _Catalogue, facts: Path | None, recording: Path | None) -> LegacyVoice:
    problems: list[str] = []
    own = _read_json(facts, problems) if facts is not None else None
    known = {**catalogue.about.get(legacy_id, {}), **(own if isinstance(own, dict) else {})}
    about = {ours: known[key] for ours, keys in _FIELDS.items() if (key := _first(keys, known))}
    mapped = catalogue.names.get(legacy_id, [])
    name = about.pop("name", None)
    if not isinstance(name, str) or not name.strip():
        name = mapped[0] if mapped else legacy_id
    aliases = tuple(each for each in mapped if naming.fold(each) != naming.fold(name))
    return LegacyVoice(legacy_id, name, about, recording, aliases, "; ".join(problems))


def _first(keys: Iterable[str], known: Mapping[str, Any]) -> str | None:
    return next((key for key in keys if known.get(key) not in (None, "", [])), None)
