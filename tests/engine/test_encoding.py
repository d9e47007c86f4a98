"""A file or a stream holds the waveform that was written to it, in any format, however it was written."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.audio.encoding import FORMATS, STREAM_FORMATS, FileEncoder, StreamEncoder, encode
from engine.errors import SpeechError
from engine.types import FloatArray
from tests.engine.cuts import CUTS, cut
from tests.engine.synthetic_voices import sung_vowel

RATE_HZ = 24_000
RATES_HZ = [8_000, 16_000, 24_000, 48_000]
TITLES = [
    "Chapter 1",
    "Straße, søster & œuvre",
    "第三章：夜の海",
    "One that is longer than thirty bytes",
]


@pytest.fixture(scope="module")
def voice() -> FloatArray:
    return sung_vowel(120.0)


def _read(data: bytes, num_samples: int = -1) -> FloatArray:
    samples: FloatArray = soundfile.SoundFile(io.BytesIO(data)).read(num_samples, dtype="float32")
    return samples


def _rms_dbfs(waveform: FloatArray) -> float:
    return float(10 * np.log10(np.mean(waveform.astype(np.float64) ** 2)))


def _streamed(blocks: list[FloatArray], name: str, rate_hz: int = RATE_HZ) -> list[bytes]:
    encoder = StreamEncoder(rate_hz, name)
    return [*[encoder.push(block) for block in blocks], encoder.finish()]


def _readable(stream: bytes, num_samples: int) -> io.BytesIO:
    """A stream as libsndfile can read it: a flac without a length it does not read to its end, so it gets one."""
    if stream[:4] == b"fLaC":
        facts = int.from_bytes(stream[18:26], "big")  # rate, channels, bits, and 36 bits of samples
        assert facts % (1 << 36) == 0, "the number of samples was not unknown"
        stream = stream[:18] + (facts + num_samples).to_bytes(8, "big") + stream[26:]
    return io.BytesIO(stream)


def _lag(heard: FloatArray, original: FloatArray) -> int:
    """By how many samples the one comes after the other."""
    size = 1 << (heard.size + original.size).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(original, size)))
    return int(np.argmax(correlation[: size // 2]))


# Files


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_lossless_formats_give_back_every_sample_rounded_to_16_bits(name: str, voice: FloatArray) -> None:
    read, rate_hz = soundfile.read(io.BytesIO(encode(voice, RATE_HZ, name)), dtype="float32")
    assert rate_hz == RATE_HZ and read.shape == voice.shape
    assert np.abs(read - voice).max() <= 0.501 / 32768


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_every_format_gives_a_file_of_its_kind_that_sounds_the_same(name: str, rate_hz: int) -> None:
    voice = sung_vowel(150.0, sample_rate=rate_hz)
    file = soundfile.SoundFile(io.BytesIO(encode(voice, rate_hz, name)))
    read = file.read(dtype="float32")
    assert (file.format, file.subtype) == (FORMATS[name].container, FORMATS[name].subtype)
    assert file.samplerate == rate_hz and file.channels == 1
    assert read.size / rate_hz == pytest.approx(3.0, abs=0.15)  # mp3 pads its ends
    assert _rms_dbfs(read[: voice.size]) == pytest.approx(_rms_dbfs(voice), abs=1.0)


@given(at=CUTS, name=st.sampled_from(["wav", "flac", "mp3"]))
@settings(max_examples=20, deadline=None)
def test_how_a_waveform_is_cut_changes_no_byte_of_its_file(at: list[int], name: str) -> None:
    voice = sung_vowel(120.0)[:20_000]
    encoder = FileEncoder(target := io.BytesIO(), RATE_HZ, name)
    for block in cut(voice, at):
        encoder.push(block)
    encoder.finish()
    assert target.getvalue() == encode(voice, RATE_HZ, name)


def test_how_a_waveform_is_cut_changes_no_sample_of_its_opus(voice: FloatArray) -> None:
    encoder = FileEncoder(target := io.BytesIO(), RATE_HZ, "opus")
    for block in cut(voice, [1, 1_000, 48_000]):
        encoder.push(block)
    encoder.finish()  # an Ogg stream's serial number is drawn anew, so its bytes differ
    assert np.array_equal(_read(target.getvalue()), _read(encode(voice, RATE_HZ, "opus")))


@pytest.mark.parametrize("name", FORMATS)
def test_audio_of_many_blocks_is_written_whole_and_its_header_says_how_much(name: str) -> None:
    minute = np.zeros(RATE_HZ * 60 + 1, np.float32)
    assert soundfile.info(io.BytesIO(encode(minute, RATE_HZ, name))).frames == minute.size


@pytest.mark.parametrize("name", FORMATS)
def test_even_no_audio_makes_an_answer(name: str) -> None:
    assert isinstance(encode(np.zeros(0, np.float32), RATE_HZ, name), bytes)


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_samples_beyond_full_scale_are_clipped_not_wrapped(name: str) -> None:
    read = _read(encode(np.array([1.5, -1.5, 1.0], np.float32), RATE_HZ, name))
    assert np.array_equal(read, np.array([32767, -32768, 32767], np.float32) / 32768)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("title", TITLES)
def test_the_title_reads_back_in_any_language_and_length(name: str, title: str, voice: FloatArray) -> None:
    file = soundfile.SoundFile(io.BytesIO(encode(voice, RATE_HZ, name, title=title)))
    assert file.title == title and file.frames == voice.size


@pytest.mark.parametrize("name", FORMATS)
def test_a_title_that_no_tag_can_hold_is_made_one_line_of_text(name: str, voice: FloatArray) -> None:
    data = encode(voice[:2400], RATE_HZ, name, title=" one\r\ntwo\0three\ud800 ")
    assert soundfile.SoundFile(io.BytesIO(data)).title == "one two three?"


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_written_from_where_its_target_stands(name: str, voice: FloatArray) -> None:
    target = io.BytesIO(b"before")
    target.seek(6)
    encoder = FileEncoder(target, RATE_HZ, name, title="Chapter 1")
    encoder.push(voice)
    encoder.finish()
    assert target.getvalue()[:6] == b"before"
    assert soundfile.info(io.BytesIO(target.getvalue()[6:])).frames == voice.size


class _FullDisk(io.BytesIO):
    """A file on a disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self.room:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_said_as_such(name: str, voice: FloatArray) -> None:
    encoder = FileEncoder(_FullDisk(8_000), RATE_HZ, name)
    with pytest.raises(OSError, match="No space left"):
        encoder.push(np.tile(voice, 10))


