"""Long requests are given out as they are made: whole passes as `speak` makes them, or early, in growing groups."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import engine.stream
from engine import Engine, Segment, SpeechError, SpeechPiece, SpeechRequest, outlet
from engine.early import FIRST_GROUP_TOKENS
from engine.models import get_model
from engine.outlet import Outlet
from engine.random_checkpoint import PlantedSpeech
from engine.s3gen.renderer import Renderer
from engine.types import SAMPLE_RATE, FloatArray
from tests.engine.conftest import Checkpoint, PlantedCheckpoint
from tests.engine.test_engine import config, prompt

PLAN = PlantedSpeech(tokens=tuple(range(100, 210)))
WORDS = "the quick brown fox went over hill and dale to find its breakfast near the river that runs to the sea"
SENTENCE = f"{WORDS.capitalize()}."
TEXT = f"{SENTENCE} Then {WORDS}. Later {WORDS}."
MAX_CHARS = 120


@pytest.fixture(scope="module")
def engine_folder(planted_checkpoint: PlantedCheckpoint) -> Path:
    return planted_checkpoint("turbo", PLAN)


@pytest.fixture(scope="module")
def turbo(engine_folder: Path) -> Iterator[Engine]:
    """Ends on cue after 110 tokens: 4.4 s, as long as its sentences take to read."""
    with Engine.load(config(engine_folder, max_chunk_chars=MAX_CHARS)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def random_turbo(tiny_checkpoint: Checkpoint) -> Iterator[Engine]:
    """Never says the end; its tokens depend on everything."""
    with Engine.load(config(tiny_checkpoint("turbo"), max_chunk_chars=MAX_CHARS)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def deaf_turbo(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """As `random_turbo`, but S3Gen's attention is silenced: what is left of the flow looks three tokens ahead."""
    folder = tmp_path_factory.mktemp("deaf") / "turbo"
    shutil.copytree(tiny_checkpoint("turbo"), folder)
    path = folder / get_model("turbo").s3gen_file
    state = safetensors.torch.load_file(path)
    outputs = [key for key in state if ".attn1.to_out." in key or ".self_attn.linear_out." in key]
    assert outputs
    safetensors.torch.save_file({key: t * 0 if key in outputs else t for key, t in state.items()}, path)
    with Engine.load(config(folder, max_chunk_chars=MAX_CHARS)) as loaded:
        yield loaded


class Kept(dict[str, bytes]):
    """A work store in memory."""

    def put(self, key: str, data: bytes) -> None:
        self[key] = data

    def of(self, kind: str) -> set[str]:
        return {key for key in self if key.startswith(kind)}


def joined(pieces: list[SpeechPiece]) -> FloatArray:
    return np.concatenate([piece.waveform for piece in pieces])


def text_request(text: str = TEXT, **changes: object) -> SpeechRequest:
    return SpeechRequest(text=text, **({"seed": 7, "max_new_tokens": 60} | changes))  # type: ignore[arg-type]


def log_mel(audio: FloatArray) -> torch.Tensor:
    """dB in 40 bands, 100 frames per second."""
    import librosa

    mel = librosa.feature.melspectrogram(y=audio, sr=SAMPLE_RATE, n_fft=1024, hop_length=240, n_mels=40)
    return torch.from_numpy(10 * np.log10(np.maximum(mel, 1e-8)))


# ------------------------------------------------------------------------------------------- whole passes


def test_pieces_joined_are_what_speak_gives_bit_for_bit(turbo: Engine) -> None:
    request = SpeechRequest(text=TEXT * 3, seed=7)
    whole = turbo.speak(request)
    *pieces, last = turbo.stream(request, early=False)
    assert np.array_equal(joined(pieces), whole.waveform)
    assert last.speech is not None and last.speech.chunks == whole.chunks
    assert [piece.num_chunks_done for piece in pieces] == sorted(piece.num_chunks_done for piece in pieces)
    assert len(pieces) > 1 and pieces[0].num_chunks_done < pieces[0].num_chunks == len(whole.chunks)


