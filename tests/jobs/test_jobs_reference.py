"""Recordings in every accepted wrapping and format become the same voice prompt; the rest is refused."""

from __future__ import annotations

import asyncio
import base64
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import SpeechError
from engine.types import VoicePrompt
from jobs.context import JobContext
from jobs.errors import JobError
from jobs.reference import load, read_reference
from jobs.settings import Settings

Recording = Callable[..., bytes]


def read(source: str, settings: Settings, *, local_files: bool = False) -> VoicePrompt:
    context = JobContext(engine=None, settings=settings, local_files=local_files)  # type: ignore[arg-type]
    data = asyncio.run(load(source, "reference_audio", context))
    return read_reference(data, "reference_audio", settings)


def code_of(source: str, settings: Settings, *, local_files: bool = False) -> str:
    with pytest.raises((JobError, SpeechError)) as caught:
        read(source, settings, local_files=local_files)
    error = caught.value
    assert isinstance(error, (JobError, SpeechError))
    assert error.field == "reference_audio"
    return error.code


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_24"),
        ("MP3", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_reads_as_mono_of_the_length_sent(
    file_format: str, subtype: str | None, channels: int, recording: Recording, settings: Settings
) -> None:
    data = recording(file_format=file_format, subtype=subtype, channels=channels)
    prompt = read(base64.b64encode(data).decode(), settings)
    assert prompt.audio.ndim == 1
    assert prompt.duration_s == pytest.approx(6.0, abs=0.15)
    assert 0.1 < np.abs(prompt.audio).max() <= 1.0


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
def test_rates_from_8_to_96_khz_are_read(rate: int, recording: Recording, settings: Settings) -> None:
    prompt = read(base64.b64encode(recording(rate=rate)).decode(), settings)
    assert (prompt.sample_rate, prompt.duration_s) == (rate, 6.0)


def test_all_wrappings_of_one_recording_give_one_voice(
    recording: Recording, settings: Settings, tmp_path: Path
) -> None:
    data = recording()
    plain = base64.b64encode(data).decode()
    (tmp_path / "my voice.wav").write_bytes(data)
    sources = [
        plain,
        "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76)),
        base64.urlsafe_b64encode(data).decode(),
        f"data:audio/wav;base64,{plain}",
        f"  data:audio/wav;base64,{plain}\n",
        f"data:audio/wav,{urllib.parse.quote_from_bytes(data)}",
        f"file:{tmp_path / 'my voice.wav'}",
    ]
    assert len({read(source, settings, local_files=True).key for source in sources}) == 1


@pytest.mark.parametrize(
    "source", ["", "   ", "not base64!", "AAA", "data:audio/wav;base64", "data:;base64,%%%", "data:,", "ÄÖÜ="]
)
def test_broken_base64_is_unreadable(source: str, settings: Settings) -> None:
    assert code_of(source, settings) == "reference_unreadable"


@pytest.mark.parametrize("data", [b"hello, this is no recording at all", bytes(1000), b"RIFF\x00\x00\x00\x00WAVE"])
def test_what_is_not_audio_is_unreadable(data: bytes, settings: Settings) -> None:
    assert code_of(base64.b64encode(data).decode(), settings) == "reference_unreadable"


@pytest.mark.parametrize("source", ["https://x.test/a.wav", "http://x.test/a.wav", "s3://b/a.wav", "ftp://x.test/a"])
def test_without_a_fetcher_addresses_are_refused(source: str, settings: Settings) -> None:
    assert code_of(source, settings) == "download_refused"


def test_a_file_is_read_on_a_persons_own_machine_alone(
    settings: Settings, tmp_path: Path, recording: Recording
) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(recording())
    assert code_of(f"file:{path}", settings) == "download_refused"
    assert read(f"file:{path}", settings, local_files=True).duration_s == 6.0
    assert read(f"file://{path}", settings, local_files=True).duration_s == 6.0


@pytest.mark.parametrize("name", ["missing.wav", "", "nul\0byte"])
def test_a_file_that_cannot_be_read_is_unreadable(name: str, settings: Settings, tmp_path: Path) -> None:
    assert code_of(f"file:{tmp_path}/{name}", settings, local_files=True) == "reference_unreadable"


def test_too_many_bytes_are_refused_before_they_are_read(settings: Settings, tmp_path: Path) -> None:
    small = settings.model_copy(update={"max_reference_bytes": 1_000})
    (tmp_path / "big.wav").write_bytes(bytes(2_000))
    for source in ("A" * 4_000, f"data:audio/wav;base64,{'A' * 4_000}", f"file:{tmp_path}/big.wav"):
        assert code_of(source, small, local_files=True) == "reference_too_long"


def test_length_and_silence_have_their_own_codes(settings: Settings, recording: Recording) -> None:
    assert code_of(base64.b64encode(recording(duration_s=0.3)).decode(), settings) == "reference_too_short"
    two_hours = recording(file_format="OGG", subtype="OPUS", rate=8_000, duration_s=3)
    short_limit = settings.model_copy(update={"max_reference_s": 2.0})
    assert code_of(base64.b64encode(two_hours).decode(), short_limit) == "reference_too_long"
