"""The draft voice speaks whole texts, the same way every time, at the pitch of its reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import numpy as np
import pytest

from engine.audio.pitch import median_f0
from engine.draft import MODEL_KEY, SILENT, DraftEngine
from engine.errors import SpeechError
from engine.types import PARAMETERS, Conditionals, EngineConfig, Segment, Speech, SpeechRequest, VoicePrompt
from tests.engine.synthetic_voices import prompt_of, sung_vowel

pytest.importorskip("espeakng_loader", reason="the draft voice's extra is not installed")

UNMARKED = EngineConfig(model="draft", watermark=False)
SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody knows why."
LONG_TEXT = " ".join(f"Sentence number {number} says that all work and no play is dull." for number in range(80))


@pytest.fixture(scope="module")
def engine() -> Iterator[DraftEngine]:
    with DraftEngine.load(UNMARKED) as engine:
        yield engine


@pytest.fixture(scope="module")
def marking_engine() -> Iterator[DraftEngine]:
    engine = DraftEngine.load(EngineConfig(model="draft"))
    yield engine
    engine.close()


def _level(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(waveform**2)))


def _letters(text: str) -> str:
    return "".join(text.split())


def test_speech_can_be_heard_and_says_who_spoke(engine: DraftEngine) -> None:
    speech = engine.speak(SpeechRequest(text=SENTENCE))
    assert speech.model == "draft" and speech.sample_rate == 24_000 and speech.seed >= 0
    assert speech.waveform.dtype == np.float32 and np.abs(speech.waveform).max() <= 1.0
    assert 0.02 < _level(speech.waveform) < 0.5
    assert 2.5 < speech.duration_s < 7.0  # 12 words at 175 per minute
    assert {"queue", "condition", "decode", "master", "total"} <= speech.timings.keys()
    assert speech.warnings == ()


def test_speech_has_the_spectrum_of_speech_and_changes_with_the_text(engine: DraftEngine) -> None:
    """Most energy under 4 kHz, vowels and hisses in turn, and other words are another sound."""
    from scipy.signal import stft

    waveform = engine.speak(SpeechRequest(text=SENTENCE)).waveform
    frequencies, _, spectrum = stft(waveform, 24_000, nperseg=1024)
    power = np.abs(spectrum) ** 2
    assert power[frequencies < 4_000].sum() > 0.8 * power.sum()
    loud = power.sum(axis=0) > power.sum(axis=0).max() * 1e-3
    centroid = (frequencies[:, None] * power).sum(axis=0)[loud] / power.sum(axis=0)[loud]
    assert np.percentile(centroid, 95) > 3 * np.percentile(centroid, 10)


def test_duration_grows_with_the_text(engine: DraftEngine) -> None:
    once, thrice = (engine.speak(SpeechRequest(text=" ".join([SENTENCE] * count))).duration_s for count in (1, 3))
    assert thrice == pytest.approx(3 * once, rel=0.15)


def test_a_long_text_comes_out_whole(engine: DraftEngine) -> None:
    assert len(LONG_TEXT) > 4_500
    speech = engine.speak(SpeechRequest(text=LONG_TEXT))
    assert _letters("".join(chunk.text for chunk in speech.chunks)) == _letters(LONG_TEXT)
    for chunk in speech.chunks:
        spoken = speech.waveform[round(chunk.start_s * 24_000) : round(chunk.end_s * 24_000)]
        assert _level(spoken) > 0.02 and not chunk.flags
        assert len(chunk.text) / 25 < spoken.size / 24_000 < len(chunk.text) / 6


def test_chunks_follow_each_other_and_lie_within_the_audio(engine: DraftEngine) -> None:
    speech = engine.speak(SpeechRequest(text=LONG_TEXT))
    assert [chunk.index for chunk in speech.chunks] == list(range(len(speech.chunks)))
    assert all(before.end_s < after.start_s for before, after in itertools.pairwise(speech.chunks))
    assert speech.chunks[-1].end_s <= speech.duration_s


def test_pauses_between_segments_are_as_long_as_asked_and_silent(engine: DraftEngine) -> None:
    segments = (Segment("One.", pause_after_s=1.5), Segment("Two."), Segment("Three.", pause_after_s=0.75))
    speech = engine.speak(SpeechRequest(segments=segments))
    first, second, third = speech.chunks
    assert second.start_s - first.end_s == pytest.approx(1.5, abs=1e-3)
    assert third.start_s - second.end_s == pytest.approx(0.5, abs=1e-3)
    assert speech.duration_s - third.end_s == pytest.approx(0.75, abs=1e-3)
    assert not speech.waveform[round(first.end_s * 24_000) : round(second.start_s * 24_000)].any()


def test_a_pause_written_in_the_text_is_kept(engine: DraftEngine) -> None:
    first, second = engine.speak(SpeechRequest(text="One. [pause 0.8s] Two.")).chunks
    assert second.start_s - first.end_s == pytest.approx(0.8, abs=1e-3)


def test_the_same_request_gives_the_same_audio_whatever_was_asked_between(engine: DraftEngine) -> None:
    request = SpeechRequest(text="Rrr! " + SENTENCE, voice=prompt_of(180.0), language="es", seed=5)
    first = engine.speak(request)
    engine.speak(SpeechRequest(text="Etwas ganz anderes, rasch gerollt.", voice=prompt_of(90.0), language="de"))
    engine.speak(SpeechRequest(text="Сорок", language="ru"))
    again = engine.speak(request)
    assert np.array_equal(first.waveform, again.waveform) and first.chunks == again.chunks
    assert first.seed == again.seed == 5


def test_requests_side_by_side_do_not_disturb_each_other(engine: DraftEngine) -> None:
    requests = [
        SpeechRequest(text=SENTENCE, voice=voice, language=language)
        for voice in (None, prompt_of(90.0), prompt_of(240.0))
        for language in ("en", "es", "ru")
    ]
    alone = [engine.speak(request).waveform for request in requests]
    together = [future.result().waveform for future in [engine.submit(request) for request in requests]]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("f0_hz", [75.0, 100.0, 220.0, 300.0])
def test_a_reference_gives_the_speech_its_pitch(engine: DraftEngine, f0_hz: float) -> None:
    speech = engine.speak(SpeechRequest(text=SENTENCE, voice=prompt_of(f0_hz)))
    assert median_f0(speech.waveform, 24_000) == pytest.approx(f0_hz, rel=0.15)
    assert speech.duration_s == pytest.approx(engine.speak(SpeechRequest(text=SENTENCE)).duration_s, rel=0.1)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Das Wetter ist heute schön, nicht wahr?"),
        ("fr", "Bonjour, comment allez-vous aujourd'hui?"),
        ("zh", "今天天气很好,你想去哪里?"),
        ("hi", "नमस्ते, आप कैसे हैं?"),
        ("ar", "مرحبا كيف حالك اليوم"),
    ],
)
def test_the_pitch_is_met_in_other_languages(engine: DraftEngine, language: str, text: str) -> None:
    for f0_hz in (110.0, 190.0):
        speech = engine.speak(SpeechRequest(text=text, language=language, voice=prompt_of(f0_hz)))
        assert median_f0(speech.waveform, 24_000) == pytest.approx(f0_hz, rel=0.15)


def test_each_segment_speaks_with_its_own_voice(engine: DraftEngine) -> None:
    segments = (Segment(SENTENCE, voice=prompt_of(100.0)), Segment(SENTENCE))
    speech = engine.speak(SpeechRequest(segments=segments, voice=prompt_of(220.0)))
    pitches = [
        median_f0(speech.waveform[round(chunk.start_s * 24_000) : round(chunk.end_s * 24_000)], 24_000)
        for chunk in speech.chunks
    ]
    assert pitches == [pytest.approx(100.0, rel=0.15), pytest.approx(220.0, rel=0.15)]


def test_conditionals_speak_as_the_prompt_they_came_from(engine: DraftEngine) -> None:
    conditionals = engine.embed(prompt_of(160.0))
    restored = Conditionals.from_bytes(conditionals.to_bytes())
    assert engine.embed(prompt_of(160.0)) is conditionals and conditionals.model_key == MODEL_KEY
    spoken = [engine.speak(SpeechRequest(text=SENTENCE, voice=voice)) for voice in (prompt_of(160.0), restored)]
    assert np.array_equal(spoken[0].waveform, spoken[1].waveform)


def test_conditionals_of_another_model_are_refused(engine: DraftEngine) -> None:
    floats, tokens = np.zeros(192, np.float32), np.zeros(1, np.int32)
    foreign = Conditionals("key", "turbo/abc", floats, tokens, tokens, np.zeros((1, 80), np.float32), floats)
    with pytest.raises(SpeechError) as caught:
        engine.speak(SpeechRequest(text=SENTENCE, voice=foreign))
    assert (caught.value.code, caught.value.field) == ("invalid_request", "voice")


def test_a_reference_without_pitch_is_a_warning_not_an_invention(engine: DraftEngine) -> None:
    noise = np.random.default_rng(0).standard_normal(48_000).astype(np.float32) * 0.1
    speech = engine.speak(SpeechRequest(text=SENTENCE, voice=VoicePrompt(noise, 24_000)))
    assert "no pitch" in speech.warnings[0]
    assert np.array_equal(speech.waveform, engine.speak(SpeechRequest(text=SENTENCE)).waveform)


@pytest.mark.parametrize(
    ("audio", "code"),
    [(sung_vowel(120.0, 0.3), "reference_too_short"), (np.zeros(48_000, np.float32), "reference_silent")],
)
def test_a_reference_that_holds_no_voice_is_refused(engine: DraftEngine, audio: np.ndarray, code: str) -> None:
    with pytest.raises(SpeechError) as caught:
        engine.speak(SpeechRequest(text=SENTENCE, voice=VoicePrompt(audio, 24_000)))
    assert caught.value.code == code


def test_every_speech_parameter_is_a_warning_and_changes_nothing(engine: DraftEngine) -> None:
    values = {name: int(bounds.high) if bounds.integer else 1.0 for name, bounds in PARAMETERS.items()}
    speech = engine.speak(SpeechRequest(text=SENTENCE, **values))  # type: ignore[arg-type]
    assert speech.warnings == tuple(f"draft has no {name}" for name in PARAMETERS)
    assert np.array_equal(speech.waveform, engine.speak(SpeechRequest(text=SENTENCE)).waveform)
    assert engine.parameters == frozenset()


@pytest.mark.parametrize("language", ["xx", "", "klingonish", "en\0"])
def test_an_unknown_language_is_refused_by_name(engine: DraftEngine, language: str) -> None:
    with pytest.raises(SpeechError) as caught:
        engine.speak(SpeechRequest(text=SENTENCE, language=language))
    assert (caught.value.code, caught.value.field) == ("language_unsupported", "language")
    assert repr(language) in caught.value.message


@pytest.mark.parametrize("language", ["en", "EN", "en-US", "en_us", "pt-BR", "zh-Hans"])
def test_regional_and_loosely_written_languages_are_understood(engine: DraftEngine, language: str) -> None:
    assert engine.speak(SpeechRequest(text="1 2 3", language=language)).duration_s > 0.5


def test_languages_are_iso_codes(engine: DraftEngine) -> None:
    assert {"en", "de", "zh", "ar", "he", "ja", "no"} <= set(engine.languages)
    assert all(len(code) in (2, 3) and code.islower() for code in engine.languages)


@pytest.mark.parametrize(
    "text",
    ["a", "1", "\x01\x02 hello \0 there", "<b>bold</b> & [[x]]", "😀 hi 😀", "z" * 3000, "Dr. No! " * 50, "\ud800 ok"],
)
def test_odd_texts_are_spoken(engine: DraftEngine, text: str) -> None:
    assert _level(engine.speak(SpeechRequest(text=text)).waveform) > 1e-3


def test_a_chunk_without_sound_is_flagged_and_a_text_without_any_is_an_error(engine: DraftEngine) -> None:
    """Chuvash's rules know no digits."""
    with pytest.raises(SpeechError) as caught:
        engine.speak(SpeechRequest(text="1 2 3", language="cv"))
    assert caught.value.code == "generation_failed"
    mixed = (Segment("1 2 3", language="cv"), Segment("hello"))
    assert [chunk.flags for chunk in engine.speak(SpeechRequest(segments=mixed)).chunks] == [(SILENT,), ()]


