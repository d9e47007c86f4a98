"""Row voices: the voice library, against computing a voice again and against keeping voices as pickles.

The pickle way is a small model of what workers of this kind commonly do: audio in a gzipped pickle, an array of
it cached, and for every use a temporary wav that the model's own loader reads back. Both sides are given the
same recording and end with the same thing, the array that a model can start from. What is compared with
computing a voice is all of it: the audio, its hash, and its conditionals.
"""

from __future__ import annotations

import gzip
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import soundfile

from engine.conditioning import Conditioner
from engine.types import Conditionals, FloatArray, VoicePrompt
from engine.voices import ConditionalsCache
from scripts.benchmarks.figures import Figure, Series
from scripts.benchmarks.options import Contender, Options
from scripts.benchmarks.targets import voices_target
from scripts.benchmarks.voices import CACHE_BYTES, PROMPT_S, RATE_HZ, make_prompt
from scripts.benchmarks.weights import random_checkpoint
from voice_library import VoiceLibrary
from voice_library.quality import prepare_reference

NUM_LISTED = 1_000
NUM_CACHED = 40
RECORDING_S = 25
"""Of the recordings whose memory is compared: longer than what is kept of one, as recordings usually are."""

_NUM_FAST = 20
"""Calls that one sample of something fast is the mean of."""

Work = Callable[[], object]


def measure_voices(options: Options, progress: Callable[[str], None]) -> list[Figure]:
    """All figures of the library, in one run."""
    contender = options.ours()[0]
    with tempfile.TemporaryDirectory(prefix="benchmark-voices-") as folder:
        root = Path(folder)
        progress("a library of many voices")
        figures = _starting(options, contender, root / "many")
        progress("a voice that was used before")
        figures += _used_before(options, contender, root / "used")
        progress("against pickles and temporary files")
        return figures + _against_pickles(options, contender, root) + [_memory(options, contender, root / "cached")]


# ------------------------------------------------------------------------------- starting and listing


def _starting(options: Options, contender: Contender, root: Path) -> list[Figure]:
    num_voices = NUM_LISTED if options.size == "full" else NUM_LISTED // 50
    _fill(root, num_voices)
    with VoiceLibrary.open(root) as library:
        series = _take_turns(options, contender, {"open": lambda: _open(root), "list": _listing(library, num_voices)})
    note = f"{num_voices} voices in a folder, their audio removed before, so that none is read"
    return [
        _figure(options, "open", f"Open a library of {num_voices} voices", "s", series["open"], note=note),
        _figure(options, "list", f"List {num_voices} voices", "s", series["list"], note=note),
    ]


def _fill(root: Path, num_voices: int) -> None:
    audio = make_prompt()[:RATE_HZ]
    with VoiceLibrary.open(root) as library:
        for number in range(num_voices):
            library.add(f"Voice {number}", audio, RATE_HZ, voice_id=f"voice-{number}", tags=("benchmark",))
    for path in root.rglob("*.flac"):
        path.unlink()


def _open(root: Path) -> None:
    with VoiceLibrary.open(root) as library:
        assert library.list(limit=1).total


def _listing(library: VoiceLibrary, num_voices: int) -> Work:
    def run() -> None:
        page = library.list()
        assert len(page.voices) == num_voices, len(page.voices)

    return run


# ------------------------------------------------------------------------- a voice that is ready to decode


def _used_before(options: Options, contender: Contender, root: Path) -> list[Figure]:
    plan = options.plan(contender)
    conditioner = Conditioner.load(options.spec, random_checkpoint(options), "benchmark", plan.torch_device)
    prompt = VoicePrompt(make_prompt(), RATE_HZ)
    with VoiceLibrary.open(root) as warm, VoiceLibrary.open(root, max_cache_bytes=1) as cold:
        voice = warm.add("Anna", prompt.audio, RATE_HZ, voice_id="anna")
        cache = ConditionalsCache(conditioner.embed, CACHE_BYTES)
        kept = cache.get(VoicePrompt(*warm.get_audio(voice.voice_id)))
        warm.put_conditionals(voice.voice_id, kept.model_key, kept.to_bytes())
        series = _take_turns(
            options,
            contender,
            {
                "compute": lambda: conditioner.embed(prompt),
                "memory": lambda: cache.get(VoicePrompt(*warm.get_audio(voice.voice_id))),
                "disk": lambda: _from_disk(cold, voice.voice_id, kept.model_key),
            },
        )
    note = f"{PROMPT_S} s of audio, its hash and its conditionals; compared with computing them"
    return [
        _figure(options, "memory", "A voice from memory", "s", series["memory"], series["compute"], note=note),
        _figure(options, "disk", "A voice from disk", "s", series["disk"], series["compute"], note=note),
    ]


def _from_disk(library: VoiceLibrary, voice_id: str, key: str) -> Conditionals:
    prompt = VoicePrompt(*library.get_audio(voice_id))
    assert prompt.key
    data = library.get_conditionals(voice_id, key)
    assert data is not None
    return Conditionals.from_bytes(data)


