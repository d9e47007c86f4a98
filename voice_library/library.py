"""The voice library as jobs and scripts use it: one object per process, safe to call from any thread.

It blocks on storage, so an event loop calls it through threads. What it knows of other workers' changes is
at most `refresh_s` old, except that a voice it does not know is always looked for in the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

from voice_library import audio as prompt_audio
from voice_library import conditionals, inspection, naming
from voice_library.audio import FloatArray
from voice_library.background import Background, Preloader
from voice_library.cache import AudioCache
from voice_library.catalogue import Catalogue, Problem, VoicePage, select
from voice_library.errors import LibraryError
from voice_library.index import Index
from voice_library.location import open_store
from voice_library.metadata import DESCRIPTIONS, Record, Voice, check_created, described_as
from voice_library.s3_store import S3Options
from voice_library.stats import LibraryStats
from voice_library.store import Store
from voice_library.usage import Usage
from voice_library.writing import Writer

_log = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 512 << 20

Problems = list[Problem]


class VoiceLibrary:
    """Named voices on a store. Make one with `VoiceLibrary.open`.

    Args:
        store: where they lie.
        max_cache_bytes: of prompt audio kept in memory.
        max_voices: at which adding is refused; None for no limit.
        refresh_s: how old the list of voices may be before the store is asked again, seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_cache_bytes: int = DEFAULT_CACHE_BYTES,
        max_voices: int | None = None,
        refresh_s: float = 1.0,
    ) -> None:
        self._store = store
        self._refresh_s = refresh_s
        self._index = Index(store)
        self._writer = Writer(store, self._index, max_voices)
        self._cache = AudioCache(max_cache_bytes)
        self._usage = Usage(store)
        self._lock = threading.Lock()
        self._damaged: dict[str, Problem] = {}
        self._background = Background()
        self._preloader = Preloader(lambda voice: self._audio(self.find(voice).voice_id), self._usage, self._background)
        self._index.refresh()

    @classmethod
    def open(
        cls,
        uri: str | Path,
        *,
        max_cache_bytes: int = DEFAULT_CACHE_BYTES,
        max_voices: int | None = None,
        s3: S3Options | None = None,
        refresh_s: float | None = None,
    ) -> VoiceLibrary:
        """Open a library; a folder or prefix where nothing lies yet is an empty one.

        Reads no audio, and leftovers of writers that died are removed from a folder.

        Args:
            uri: a folder, file:///folder or s3://bucket/prefix.
            s3: how to reach the bucket.
            refresh_s: None for 1 s on a folder and 5 s on a bucket.

        Raises:
            LibraryError: invalid_request (uri), storage_failed.
        """
        store, default_refresh_s = open_store(uri, s3)
        refresh_s = default_refresh_s if refresh_s is None else refresh_s
        library = cls(store, max_cache_bytes=max_cache_bytes, max_voices=max_voices, refresh_s=refresh_s)
        try:
            store.sweep(inspection.LEFTOVER_AGE_S)
        except LibraryError as error:  # a volume mounted read-only serves voices all the same
            _log.info("leftovers were not removed: %s", error.message)
        return library

    def add(
        self,
        name: str,
        audio: FloatArray,
        sample_rate: int,
        *,
        voice_id: str | None = None,
        language: str | None = None,
        gender: str | None = None,
        description: str = "",
        tags: Iterable[str] = (),
        consent: str = "",
        source: str = "",
        quality: Mapping[str, Any] | None = None,
        created: str | datetime | None = None,
    ) -> Voice:
        """Keep a voice. Of several adds of one name, by any workers, one succeeds.

        Args:
            audio: float32 (T,) mono in [-1, 1]; kept as 24-bit FLAC, and `Voice.audio_hash` is of what reads back.
            sample_rate: Hz.
            voice_id: None makes one from name and audio.
            created: ISO 8601 or datetime; None for now.
            The rest: see `Voice`.

        Raises:
            LibraryError: invalid_request, reference_unreadable, reference_too_long, voice_exists,
                voice_library_full, storage_failed.
        """
        created = check_created(created)
        described = self.check_new(
            name,
            voice_id,
            language=language,
            gender=gender,
            description=description,
            tags=tags,
            quality=quality or {},
            consent=consent,
            source=source,
        )
        prompt = prompt_audio.encode(audio, sample_rate)
        voice = Voice(
            voice_id=voice_id or "",
            duration_s=prompt.num_samples / prompt.sample_rate,
            sample_rate=prompt.sample_rate,
            created=created,
            audio_hash=prompt.audio_hash,
            **described,
        )
        return self._writer.add(voice, prompt).voice  # which gives an id where there is none

    def check_new(self, name: str, voice_id: str | None = None, **metadata: Any) -> dict[str, Any]:
        """Refuse what `add` would refuse, before anything is spent on the audio; another worker may still be first.
        Gives the name and the metadata as they would be kept.

        Raises:
            LibraryError: invalid_request, voice_exists, voice_library_full, storage_failed.
        """
        described = described_as(name=name, **metadata)
        if voice_id is not None:
            naming.check_id(voice_id)
        self._writer.check_room(described["name"], voice_id)
        return described

    def get(self, voice_id: str) -> Voice:
        """The voice of exactly this id.

        Raises:
            LibraryError: invalid_request, voice_not_found, storage_failed.
        """
        return self._record(voice_id).voice

    def find(self, id_or_name: str, field: str = "voice") -> Voice:
        """The voice of exactly this id, or this name, or the only one of either in any case.

        Args:
            field: what errors are to name.

        Raises:
            LibraryError: invalid_request, storage_failed, and voice_not_found, with suggestions where the name
                is ambiguous or near another: nothing is guessed.
        """
        wanted = naming.check_name(id_or_name, field)
        found = self._catalogue().match(wanted)
        if found is None:
            catalogue = self._index.refresh()
            found = catalogue.match(wanted)
            if found is None:
                raise catalogue.not_found(wanted, field)
        return found.voice

    def list(
        self,
        *,
        language: str | None = None,
        gender: str | None = None,
        tag: str | None = None,
        text: str | None = None,
        offset: int = 0,
        limit: int | None = None,
    ) -> VoicePage:
        """Voices by name that meet every condition; no audio is read. Those known to be damaged are left out.

        Args:
            language: also finds its regions. text: looks in id, name, description and tags.
            offset, limit: which part of the list.

        Raises:
            LibraryError: invalid_request.
        """
        records = self._catalogue().records
        voices = [record.voice for record in records if record.prompt_key not in self._damaged]
        return select(voices, language=language, gender=gender, tag=tag, text=text, offset=offset, limit=limit)

    def update(self, voice_id: str, **metadata: Any) -> Voice:
        """Change name, language, gender, description, tags, quality, consent or source of a voice.

        On a folder, two workers that change one voice within the same millisecond may lose one of the changes;
        a bucket loses none.

        Raises:
            LibraryError: invalid_request, voice_not_found, voice_exists, storage_failed.
        """
        unknown = sorted(metadata.keys() - DESCRIPTIONS.keys())
        if unknown:
            message = f"expected some of {', '.join(DESCRIPTIONS)}, got {', '.join(unknown)}"
            raise LibraryError("invalid_request", message, unknown[0])
        return self._writer.update(naming.check_id(voice_id), described_as(**metadata)).voice

    def delete(self, voice_id: str) -> None:
        """Remove a voice and all that belongs to it, damaged ones too.

        Raises:
            LibraryError: invalid_request, voice_not_found, storage_failed.
        """
        record = self._index.catalogue.by_id(naming.check_id(voice_id))
        self._writer.delete(voice_id)
        if record is not None:
            self._cache.drop(record.prompt_key)

    def get_audio(self, voice_id: str, *, is_use: bool = True) -> tuple[FloatArray, int]:
        """A voice's prompt: audio float32 (T,), read-only, and its rate in Hz.

        From memory if it was used lately; read once, however many threads ask at the same time. Counts for
        `most_used` unless it is no use (`is_use`).

        Raises:
            LibraryError: invalid_request, voice_not_found, storage_failed, reference_unreadable (a damaged voice).
        """
        audio, record = self._audio(voice_id)
        if is_use:
            self.note_use(voice_id)
        return audio, record.voice.sample_rate

    def get_conditionals(self, voice_id: str, key: str, *, is_use: bool = True) -> bytes | None:
        """What some worker stored of a voice under a key; None if none did, or if it is damaged, which is logged.
        Counts for `most_used` unless it is no use.

        Raises:
            LibraryError: invalid_request, voice_not_found, storage_failed.
        """
        self._record(voice_id)
        if is_use:
            self.note_use(voice_id)
        return conditionals.get(self._store, voice_id, key)

    def put_conditionals(self, voice_id: str, key: str, data: bytes) -> None:
        """Store what was computed of a voice for all workers.

        Args:
            key: names all that the content depends on (model, checkpoint, preprocessing); any text.
            data: 1 byte to 64 MiB, opaque.

        Raises:
            LibraryError: invalid_request, voice_not_found, storage_failed.
        """
        self._writer.put_conditionals(self._record(voice_id), key, data)

    def note_use(self, voice_id: str) -> None:
        """Count a use of a voice for `most_used`; for callers that keep what they made of it."""
        if self._usage.count(voice_id):
            self._background.run(lambda: self._usage.save(self._ids()))

    def most_used(self, number: int) -> tuple[Voice, ...]:
        """The voices that all workers used most, most used first.

        Raises:
            LibraryError: storage_failed.
        """
        records = map(self._catalogue().by_id, self._usage.most_used(number))
        return tuple(record.voice for record in records if record is not None)

    def preload(self, voices: Sequence[str] | int) -> Future[int]:
        """Make audio ready in memory, in the background; failures go to the log and `stats`.

        Args:
            voices: ids or names, or how many of the most used.

        Returns:
            The number of voices made ready, once they are.
        """
        return self._preloader.start(voices)

    def stats(self) -> LibraryStats:
        """Figures; lists the stored conditionals, so do not ask many times a second.

        Raises:
            LibraryError: storage_failed.
        """
        catalogue = self._catalogue()
        sizes = [entry.num_bytes for entry in self._store.list("voices/") if "/conditionals/" in entry.key]
        problems = self._problems(catalogue)
        return LibraryStats(
            location=self._store.describe(),
            num_voices=sum(record.prompt_key not in self._damaged for record in catalogue.records),
            num_conditionals=len(sizes),
            audio_bytes=sum(record.prompt_bytes for record in catalogue.records),
            conditionals_bytes=sum(sizes),
            cache=self._cache.stats(),
            num_preloaded=self._preloader.num_ready,
            num_preload_failures=self._preloader.num_failed,
            problems=problems,
        )

    def check(self) -> Problems:
        """Read and verify everything; remove old leftovers and damaged conditionals. Takes a while.

        Raises:
            LibraryError: storage_failed.
        """
        problems, damaged = inspection.check(self._store, self._index)
        with self._lock:
            self._damaged = damaged
        return problems

    def refresh(self) -> None:
        """Take note of what other workers added, changed and deleted until now.

        Raises:
            LibraryError: storage_failed.
        """
        self._index.refresh()

    def close(self) -> None:
        """Save the counts of use, stop what runs in the background, let go of connections."""
        self._background.close()
        self._usage.save(self._ids())
        self._store.close()

    def __enter__(self) -> VoiceLibrary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _catalogue(self) -> Catalogue:
        return self._index.recent(self._refresh_s)

    def _record(self, voice_id: str) -> Record:
        found = self._catalogue().by_id(naming.check_id(voice_id))
        if found is not None:
            return found
        catalogue = self._index.refresh()
        found = catalogue.by_id(voice_id)
        if found is None:
            raise catalogue.not_found(voice_id, "voice_id")
        return found

    def _audio(self, voice_id: str) -> tuple[FloatArray, Record]:
        record = self._record(voice_id)
        try:
            audio = self._cache.get(record.prompt_key, lambda: inspection.read_audio(self._store, record))
        except ValueError as error:
            self._index.refresh()
            if self._record(voice_id).prompt_key != record.prompt_key:  # deleted and added again: not damaged
                return self._audio(voice_id)
            raise self._note_damage(record, str(error)) from error
        if record.prompt_key in self._damaged:
            self._note_repair(record)
        return audio, record

    def _note_repair(self, record: Record) -> None:
        with self._lock:
            self._damaged = {key: problem for key, problem in self._damaged.items() if key != record.prompt_key}

    def _note_damage(self, record: Record, what: str) -> LibraryError:
        voice = record.voice
        _log.error("voice %s (%s) is damaged: %s", voice.voice_id, voice.name, what)
        with self._lock:
            self._damaged = {**self._damaged, record.prompt_key: Problem(voice.voice_id, what)}
        return LibraryError("reference_unreadable", f"the voice {voice.name!r} is damaged: {what}", "voice_id")

    def _problems(self, catalogue: Catalogue) -> tuple[Problem, ...]:
        damaged = [self._damaged[r.prompt_key] for r in catalogue.records if r.prompt_key in self._damaged]
        return (*catalogue.problems, *damaged)

    def _ids(self) -> set[str]:
        return {record.voice.voice_id for record in self._index.catalogue.records}