def test_a_stream_carries_what_speak_gives(engine: DraftEngine) -> None:
    request = SpeechRequest(text=LONG_TEXT, voice=prompt_of(150.0), temperature=0.5)
    *pieces, last = engine.stream(request)
    whole = engine.speak(request)
    assert np.array_equal(np.concatenate([piece.waveform for piece in pieces]), whole.waveform)
    assert [piece.seq for piece in (*pieces, last)] == list(range(len(pieces) + 1))
    assert [piece.final for piece in (*pieces, last)] == [False] * len(pieces) + [True]
    assert isinstance(last.speech, Speech) and last.speech.waveform.size == last.waveform.size == 0
    assert (last.speech.chunks, last.speech.warnings) == (whole.chunks, whole.warnings)


def test_a_stream_refuses_a_bad_request_in_place_of_its_first_piece(engine: DraftEngine) -> None:
    with pytest.raises(SpeechError) as caught:
        next(engine.stream(SpeechRequest(text=SENTENCE, language="xx")))
    assert caught.value.code == "language_unsupported"


def test_closing_a_stream_ends_its_work(engine: DraftEngine) -> None:
    stream = engine.stream(SpeechRequest(text=LONG_TEXT * 200))
    next(stream)
    stream.close()
    for thread in engine._streams:
        thread.join(10)
        assert not thread.is_alive()