# ------------------------------------------------------------------------------------ the pickle way


class PickleVoices:
    """Voices as gzipped pickles, used through temporary wav files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self.cache: dict[str, FloatArray] = {}

    def add(self, voice_id: str, audio: FloatArray) -> None:
        content = {"audio": audio, "sample_rate": RATE_HZ, "duration": audio.size / RATE_HZ, "format": "float32"}
        with gzip.open(self._folder / f"{voice_id}.pkl.gz", "wb") as file:
            pickle.dump(content, file)

    def load(self, voice_id: str) -> FloatArray:
        if voice_id not in self.cache:
            with gzip.open(self._folder / f"{voice_id}.pkl.gz", "rb") as file:
                self.cache[voice_id] = pickle.load(file)["audio"]  # our own, written a moment ago
        return self.cache[voice_id]

    def use(self, voice_id: str) -> FloatArray:
        """The array as the model gets it: through a file, as upstream's `prepare_conditionals` takes one."""
        import librosa

        descriptor, path = tempfile.mkstemp(suffix=".wav", dir=self._folder)
        os.close(descriptor)
        try:
            soundfile.write(path, self.load(voice_id), RATE_HZ)
            audio: FloatArray = librosa.load(path, sr=RATE_HZ)[0]
            return audio
        finally:
            os.unlink(path)

    def use_cold(self, voice_id: str) -> FloatArray:
        self.cache.clear()
        return self.use(voice_id)


def _against_pickles(options: Options, contender: Contender, root: Path) -> list[Figure]:
    audio = make_prompt()
    pickles = PickleVoices(root / "pickles")
    pickles.add("anna", audio)
    with VoiceLibrary.open(root / "ours") as warm, VoiceLibrary.open(root / "ours", max_cache_bytes=1) as cold:
        warm.add("Anna", audio, RATE_HZ, voice_id="anna")
        series = _take_turns(
            options,
            contender,
            {
                "cold": lambda: cold.get_audio("anna"),
                "cold-pickle": lambda: pickles.use_cold("anna"),
                "warm": lambda: warm.get_audio("anna"),
                "warm-pickle": lambda: pickles.use("anna"),
            },
        )
    note = f"the same {PROMPT_S} s; compared with a gzipped pickle and a temporary wav"
    return [
        _figure(options, key, f"Audio ready, {key}", "s", series[key], series[f"{key}-pickle"], note=note)
        for key in ("cold", "warm")
    ]


def _memory(options: Options, contender: Contender, root: Path) -> Figure:
    """Bytes of audio that each side holds of the same recordings: counted, not timed, so one sample."""
    pickles = PickleVoices(root / "pickles")
    with VoiceLibrary.open(root / "ours") as library:
        for number in range(NUM_CACHED):
            recording, voice_id = _recording(number), f"voice-{number}"
            pickles.add(voice_id, recording)
            pickles.load(voice_id)
            kept = prepare_reference(recording, RATE_HZ)
            library.add(voice_id, kept.audio, kept.sample_rate, voice_id=voice_id)
            library.get_audio(voice_id)
        cached = library.stats().cache
    assert cached.entries == NUM_CACHED, cached
    theirs = sum(audio.nbytes for audio in pickles.cache.values())
    ours, baseline = (Series(contender, "float32", (held / 1e6,)) for held in (cached.num_bytes, theirs))
    note = f"recordings of {RECORDING_S} s; the library keeps the best part, the pickles keep them whole"
    return _figure(
        options, "audio-memory", f"Audio of {NUM_CACHED} voices", "MB", ours, baseline, note=note, is_share=True
    )


def _recording(number: int) -> FloatArray:
    """Phrases and pauses, each recording at a level of its own."""
    whole = np.resize(make_prompt(), RECORDING_S * RATE_HZ) * np.float32(1 - number / 100)
    seconds = np.arange(whole.size) / RATE_HZ
    whole[seconds % 2.0 > 1.6] *= np.float32(1e-3)
    return whole


# ------------------------------------------------------------------------------------------ measuring


def _take_turns(options: Options, contender: Contender, works: Mapping[str, Work]) -> dict[str, Series]:
    """Each work once to warm up, then all in turn, round after round."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    times = {name: _NUM_FAST if _seconds(work, 1) < 0.05 else 1 for name, work in works.items()}
    for _ in range(options.repeats):
        for name, work in works.items():
            samples[name].append(_seconds(work, times[name]))
    return {name: Series(contender, "float32", tuple(each)) for name, each in samples.items()}


def _seconds(work: Work, times: int) -> float:
    """The median of several calls, seconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _figure(
    options: Options,
    key: str,
    title: str,
    unit: str,
    ours: Series,
    baseline: Series | None = None,
    *,
    note: str,
    is_share: bool = False,
) -> Figure:
    return Figure(
        "voices",
        key,
        title,
        unit,
        "less",
        ours,
        baseline,
        "share" if is_share else "gain",
        voices_target(options, key),
        note,
    )