def test_a_disk_that_is_full_at_the_end_is_said_as_such(voice: FloatArray) -> None:
    encoder = FileEncoder(_FullDisk(1_000), RATE_HZ, "opus")
    encoder.push(voice[:4_000])  # its one page waits for the end
    with pytest.raises(OSError, match="No space left"):
        encoder.finish()


@pytest.mark.parametrize("name", FORMATS)
def test_an_encoder_given_up_with_its_file_leaves_it_as_it_is(
    name: str, voice: FloatArray, capfd: pytest.CaptureFixture[str]
) -> None:
    target = io.BytesIO()
    encoder = FileEncoder(target, RATE_HZ, name)
    encoder.push(voice)
    target.close()
    del encoder
    assert capfd.readouterr().err == ""


def test_nothing_can_be_written_to_a_finished_file(voice: FloatArray) -> None:
    encoder = FileEncoder(io.BytesIO(), RATE_HZ, "wav")
    encoder.finish()
    with pytest.raises(AssertionError):
        encoder.push(voice)
    with pytest.raises(AssertionError):
        encoder.finish()


# Streams


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_the_bytes_of_a_stream_are_a_file_with_all_its_samples_in_place(name: str, rate_hz: int) -> None:
    voice = sung_vowel(150.0, sample_rate=rate_hz)
    stream = b"".join(_streamed(list(cut(voice, [0, 100, 5_000, 5_001, rate_hz])), name, rate_hz))
    file = soundfile.SoundFile(_readable(stream, voice.size))
    read = file.read(2 * voice.size if name == "mp3" else voice.size, dtype="float32")
    lag = _lag(read, voice)
    assert (file.format, file.samplerate) == (FORMATS[name].container, rate_hz)
    assert voice.size <= read.size <= voice.size + (3_000 if name == "mp3" else 0)
    assert lag == (1_105 if name == "mp3" else 0)  # the codec's delay, which an mp3's Info frame would tell
    assert np.abs(_spectrum_db(read[lag : lag + voice.size]) - _spectrum_db(voice)).max() < 1.5