def test_the_mark_is_in_the_pieces_as_in_the_whole(engine_folder: Path) -> None:
    request = SpeechRequest(text=TEXT, seed=7)
    with Engine.load(config(engine_folder, watermark=True, max_chunk_chars=MAX_CHARS)) as marking:
        whole = marking.speak(request)
        *pieces, last = marking.stream(request, early=False)
        *early, last_early = marking.stream(request)
    assert np.array_equal(joined(pieces), whole.waveform)
    for final in (last, last_early):
        assert final.speech is not None and final.speech.watermarked
    assert joined(early).size == whole.waveform.size


def test_a_request_that_cannot_be_served_is_told_in_place_of_a_piece(turbo: Engine) -> None:
    with pytest.raises(SpeechError) as caught:
        list(turbo.stream(SpeechRequest(text="Hallo.", language="de")))
    assert caught.value.code == "language_unsupported"


def test_no_more_is_rendered_than_is_taken_but_for_a_bound(turbo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.stream, "MAX_AHEAD_S", 5.0)
    before = turbo.stats()["core"]["num_tokens"]
    stream = turbo.stream(SpeechRequest(text=TEXT * 8, seed=7), early=False)
    _wait_for(lambda: _is_decoded(turbo, before), seconds=60)
    held = 0.0
    while stream._ahead_s > held:  # until no more comes
        held = stream._ahead_s
        time.sleep(3.0)
    assert 5.0 < held < 60.0
    assert turbo.speak(SpeechRequest(text=SENTENCE, seed=1)).duration_s > 1, "others are served meanwhile"
    *pieces, last = stream
    assert last.speech is not None and last.speech.chunks[-1].end_s == pytest.approx(joined(pieces).size / SAMPLE_RATE)


# ------------------------------------------------------------------------------------------- early


def test_an_early_stream_is_the_whole_where_no_sound_depends_on_later_ones(deaf_turbo: Engine) -> None:
    """To -40 dB: noise, tokens, frames, the vocoder's source and its phase are all where the whole has them."""
    request = text_request(SENTENCE, max_new_tokens=200)
    expected = joined(list(deaf_turbo.stream(request, early=False)))
    *pieces, _ = deaf_turbo.stream(request)
    assert len(pieces) > 3
    heard = joined(pieces)
    assert heard.size == expected.size
    error = np.mean((heard - expected).astype(np.float64) ** 2) / np.mean(expected.astype(np.float64) ** 2)
    assert 10 * np.log10(error) < -40.0


@pytest.mark.parametrize("text", [SENTENCE, TEXT])
def test_an_early_stream_sounds_as_the_whole_does(random_turbo: Engine, text: str) -> None:
    """On random weights, where later tokens change a sound much more than with trained ones: 1.7 dB in 40 bands."""
    request = text_request(text)
    expected = joined(list(random_turbo.stream(request, early=False)))
    *pieces, _ = random_turbo.stream(request)
    heard = joined(pieces)
    assert heard.size == expected.size
    assert float((log_mel(heard) - log_mel(expected)).abs().mean()) < 2.5