def test_a_stream_that_is_not_taken_waits_and_then_goes_on(
    engine: DraftEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.stream.MAX_AHEAD_S", 20.0)
    request = SpeechRequest(text=LONG_TEXT * 6)
    whole = engine.speak(request)
    stream = engine.stream(request)
    while not stream.is_far_ahead:
        pass
    time.sleep(0.3)
    assert stream._ahead_s < 60.0 < whole.duration_s
    assert np.array_equal(np.concatenate([piece.waveform for piece in stream]), whole.waveform)


def test_words_are_said_as_the_request_says_they_are_pronounced(engine: DraftEngine) -> None:
    said = engine.speak(SpeechRequest(text="We use SQL here.", pronunciations={"SQL": "sequel"}))
    assert np.array_equal(said.waveform, engine.speak(SpeechRequest(text="We use sequel here.")).waveform)
    assert said.chunks[0].text == "We use SQL here."


@pytest.mark.parametrize("rate_hz", [16_000, 24_000, 44_100])
def test_conversion_moves_the_pitch_and_keeps_the_time(engine: DraftEngine, rate_hz: int) -> None:
    recording = sung_vowel(120.0, 2.5, rate_hz)
    speech = engine.convert(recording, rate_hz, prompt_of(200.0))
    assert median_f0(speech.waveform, 24_000) == pytest.approx(200.0, rel=0.08)
    assert speech.duration_s == pytest.approx(2.5, abs=0.01)
    assert speech.model == "draft" and np.abs(speech.waveform).max() <= 1.0
    before, after = (_envelope(waveform) for waveform in (sung_vowel(120.0, 2.5), speech.waveform))
    assert after[before < 0.001].mean() < 0.2 * after[before > 0.1].mean()  # syllables and gaps where they were


def _envelope(waveform: np.ndarray, frame: int = 1_200) -> np.ndarray:
    """RMS of each 50 ms."""
    return np.sqrt(np.mean(waveform[: waveform.size // frame * frame].reshape(-1, frame) ** 2, axis=1))


def test_converting_what_has_no_pitch_says_so(engine: DraftEngine) -> None:
    noise = np.random.default_rng(0).standard_normal(48_000).astype(np.float32) * 0.1
    speech = engine.convert(noise, 24_000, prompt_of(200.0))
    assert "no pitch" in speech.warnings[0] and np.array_equal(speech.waveform, noise)


def test_converting_silence_is_refused(engine: DraftEngine) -> None:
    with pytest.raises(SpeechError) as caught:
        engine.convert(np.zeros(48_000, np.float32), 24_000, prompt_of(200.0))
    assert caught.value.code == "reference_silent"


def test_a_request_can_be_cancelled_while_it_speaks_and_the_next_ones_are_served(engine: DraftEngine) -> None:
    endless = SpeechRequest(text=LONG_TEXT * 60)
    futures = [engine.submit(endless) for _ in range(6)]
    assert all(future.cancel() for future in futures)
    wait(futures, timeout=60)
    with pytest.raises(CancelledError):
        futures[0].result()
    assert engine.speak(SpeechRequest(text=SENTENCE)).duration_s > 1


def test_a_failed_request_does_not_harm_the_one_beside_it(engine: DraftEngine) -> None:
    good = [engine.submit(SpeechRequest(text=SENTENCE)) for _ in range(3)]
    bad = engine.submit(SpeechRequest(text=SENTENCE, language="xx"))
    assert isinstance(bad.exception(), SpeechError)
    assert all(future.result().duration_s > 1 for future in good)


def test_closing_gives_up_what_waits_and_takes_no_more() -> None:
    engine = DraftEngine.load(UNMARKED)
    futures = [engine.submit(SpeechRequest(text=LONG_TEXT * 30)) for _ in range(5)]
    stream = engine.stream(SpeechRequest(text=LONG_TEXT * 300))
    next(stream)
    engine.close()
    assert all(future.done() for future in futures)
    error = futures[-1].exception()
    assert isinstance(error, SpeechError) and error.code == "cancelled"
    for late in (lambda: engine.submit(SpeechRequest(text=SENTENCE)), lambda: list(stream)):
        with pytest.raises(SpeechError) as caught:
            late()
        assert caught.value.code == "cancelled"


def test_the_draft_voice_is_watermarked_like_any_other(marking_engine: DraftEngine, engine: DraftEngine) -> None:
    request = SpeechRequest(text=SENTENCE)
    marked, plain = marking_engine.speak(request), engine.speak(request)
    assert marked.watermarked and not plain.watermarked
    assert marked.waveform.shape == plain.waveform.shape and not np.array_equal(marked.waveform, plain.waveform)
    assert np.array_equal(marked.waveform, marking_engine.speak(request).waveform)


def test_conversions_and_streams_are_watermarked_too(marking_engine: DraftEngine) -> None:
    assert marking_engine.convert(sung_vowel(120.0), 24_000, prompt_of(200.0)).watermarked
    *pieces, last = marking_engine.stream(SpeechRequest(text=f"Yes. {SENTENCE} {SENTENCE} [pause 1s] No."))
    joined = np.concatenate([piece.waveform for piece in pieces])
    assert last.speech is not None and last.speech.watermarked
    assert marking_engine._watermarker is not None and marking_engine._watermarker.verify(joined, 24_000)


def test_loading_fails_when_the_watermarker_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "perth", None)
    with pytest.raises(SpeechError) as caught:
        DraftEngine.load(EngineConfig(model="draft"))
    assert caught.value.code == "watermark_unavailable"


def test_stats_count_what_was_spoken() -> None:
    engine = DraftEngine.load(UNMARKED)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(engine.speak, [SpeechRequest(text="Hello.", voice=prompt_of(130.0))] * 8))
    assert engine.stats() == {"model": "draft", "num_spoken": 8, "num_cached_voices": 1}
    engine.close()


def test_importing_the_draft_voice_imports_nothing_heavy() -> None:
    heavy = ("torch", "librosa", "espeakng_loader", "scipy", "pyloudnorm")
    program = f"import sys, engine.draft; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