def _spectrum_db(waveform: FloatArray) -> FloatArray:
    """Energy of a few bands up to 3 kHz or so, where speech is."""
    frames = np.abs(np.fft.rfft(waveform[: waveform.size // 512 * 512].reshape(-1, 512) * np.hanning(512))) ** 2
    bands: FloatArray = 10 * np.log10(frames.sum(0)[:32].reshape(4, 8).sum(1))
    return bands


def test_pcm_is_the_samples_alone(voice: FloatArray) -> None:
    stream = b"".join(_streamed(list(cut(voice, [7, 100])), "pcm"))
    assert np.array_equal(np.frombuffer(stream, "<i2"), np.rint(voice * 32768))


def test_a_wav_stream_is_a_header_of_unknown_sizes_and_the_pcm(voice: FloatArray) -> None:
    first, *rest = _streamed([voice[:100], voice[100:]], "wav")
    assert struct.unpack_from("<I", first, 4) == struct.unpack_from("<I", first, 40) == (0xFFFFFFFF,)
    assert first[44:] + b"".join(rest) == b"".join(_streamed([voice], "pcm"))


@pytest.mark.parametrize("name", ["wav", "flac", "opus"])
def test_the_samples_of_a_stream_are_those_of_the_file(name: str, voice: FloatArray) -> None:
    stream = _readable(b"".join(_streamed([voice], name)), voice.size)
    read = soundfile.SoundFile(stream).read(voice.size, dtype="float32")
    assert np.array_equal(read, _read(encode(voice, RATE_HZ, name)))


@given(at=CUTS, name=st.sampled_from(["pcm", "wav", "flac", "mp3"]))
@settings(max_examples=20, deadline=None)
def test_how_a_waveform_is_cut_changes_no_byte_of_its_stream(at: list[int], name: str) -> None:
    voice = sung_vowel(120.0)[:20_000]
    assert b"".join(_streamed(list(cut(voice, at)), name)) == b"".join(_streamed([voice], name))


@pytest.mark.parametrize(("name", "held_s"), [("pcm", 0), ("wav", 0), ("flac", 0.2), ("mp3", 0.08), ("opus", 0.12)])
def test_a_stream_gives_its_first_sound_early_and_goes_on_giving(name: str, held_s: float) -> None:
    voice = sung_vowel(120.0, 2.0)
    encoder, headers = StreamEncoder(RATE_HZ, name), {"opus": 200}.get(name, 100)
    silent_for, given = 0.0, 0
    for start in range(0, voice.size, 240):
        data = encoder.push(voice[start : start + 240])
        given += len(data)
        silent_for = 0.0 if data and given > headers else silent_for + 0.01
        assert silent_for <= held_s + 0.015


def test_an_mp3_stream_has_no_frame_kept_free_for_what_is_never_known(voice: FloatArray) -> None:
    stream = b"".join(_streamed([voice], "mp3"))
    assert stream[0] == 0xFF and any(stream[4:13])
    assert b"Xing" not in stream[:1000] and b"Info" not in stream[:1000]


@pytest.mark.parametrize("rate_hz", FORMATS["mp3"].sample_rates or ())
def test_an_mp3_stream_has_a_constant_bit_rate_that_tells_its_duration(rate_hz: int) -> None:
    voice = sung_vowel(120.0, 2.0, rate_hz)
    stream = b"".join(_streamed([voice], "mp3", rate_hz))
    kbits = 96 if rate_hz >= 32_000 else 64 if rate_hz >= 16_000 else 40
    assert len(stream) * 8 / (kbits * 1000) == pytest.approx(2.0, abs=0.3)
    assert soundfile.info(io.BytesIO(stream)).duration == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("name", STREAM_FORMATS)
def test_a_stream_of_nothing_ends_well(name: str) -> None:
    assert len(b"".join(_streamed([np.zeros(0, np.float32)], name))) < 1000


def test_nothing_can_be_pushed_to_a_finished_stream(voice: FloatArray) -> None:
    for name in STREAM_FORMATS:
        encoder = StreamEncoder(RATE_HZ, name)
        encoder.finish()
        with pytest.raises(AssertionError):
            encoder.push(voice)
        with pytest.raises(AssertionError):
            encoder.finish()


# Refusals


@pytest.mark.parametrize(("name", "rate_hz"), [("opus", 44_100), ("opus", 22_050), ("mp3", 96_000)])
def test_a_rate_that_the_format_cannot_hold_is_refused_by_name(name: str, rate_hz: int, voice: FloatArray) -> None:
    with pytest.raises(SpeechError, match="24000") as caught:
        encode(voice, rate_hz, name)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "sample_rate")
    with pytest.raises(SpeechError, match="24000"):
        StreamEncoder(rate_hz, name)


def test_an_unknown_format_is_refused_by_name(voice: FloatArray) -> None:
    with pytest.raises(SpeechError, match="wav, flac, mp3, opus, got 'pcm'") as caught:
        encode(voice, RATE_HZ, "pcm")
    assert (caught.value.code, caught.value.field) == ("invalid_request", "output_format")
    with pytest.raises(SpeechError, match="wav, flac, mp3, opus, pcm, got 'aac'"):
        StreamEncoder(RATE_HZ, "aac")


def test_the_mp3_and_opus_rates_are_those_the_library_takes() -> None:
    """The table of rates against libsndfile itself, so that neither promises what the other refuses."""
    for name in ("mp3", "opus"):
        audio_format = FORMATS[name]
        for rate_hz in (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000):
            arguments = (io.BytesIO(), "w", rate_hz, 1, audio_format.subtype)
            try:
                soundfile.SoundFile(*arguments, format=audio_format.container).close()
                taken = True
            except soundfile.LibsndfileError:
                taken = False
            assert taken == (rate_hz in (audio_format.sample_rates or ())), (name, rate_hz)