def test_what_fits_into_the_first_group_is_the_whole_to_the_bit(random_turbo: Engine) -> None:
    request = text_request("Hi there.", max_new_tokens=FIRST_GROUP_TOKENS // 2)
    assert np.array_equal(joined(list(random_turbo.stream(request))), random_turbo.speak(request).waveform)


def test_the_first_piece_is_there_while_most_is_still_to_be_decoded(turbo: Engine) -> None:
    before = turbo.stats()["core"]["num_tokens"]
    stream = turbo.stream(SpeechRequest(text=TEXT, seed=7))
    first = next(stream)
    assert turbo.stats()["core"]["num_tokens"] == before, "no chunk had ended"
    assert 0.3 < first.waveform.size / SAMPLE_RATE < 1.0
    *_, last = stream
    assert last.speech is not None and last.speech.timings["first_audio"] < last.speech.timings["total"]


def test_no_seam_of_an_early_stream_stands_out(random_turbo: Engine) -> None:
    *pieces, _ = random_turbo.stream(text_request(SENTENCE, max_new_tokens=110))
    audio = joined(pieces)
    jumps = np.abs(np.diff(audio))
    spectra = np.abs(np.lib.stride_tricks.sliding_window_view(audio, 480)[::120] * np.hanning(480) @ _fourier(480))
    flux = np.linalg.norm(np.diff(spectra, axis=0), axis=1) / (np.linalg.norm(spectra[1:], axis=1) + 1e-3)
    seams = np.cumsum([piece.waveform.size for piece in pieces])[:-1]
    near = np.zeros(len(audio), bool)
    for seam in seams:
        near[seam - 240 : seam + 1200] = True  # what is joined waits for up to 25 ms
    near_flux = near[np.arange(len(flux)) * 120 + 240]
    assert len(seams) >= 2
    assert jumps[near[1:]].max() <= jumps[~near[1:]].max()
    assert flux[near_flux].max() <= flux[~near_flux].max()
    assert flux[near_flux].mean() <= 1.15 * flux[~near_flux].mean()


def _is_decoded(loaded: Engine, num_tokens_before: int) -> bool:
    core: dict[str, int] = loaded.stats()["core"]
    return core["num_tokens"] > num_tokens_before and core["num_waiting_chunks"] == core["num_decoding_chunks"] == 0


def _fourier(size: int) -> np.ndarray:
    return np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size // 2)) / size)


def test_a_chunk_that_was_heard_is_not_said_again_and_says_what_is_wrong_with_it(random_turbo: Engine) -> None:
    *pieces, last = random_turbo.stream(text_request(SENTENCE))
    assert last.speech is not None
    (chunk,) = last.speech.chunks
    assert chunk.attempts == 1 and chunk.flags == ("no_end",)
    assert joined(pieces).size == (60 + 3) * 960


def test_closing_an_early_stream_frees_everything_and_harms_no_other(random_turbo: Engine) -> None:
    expected = joined(list(random_turbo.stream(text_request(SENTENCE))))
    stream = random_turbo.stream(text_request(TEXT * 4, max_new_tokens=400))
    other = random_turbo.stream(text_request(SENTENCE))
    next(stream)
    stream.close()
    heard = joined(list(other))
    assert heard.size == expected.size and float((log_mel(heard) - log_mel(expected)).abs().mean()) < 2.5
    for _ in range(100):
        core = random_turbo.stats()["core"]
        if not any(core[name] for name in ("num_utterances", "num_waiting_chunks", "num_decoding_chunks")):
            break
        time.sleep(0.05)
    assert core["num_utterances"] == core["num_waiting_chunks"] == core["num_decoding_chunks"] == 0


@pytest.mark.parametrize("model", ["original", "multilingual"])
def test_models_with_guidance_stream_too(model: str, planted_checkpoint: PlantedCheckpoint) -> None:
    request = SpeechRequest(text=TEXT, seed=7)
    with Engine.load(config(planted_checkpoint(model, PLAN), model, max_chunk_chars=MAX_CHARS)) as loaded:
        whole = loaded.speak(request)
        *pieces, last = loaded.stream(request)
    assert joined(pieces).size == whole.waveform.size
    assert last.speech is not None and [chunk.flags for chunk in last.speech.chunks] == [()] * len(whole.chunks)


def test_many_streams_at_once_are_each_what_they_are_alone(random_turbo: Engine) -> None:
    requests = [text_request(f"Number {i}: {WORDS}.", voice=prompt(i % 2), top_k=1) for i in range(6)]
    alone = [joined(list(random_turbo.stream(request))) for request in requests]
    streams = [random_turbo.stream(request) for request in requests]
    for stream, expected in zip(streams, alone, strict=True):
        heard = joined(list(stream))
        assert heard.size == expected.size
        assert float((log_mel(heard) - log_mel(expected)).abs().mean()) < 3.0


# ------------------------------------------------------------------------------------------- what is kept


def test_what_was_done_is_not_done_again_and_the_audio_is_the_same(random_turbo: Engine) -> None:
    kept, request = Kept(), text_request(TEXT * 2)
    first = joined(list(random_turbo.stream(request, early=False, work=kept)))
    _wait_for(lambda: len(kept.of("audio")) >= 1)
    before = random_turbo.stats()["core"]["num_tokens"]
    again = joined(list(random_turbo.stream(request, early=False, work=kept)))
    assert np.array_equal(again, first)
    assert random_turbo.stats()["core"]["num_tokens"] == before
    assert np.abs(first - random_turbo.speak(request).waveform).max() < 1e-6, "24 bits"


def test_one_changed_sentence_costs_its_own_tokens_and_its_pass(random_turbo: Engine) -> None:
    kept, lines = Kept(), [f"Line {i} says that the fox went home to its own hill." for i in range(8)]

    def speak() -> int:
        segments = tuple(Segment(line) for line in lines)
        request = SpeechRequest(segments=segments, seed=7, max_new_tokens=20)
        *_, last = random_turbo.stream(request, early=False, work=kept)
        assert last.speech is not None and [chunk.text for chunk in last.speech.chunks] == lines
        return int(random_turbo.stats()["core"]["num_tokens"])

    before = speak()
    _wait_for(lambda: len(kept.of("tokens")) == 8 and len(kept.of("audio")) == 2)
    known = set(kept)
    lines[5] = "Line 5 says that the dog went home to its own hill."
    assert speak() - before == 3 * 20, "three attempts at one line"
    _wait_for(lambda: len(kept.of("tokens") - known) == 1 and len(kept.of("audio") - known) == 1)


@pytest.mark.parametrize("change", [{"seed": 8}, {"voice": prompt(3)}, {"temperature": 1.5}])
def test_another_seed_voice_or_setting_finds_nothing(random_turbo: Engine, change: dict[str, object]) -> None:
    kept = Kept()
    list(random_turbo.stream(text_request(SENTENCE), early=False, work=kept))
    _wait_for(lambda: len(kept) == 2)
    before = set(kept)
    list(random_turbo.stream(text_request(SENTENCE, **change), early=False, work=kept))
    _wait_for(lambda: len(kept) == 4)
    assert len(kept.keys() - before) == 2


def test_what_is_damaged_is_made_again(random_turbo: Engine) -> None:
    kept, request = Kept(), text_request(SENTENCE)
    first = joined(list(random_turbo.stream(request, early=False, work=kept)))
    _wait_for(lambda: len(kept) == 2)
    whole = dict(kept)
    for damaged in (b"", b"rubbish", None):
        for key, data in whole.items():
            kept[key] = data[:-9] if damaged is None else damaged
        assert np.array_equal(joined(list(random_turbo.stream(request, early=False, work=kept))), first)
        _wait_for(lambda: dict(kept) == whole)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_audio_that_is_not_finite_fails_its_request_and_is_never_kept(
    random_turbo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    render = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, passes: [w * float("nan") for w in render(self, passes)])
    with pytest.raises(SpeechError) as caught:
        list(random_turbo.stream(text_request(SENTENCE), early=False, work=kept))
    assert caught.value.code == "generation_failed"
    _wait_for(lambda: len(kept.of("tokens")) == 1)
    time.sleep(0.5)
    assert not kept.of("audio")


def test_a_store_that_hangs_or_raises_harms_no_request_but_its_own(engine_folder: Path) -> None:
    """Nor keeps the engine from closing."""
    released = threading.Event()

    class Hanging(Kept):
        def get(self, key: str, default: object = None) -> None:  # type: ignore[override]
            released.wait(600)

    class Raising(Kept):
        def get(self, key: str, default: object = None) -> None:  # type: ignore[override]
            raise OSError("gone")

        def put(self, key: str, data: bytes) -> None:
            raise OSError("gone")

    request = SpeechRequest(text=SENTENCE, seed=7)
    try:
        with Engine.load(config(engine_folder, max_chunk_chars=MAX_CHARS)) as loaded:
            raising = joined(list(loaded.stream(request, early=False, work=Raising())))
            hanging = [loaded.stream(request, early=False, work=Hanging()) for _ in range(9)]
            expected = loaded.speak(request).waveform
            for stream in hanging:
                stream.close()
        assert not released.is_set()
    finally:
        released.set()
    assert np.abs(raising - expected).max() < 1e-6


def test_a_request_that_waits_for_its_store_while_the_engine_closes_is_told(engine_folder: Path) -> None:
    released = threading.Event()

    class Hanging(Kept):
        def get(self, key: str, default: object = None) -> None:  # type: ignore[override]
            released.wait(60)

    with Engine.load(config(engine_folder, max_chunk_chars=MAX_CHARS)) as loaded:
        stream = loaded.stream(SpeechRequest(text=SENTENCE, seed=7), early=False, work=Hanging())
        time.sleep(0.2)
    released.set()
    error = stream._future.exception(timeout=30)
    assert isinstance(error, SpeechError) and error.code == "cancelled"


def test_what_an_early_stream_could_not_try_again_is_not_kept(random_turbo: Engine) -> None:
    kept = Kept()
    *_, last = random_turbo.stream(text_request(SENTENCE), work=kept)
    assert last.speech is not None and last.speech.chunks[0].flags
    time.sleep(0.2)
    assert not kept


def test_two_long_requests_leave_the_finish_to_others_too(turbo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is to mark: what waits for its mark is bounded, and takes turns."""
    give = Outlet._give

    def slowly(self: Outlet, audio: torch.Tensor) -> None:
        time.sleep(0.02 * len(audio) / SAMPLE_RATE)
        give(self, audio)

    monkeypatch.setattr(Outlet, "_give", slowly)
    monkeypatch.setattr(outlet, "MOST_QUEUED_S", 10.0)
    streams = [turbo.stream(SpeechRequest(text=TEXT * 6, seed=seed), early=False) for seed in (1, 2)]
    next(streams[0])
    alone = turbo.submit(SpeechRequest(text=SENTENCE, seed=3))
    taken = 0
    while not alone.done():
        time.sleep(0.01)
    taken = sum(1 for stream in streams if stream._future.done())
    assert taken < 2, "it did not wait for all of both"
    for stream in streams:
        stream.close()


def test_pauses_around_what_cannot_be_spoken_or_is_left_out_stay(turbo: Engine) -> None:
    dashes, words = "-" * (MAX_CHARS + 50), "The fox went home."
    text = f"[pause 2s] {dashes}\n\n{words}\n\n{dashes}\n\n[pause 3s] {words}"
    first, second = turbo.speak(SpeechRequest(text=text, seed=1)).chunks
    assert first.start_s > 1.99 and second.start_s - first.end_s > 2.99
    segments = (Segment("Hello."), Segment(SENTENCE))
    spoken = turbo.speak(SpeechRequest(segments=segments, seed=1, pronunciations={"hello": ""}))
    assert [chunk.text for chunk in spoken.chunks] == [SENTENCE]


def test_draining_ends_streams_that_nobody_takes(engine_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.stream, "MAX_AHEAD_S", 3.0)
    monkeypatch.setattr(outlet, "MOST_QUEUED_S", 3.0)
    loaded = Engine.load(config(engine_folder, max_chunk_chars=MAX_CHARS))
    stream = loaded.stream(SpeechRequest(text=TEXT * 6, seed=7), early=False)
    next(stream)
    closing = threading.Thread(target=lambda: loaded.close(drain=True), daemon=True)
    closing.start()
    closing.join(90)
    assert not closing.is_alive()
    assert stream._future.result(0).chunks


def test_passes_that_are_there_before_their_turn_wait_for_it(random_turbo: Engine) -> None:
    lines = [Segment(f"Line {i} says that the fox went home to its own hill.") for i in range(8)]

    def speak(num_lines: int, kept: Kept) -> FloatArray:
        request = SpeechRequest(segments=tuple(lines[:num_lines]), seed=7, max_new_tokens=20)
        return joined(list(random_turbo.stream(request, early=False, work=kept)))

    kept, first = Kept(), Kept()
    expected = speak(8, kept)
    speak(1, first)
    _wait_for(lambda: len(kept.of("audio")) == 2 and len(first.of("tokens")) == 1)
    for key in first.of("tokens"):
        del kept[key]  # so the first pass must be decoded again, while the second is there at once
    assert np.array_equal(speak(8, kept), expected)


def test_an_early_stream_goes_on_from_the_tokens_that_were_kept(turbo: Engine) -> None:
    kept, request = Kept(), SpeechRequest(text=TEXT, seed=7)
    first = joined(list(turbo.stream(request, work=kept)))
    _wait_for(lambda: len(kept.of("tokens")) == 3)
    before = turbo.stats()["core"]["num_tokens"]
    assert joined(list(turbo.stream(request, work=kept))).size == first.size
    assert turbo.stats()["core"]["num_tokens"] == before


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from engine import Engine, SpeechRequest
from tests.engine.test_engine import config

class Folder:
    def __init__(self, root): self.root = Path(root)
    def get(self, key):
        path = self.root / key.replace("/", "-")
        return path.read_bytes() if path.exists() else None
    def put(self, key, data):
        new = self.root / ("." + key.replace("/", "-"))
        new.write_bytes(data)
        new.replace(self.root / key.replace("/", "-"))

checkpoint, root, text, out = sys.argv[1:]
with Engine.load(config(Path(checkpoint), max_chunk_chars=120)) as engine:
    request = SpeechRequest(text=text, seed=7, max_new_tokens=60)
    pieces = [piece.waveform for piece in engine.stream(request, early=False, work=Folder(root))]
    print(engine.stats()["core"]["num_tokens"])
np.save(out, np.concatenate(pieces))
"""


def test_a_process_killed_at_any_moment_is_gone_on_from_by_another_with_the_same_audio(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    text = " ".join(f"Sentence {i}: {WORDS}." for i in range(8))

    def start(root: Path, out: str) -> subprocess.Popen[str]:
        root.mkdir(exist_ok=True)
        arguments = [str(tiny_checkpoint("turbo")), str(root), text, str(tmp_path / out)]
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    undisturbed = start(tmp_path / "other", "undisturbed.npy")
    num_tokens = int(undisturbed.communicate(timeout=300)[0])
    for num_files in (2, 9):
        killed = start(tmp_path / "work", "resumed.npy")
        _wait_for(functools.partial(_holds, tmp_path / "work", num_files), seconds=120)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
    resumed = start(tmp_path / "work", "resumed.npy")
    assert int(resumed.communicate(timeout=300)[0]) < num_tokens
    assert np.array_equal(np.load(tmp_path / "resumed.npy"), np.load(tmp_path / "undisturbed.npy"))


def _holds(folder: Path, num_files: int) -> bool:
    return len(list(folder.iterdir())) >= num_files


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def test_segments_of_several_voices_stream_in_order(turbo: Engine) -> None:
    segments = tuple(Segment(f"Line {i}: {WORDS}.", voice=prompt(i % 2), pause_after_s=0.3) for i in range(4))
    *pieces, last = turbo.stream(SpeechRequest(segments=segments, seed=1))
    assert last.speech is not None
    assert [chunk.text for chunk in last.speech.chunks] == [segment.text for segment in segments]
    audio = joined(pieces)
    for one, following in zip(last.speech.chunks, last.speech.chunks[1:], strict=False):
        assert following.start_s - one.end_s == pytest.approx(0.3, abs=1e-4)
        assert not audio[round(one.end_s * SAMPLE_RATE) : round(following.start_s * SAMPLE_RATE)].any()
