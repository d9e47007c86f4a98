"""`scripts/speak.py` as a person runs it: this machine and deployed workers speak, into files, pipes and speakers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import types
import wave
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from engine.audio.encoding import StreamEncoder, encode
from engine.types import FloatArray
from jobs.settings import Settings
from jobs.worker import Worker
from scripts.batch.client import Client
from scripts.batch.rates import LIMITS
from scripts.speak import app
from scripts.speaker.reading import read_all, read_lines
from scripts.speaker.sinks import OneWav, Sink, SinkError, Speakers, file_sink, write
from scripts.speaker.sources import Here, SpeakingError, There
from tests.platform import Platform, wait_until, without_ours
from tests.scripts.serving import Silent, serving

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "speak.py"
HANDLER = SCRIPT.parents[1] / "handler.py"
LONG = "This is a sentence of a text that is a good deal longer than anybody would like to wait for. " * 400

SPEAKERS = """
class PortAudioError(Exception):
    pass

class RawOutputStream:
    def __init__(self, samplerate, channels, dtype):
        self.file = open("played", "wb")
        open("rate", "w").write(f"{samplerate} {channels} {dtype}")
    def start(self): pass
    def write(self, data): self.file.write(data)
    def stop(self): pass
    def close(self): self.file.close()
"""


@dataclass(frozen=True)
class Ended:
    """What a run left."""

    status: int
    out: bytes
    err: str


def speak(cwd: Path, *arguments: str, stdin: bytes = b"", **environment: str) -> Ended:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env=without_ours(os.environ) | environment,
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert b"Traceback" not in ran.stderr, ran.stderr.decode()
    return Ended(ran.returncode, ran.stdout, ran.stderr.decode())


def seconds(path: Path) -> float:
    audio, rate = soundfile.read(path)
    assert abs(audio).max() > 0.01
    return float(len(audio) / rate)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.ogg"])
def test_a_text_becomes_a_file_of_the_kind_that_its_name_says(name: str, tmp_path: Path) -> None:
    ended = speak(tmp_path, "Hello there, this is a text.", "-o", name)
    assert ended.status == 0 and ended.out == b""
    assert 1.0 < seconds(tmp_path / name) < 4.0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_wav_file_knows_its_own_length(tmp_path: Path) -> None:
    speak(tmp_path, "Hello there, this is a text.", "-o", "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getnframes() * 2 + 44 == (tmp_path / "a.wav").stat().st_size


def test_a_pipe_is_spoken_into_a_pipe(tmp_path: Path) -> None:
    ended = speak(tmp_path, "-o", "-", "--format", "mp3", stdin="Grüße aus der Röhre.\n".encode())
    (tmp_path / "a.mp3").write_bytes(ended.out)
    assert seconds(tmp_path / "a.mp3") > 1.0
    assert "draft" in ended.err


def test_each_line_is_spoken_and_all_are_one_file(tmp_path: Path) -> None:
    alone = speak(tmp_path, "One line.", "-o", "one.wav")
    ended = speak(tmp_path, "--lines", "-o", "all.wav", stdin=b"One line.\n\nOne line.\n...\nOne line.")
    assert (alone.status, ended.status) == (0, 0)
    assert seconds(tmp_path / "all.wav") == pytest.approx(3 * seconds(tmp_path / "one.wav"), abs=0.01)


def test_the_speakers_get_the_samples_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sounddevice.py").write_text(SPEAKERS)
    ended = speak(tmp_path, "Hello there, this is a text.", PYTHONPATH=str(tmp_path))
    assert ended.status == 0, ended.err
    assert (tmp_path / "rate").read_text() == "24000 1 int16"
    speak(tmp_path, "Hello there, this is a text.", "-o", "a.wav")
    assert (tmp_path / "played").read_bytes() == (tmp_path / "a.wav").read_bytes()[44:]


def interrupt(process: subprocess.Popen[bytes]) -> str:
    """As Ctrl-C does; what it printed. Its standard input stays open."""
    process.send_signal(signal.SIGINT)
    status = process.wait(timeout=60)
    assert process.stderr is not None and process.stdin is not None
    err = process.stderr.read().decode()
    process.stderr.close()
    process.stdin.close()
    assert status == 130 and "Traceback" not in err, err
    return err


def test_an_interrupt_keeps_the_lines_that_were_spoken_and_waits_for_no_more(tmp_path: Path) -> None:
    speak(tmp_path, "One line.", "-o", "one.wav", "--seed", "1")
    line = (tmp_path / "one.wav").read_bytes()[44:]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--lines", "-o", "all.wav", "--seed", "1"],
        cwd=tmp_path,
        env=without_ours(os.environ),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    process.stdin.write(b"One line.\nOne line.\n")
    # The second has begun:
    wait_until(lambda: any(path.stat().st_size > len(line) + 44 for path in tmp_path.glob(".*.part")))
    assert "wrote all.wav" in interrupt(process)
    with wave.open(str(tmp_path / "all.wav")) as file:
        samples = file.readframes(1 << 24)
        assert file.getnframes() * 2 == len(samples) == (tmp_path / "all.wav").stat().st_size - 44
    assert samples in (line, line * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.wav", "one.wav"]


@pytest.mark.parametrize("text", ["-f long.txt", "--lines <endless"])
def test_a_listener_who_has_heard_enough_ends_it_without_a_word(text: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(LONG)
    arguments, _, endless = text.partition(" <")
    yes = "yes 'One line.' | " if endless else ""
    command = f"{yes}{sys.executable} {SCRIPT} {arguments} -o - | head -c 100 | wc -c"
    ran = subprocess.run(
        command, shell=True, cwd=tmp_path, env=without_ours(os.environ), capture_output=True, timeout=120, check=True
    )
    assert ran.stdout.strip() == b"100"
    assert b"Traceback" not in ran.stderr and b"error" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Hello.", "-f", "x.txt"], "got both"),
        (["-f", "nowhere.txt", "-o", "a.wav"], "nowhere.txt"),
        (["Hello.", "-o", "a.doc"], "wav, flac, mp3, opus"),
        (["Hello.", "--format", "mp3"], "speakers"),
        (["Hello.", "-o", "a.wav", "--set", "temprature=1"], "did you mean temperature"),
        (["Hello.", "-o", "a.wav", "-v", "Ann"], "voice_not_found"),
        (["...", "-o", "a.wav"], "text_empty"),
        (["Hello.", "-o", "a.flac", "--lines"], "--lines goes with"),
        (["Hello."], "pip install sounddevice"),
        (["Hello.", "-o", "a.wav", "--endpoint", "abc"], "RUNPOD_API_KEY"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_file(arguments: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "sounddevice.py").write_text("raise ImportError")
    ended = speak(tmp_path, *arguments, PYTHONPATH=str(tmp_path))
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.status == 1 and len(errors) == 1 and told in errors[0], ended.err
    assert not list(tmp_path.glob("*a.*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Hello.", "-o", "."], ". is a folder"),
        (["Hello.", "-o", "file/a.wav"], "file"),
        (["Hello.", "-o", "b.wav", "--format", "mp3"], "whose name says wav"),
        (["Hello.", "-o", "b.ogg", "--format", "wav"], "whose name says opus"),
        (["Hello.", "-o", "b.wav", "--set", "text=Bye."], "--set text has no place"),
        (["Hello.", "-o", "b.wav", "--set", "output_format=mp3"], "--format"),
        (["\n...\n", "--lines", "-o", "b.wav"], "nothing to say"),
    ],
)
def test_what_would_be_lost_is_refused_before_anybody_speaks(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with endpoint(lambda _operation, _job_id: 500) as (url, asked):
        monkeypatch.setenv("RUNPOD_API_KEY", "rpa_1")
        ran = CliRunner().invoke(app, [*arguments, "--endpoint", "ep", "--api-url", url])
    assert ran.exit_code == 1 and told in ran.output, ran.output
    assert not asked and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "told"), [("-o - >&-", "standard output is closed"), ("- <&-", "expected a text")]
)
def test_what_is_closed_is_told(arguments: str, told: str, tmp_path: Path) -> None:
    text = "" if "<" in arguments else "Hello. "
    ran = subprocess.run(
        f"{sys.executable} {SCRIPT} {text}{arguments}",
        shell=True,
        cwd=tmp_path,
        env=without_ours(os.environ),
        capture_output=True,
        timeout=120,
        check=False,
    )
    err = ran.stderr.decode()
    assert ran.returncode == 1 and err.startswith("error: ") and told in err, err


@pytest.mark.parametrize("read", [read_all, lambda: anext(read_lines())])
def test_standard_input_that_does_not_wait_is_not_taken_for_its_end(
    read: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"Half a")
    os.set_blocking(ours, False)

    async def reading() -> bytes:
        data: bytes = await read()
        return data

    with open(ours) as stdin, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", stdin)
        with pytest.raises(OSError, match="does not wait"):
            asyncio.run(reading())
    os.close(theirs)


# ------------------------------------------------------------------------------ sinks

SOUND: FloatArray = (np.sin(np.arange(24_000) / 20) / 2).astype(np.float32)
LIST_CHUNK = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"


def samples_of(path: Path) -> bytes:
    """All of a wav file that knows its size."""
    with wave.open(str(path)) as file:
        assert file.getnframes() * 2 + 44 == path.stat().st_size
        return file.readframes(file.getnframes())


def streamed(sound: FloatArray) -> bytes:
    encoder = StreamEncoder(24_000, "wav")
    return encoder.push(sound) + encoder.finish()


WHOLE, SAMPLES = encode(SOUND, 24_000), encode(SOUND, 24_000)[44:]


@pytest.mark.parametrize(
    "wav",
    [WHOLE, streamed(SOUND), encode(SOUND, 24_000, title="A title"), WHOLE + LIST_CHUNK, streamed(SOUND) + b"x"],
    ids=["whole", "streamed", "titled", "chunk", "half"],
)
@pytest.mark.parametrize("piece_bytes", [7, 1 << 20])
def test_wavs_of_any_kind_become_one_that_has_the_samples_of_all(wav: bytes, piece_bytes: int, tmp_path: Path) -> None:
    with file_sink(tmp_path / "a.wav") as file:
        one = OneWav(file)
        for _ in range(3):
            for start in range(0, len(wav), piece_bytes):
                one.write(wav[start : start + piece_bytes])
            one.end_file()
    assert samples_of(tmp_path / "a.wav") == SAMPLES * 3


class Kept:
    """A sink that keeps all."""

    may_hang = False

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    def end_file(self) -> None:
        """Nothing of it is kept."""


def test_one_wav_says_of_no_length_that_it_has() -> None:
    kept = Kept()
    OneWav(kept).write(WHOLE)
    assert kept.data == streamed(SOUND), "a player would stop after the first"


@pytest.mark.parametrize("rate_hz", [16_000, 24_000])
def test_wavs_that_cannot_be_one_are_refused(rate_hz: int) -> None:
    other = io.BytesIO()
    soundfile.write(other, np.zeros((100, 2 if rate_hz == 24_000 else 1)), rate_hz, "PCM_16", format="WAV")
    kept = Kept()
    one = OneWav(kept)
    one.write(WHOLE)
    one.end_file()
    with pytest.raises(SinkError, match="cannot be one"):
        one.write(other.getvalue())
    assert kept.data == streamed(SOUND)


def test_the_speakers_play_samples_of_all_files_and_refuse_what_they_were_not_opened_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = types.ModuleType("sounddevice")
    exec(SPEAKERS, vars(library))
    monkeypatch.setitem(sys.modules, "sounddevice", library)
    monkeypatch.chdir(tmp_path)
    speakers = Speakers()
    for wav in (WHOLE + LIST_CHUNK, streamed(SOUND)):
        speakers.write(wav[:1001])  # within a sample
        speakers.write(wav[1001:])
        speakers.end_file()
    with pytest.raises(SinkError, match="16000 Hz"):
        speakers.write(encode(SOUND, 16_000))
    speakers.close()
    assert (tmp_path / "played").read_bytes() == SAMPLES * 2


@pytest.mark.parametrize("keeps_whole", [True, False])
@pytest.mark.parametrize("num_whole", [0, 2])
def test_what_is_cancelled_becomes_a_file_of_what_was_whole_or_none(
    num_whole: int, keeps_whole: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"before")

    def stop() -> None:
        with file_sink(path, keeps_whole=keeps_whole) as file:
            one = OneWav(file)
            for _ in range(num_whole):
                one.write(WHOLE)
                one.end_file()
            one.write(WHOLE[:1000])
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        stop()
    if keeps_whole and num_whole:
        assert samples_of(path) == SAMPLES * num_whole
    else:
        assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_is_cancelled_waits_until_nobody_writes() -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Slow(Kept):
        def write(self, data: bytes) -> None:
            begun.set()
            may_end.wait(60)
            super().write(data)

    async def stop() -> tuple[bool, bytes]:
        slow = Slow()
        writing = asyncio.create_task(write(slow, WHOLE))
        await asyncio.to_thread(begun.wait)
        writing.cancel()
        await asyncio.wait([writing], timeout=0.05)
        may_end.set()
        await asyncio.wait([writing])
        return writing.cancelled(), slow.data

    was_cancelled, data = asyncio.run(stop())
    assert was_cancelled and data and WHOLE.startswith(data)


@pytest.mark.parametrize("keeps_whole", [True, False])
def test_of_lines_those_before_a_failure_are_kept(keeps_whole: bool, tmp_path: Path) -> None:
    def fail() -> None:
        with file_sink(tmp_path / "a.wav", keeps_whole=keeps_whole) as file:
            file.write(WHOLE)
            file.end_file()
            file.write(WHOLE[:1000])
            raise OSError("away")

    with pytest.raises(OSError, match="away"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == (["a.wav"] if keeps_whole else [])
    assert not keeps_whole or samples_of(tmp_path / "a.wav") == SAMPLES


def test_two_runs_of_one_name_do_not_mix(tmp_path: Path) -> None:
    with file_sink(tmp_path / "a.wav") as other:
        other.write(b"other")
        with file_sink(tmp_path / "a.wav") as ours:
            ours.write(WHOLE)
            other.write(b"other")
        assert (tmp_path / "a.wav").read_bytes() == WHOLE
    assert (tmp_path / "a.wav").read_bytes() == b"otherother"
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.wav").symlink_to("there/b.wav")
    for _ in range(2):  # of nothing yet, then of a file
        with file_sink(tmp_path / "a.wav") as sink:
            sink.write(WHOLE)
        assert (tmp_path / "a.wav").is_symlink() and (tmp_path / "there" / "b.wav").read_bytes() == WHOLE


def test_a_pipe_that_has_a_name_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "a.wav").read_bytes()), daemon=True)
    reader.start()

    async def send() -> None:
        with file_sink(tmp_path / "a.wav") as sink:
            await write(sink, WHOLE)

    asyncio.run(send())
    reader.join(20)
    assert heard == [WHOLE] and stat.S_ISFIFO((tmp_path / "a.wav").stat().st_mode)


@pytest.mark.parametrize("is_many", [True, False])
def test_nobody_waits_for_a_pipe_that_is_not_read(is_many: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")

    async def stop() -> None:
        with file_sink(tmp_path / "a.wav") as file:
            sink: Sink = OneWav(file) if is_many else file
            writing = asyncio.create_task(write(sink, WHOLE))
            await asyncio.wait([writing], timeout=0.05)
            writing.cancel()
            await writing

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stop())  # which waits for the threads that it knows


@pytest.mark.parametrize("wav", [b"", b"RIFF", WHOLE[:40]])
def test_a_wav_of_which_too_little_came_is_no_line(wav: bytes, tmp_path: Path) -> None:
    def push() -> None:
        with file_sink(tmp_path / "a.wav", keeps_whole=True) as file:
            one = OneWav(file)
            for data in (WHOLE, wav):
                one.write(data)
                one.end_file()

    with pytest.raises(SinkError, match="ends before"):
        push()
    assert samples_of(tmp_path / "a.wav") == SAMPLES


def test_speakers_that_are_gone_at_the_end_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("sounddevice")
    exec(SPEAKERS.replace("def stop(self): pass", "def stop(self): raise PortAudioError('gone')"), vars(library))
    monkeypatch.setitem(sys.modules, "sounddevice", library)
    monkeypatch.chdir(tmp_path)
    speakers = Speakers()
    speakers.write(WHOLE)
    with pytest.raises(SinkError, match="gone"):
        speakers.close()


# ------------------------------------------------------------------------------ keys


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that takes no key, and what it was asked."""
    asked: list[str] = []

    class Refusing(Silent):
        def answer(self) -> None:
            asked.append(self.path)
            self.send_error(401)

    with serving(Refusing) as url:
        yield url, asked


def test_a_key_for_this_machine_is_not_shown_to_a_proxy(tmp_path: Path) -> None:
    with listening() as (proxy, of_proxy), listening() as (here, of_here):
        url = here.replace("http://127.0.0.1", "HTTP://LOCALHOST")
        arguments = ["Hello.", "-o", "a.wav", "--endpoint", "abc", "--api-url", url]
        ended = speak(tmp_path, *arguments, RUNPOD_API_KEY="rpa_1", http_proxy=proxy, no_proxy="", NO_PROXY="")
    assert "does not take the key" in ended.err
    assert (of_proxy, of_here) == ([], ["/abc/run"])


@pytest.mark.parametrize(
    ("url", "key", "told"),
    [
        ("http://127.0.0.1.evil.example", "rpa_SECRET", "https"),
        ("https://evil.example", "rpa_SECRET\nx", "no key has"),
    ],
)
def test_a_key_goes_nowhere_where_it_is_not_safe(url: str, key: str, told: str, tmp_path: Path) -> None:
    ended = speak(tmp_path, "Hello.", "-o", "a.wav", "--endpoint", "abc", "--api-url", url, RUNPOD_API_KEY=key)
    assert ended.status == 1 and told in ended.err and "SECRET" not in ended.err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ endpoints that say what they should not

Answer = Callable[[str, str], Mapping[str, Any] | int]
"""What an operation of a job is answered: an object, or an HTTP error."""


@contextmanager
def endpoint(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Where an endpoint of any name is that takes every job (j0, j1, …), and what it was asked, beside /run."""
    asked: list[str] = []
    jobs: list[str] = []

    class Answering(Silent):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            operation, _, job_id = self.path.removeprefix("/ep/").partition("/")
            if operation == "run":
                jobs.append(f"j{len(jobs)}")
                answered: Mapping[str, Any] | int = {"id": jobs[-1]}
            else:
                asked.append(f"{operation} {job_id}")
                answered = answer(operation, job_id)
            data = b"{}" if isinstance(answered, int) else json.dumps(answered).encode()
            self.send_response(answered if isinstance(answered, int) else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

    with serving(Answering) as url:
        yield url, asked


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def piece(data: bytes, seq: int = 0, *, final: bool = False) -> dict[str, Any]:
    return {"output": {"seq": seq, "final": final, "audio": coded(data)}}


def whole(output: Any) -> Answer:
    """Of a worker that does not stream."""
    return lambda operation, _: {"status": "COMPLETED", **({"output": output} if operation == "status" else {})}


def pieces(*stream: Any) -> Answer:
    """Of a worker that streams these again and again."""
    return lambda operation, _: {"status": "IN_PROGRESS", "stream": stream} if operation == "stream" else {}


def spoken(answer: Answer, tell: Callable[[str], None] = lambda _: None) -> tuple[bytes, list[str]]:
    """What is heard of a job, and which were cancelled."""

    async def hear(url: str) -> bytes:
        async with Client(f"{url}/ep", "rpa_1", LIMITS, patience_s=5) as client:
            source = There(client, tell, patience_s=0)
            return b"".join([data async for data in source.speak({"text": "Hello."}, {})])

    with endpoint(answer) as (url, asked):
        try:
            return asyncio.run(hear(url)), cancelled(asked)
        except SpeakingError as error:
            error.add_note(str(cancelled(asked)))
            raise


def cancelled(asked: list[str]) -> list[str]:
    return [text.removeprefix("cancel ") for text in asked if text.startswith("cancel")]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (whole(["x"]), "no result"),
        (whole({"audio": "abcde"}), "damaged"),
        (whole({"audio": "UklG!!!!RgAA"}), "damaged"),
        (whole({"audio": 5}), "damaged"),
        (whole({"audio_url": 7}), "address is none"),
        (whole({"audio_url": "ftp://example.com/a"}), "address is none"),
        (pieces({"output": "text"}), "no stream"),
        (pieces({"output": 7}), "no stream"),
        (pieces("text"), "no stream"),
        (lambda _operation, _job_id: {"status": "IN_PROGRESS", "stream": 5}, "no stream"),
        (pieces({"output": {"chunks": []}}, {"output": {"chunks": "x"}}), "no stream"),
        (pieces({"output": {"audio": "x"}}), "damaged"),
        (pieces(piece(b"RIFF"), piece(b"RIFF", 3)), "piece 1 of the stream was lost"),
    ],
)
def test_an_answer_that_is_none_is_told_and_its_job_not_paid_for(answer: Answer, told: str) -> None:
    with pytest.raises(SpeakingError, match=told) as caught:
        spoken(answer)
    goes_on = answer("stream", "j0")
    assert isinstance(goes_on, dict)
    assert caught.value.__notes__ == [str(["j0"] if goes_on["status"] == "IN_PROGRESS" else [])]


@pytest.mark.parametrize("output", [{}, {"audio": None}, {"audio": ""}, {"audio": None, "audio_url": None}])
@pytest.mark.parametrize("lines", [0, 1])
def test_a_result_without_audio_is_no_success(
    output: dict[str, Any], lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_1")
    with endpoint(whole(output)) as (url, _):
        arguments = ["Hello.", "-o", "a.wav", *["--lines"] * lines, "--endpoint", "ep", "--api-url", url]
        ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 1 and "no audio" in ran.output, ran.output
    assert not list(tmp_path.iterdir())


def test_warnings_that_are_none_harm_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_1")
    for warnings in (7, [7]):
        with endpoint(whole({"audio": coded(WHOLE), "warnings": warnings})) as (url, _):
            ran = CliRunner().invoke(app, ["Hello.", "-o", "a.wav", "--endpoint", "ep", "--api-url", url])
        assert ran.exit_code == 0 and (tmp_path / "a.wav").read_bytes() == WHOLE


def test_a_job_that_nobody_takes_is_told_of_once() -> None:
    answers = iter(["IN_QUEUE", "IN_QUEUE", "IN_QUEUE", "COMPLETED"])

    def answer(operation: str, _job_id: str) -> dict[str, Any]:
        if operation == "stream":
            return {"status": next(answers), "stream": []}
        return {"status": "COMPLETED", "output": {"audio": coded(WHOLE)}}

    told: list[str] = []
    assert spoken(answer, told.append) == (WHOLE, [])
    assert len(told) == 1 and "queue" in told[0]


def speaking(cwd: Path, url: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--endpoint", "ep", "--api-url", url],
        cwd=cwd,
        env=without_ours(os.environ) | {"RUNPOD_API_KEY": "rpa_1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


@pytest.mark.parametrize(
    ("number", "status", "refusal"),
    [(signal.SIGINT, 130, 404), (signal.SIGTERM, 143, 401), (signal.SIGHUP, 129, 400)],
)
def test_a_signal_cancels_the_job_and_keeps_whole_lines(number: int, status: int, refusal: int, tmp_path: Path) -> None:
    """Whatever the platform says to that: the job may just have ended."""

    def answer(operation: str, job_id: str) -> Mapping[str, Any] | int:
        if operation == "cancel":
            return refusal
        if job_id == "j0":
            return whole({"audio": coded(WHOLE)})(operation, job_id)
        return {"status": "IN_PROGRESS", "stream": []}

    with endpoint(answer) as (url, asked):
        process = speaking(tmp_path, url, "One.\nTwo.", "--lines", "-o", "a.wav")
        wait_until(lambda: asked.count("stream j1") > 1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status and b"error" not in err and b"Traceback" not in err, err
    assert cancelled(asked) == ["j1"]
    assert samples_of(tmp_path / "a.wav") == SAMPLES
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_what_is_spoken_is_heard_at_once_and_an_interrupt_waits_for_no_listener(tmp_path: Path) -> None:
    may_go_on, num_sent = threading.Event(), 0

    def answer(operation: str, _job_id: str) -> Mapping[str, Any]:
        nonlocal num_sent
        if operation != "stream":
            return {}
        if num_sent and not may_go_on.is_set():
            return {"status": "IN_PROGRESS", "stream": []}
        num_sent += 1
        return {"status": "IN_PROGRESS", "stream": [piece(WHOLE, num_sent - 1)]}

    with endpoint(answer) as (url, asked):
        process = speaking(tmp_path, url, "Hello.", "-o", "-")
        assert process.stdout is not None
        heard = b""
        while len(heard) < len(WHOLE):
            heard += process.stdout.read(len(WHOLE) - len(heard))
        assert heard == WHOLE and num_sent == 1
        may_go_on.set()
        wait_until(lambda: num_sent >= 3)  # more than a pipe holds
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        process.stdout.close()
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()
        process.stderr.close()
    assert cancelled(asked) == ["j0"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_all_is_imported_ends_it_without_a_word(number: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time\nopen('ready', 'w')\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "Hello."],
        cwd=tmp_path,
        env=without_ours(os.environ) | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
    )
    wait_until((tmp_path / "ready").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, b"")


# ------------------------------------------------------------------------------ this machine


def test_this_machine_is_heard_before_it_has_spoken_all() -> None:
    async def hear() -> bool:
        worker = await asyncio.to_thread(Worker.load, Settings(model="draft"), local=True)
        is_over = False

        class Watched:
            async def stream(self, job: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
                nonlocal is_over
                async for made in worker.stream(job):
                    yield made
                is_over = True

        try:
            source = Here(Watched())  # type: ignore[arg-type]
            async with contextlib.aclosing(source.speak({"text": "Hello there."}, {})) as heard:  # type: ignore[type-var]
                async for data in heard:
                    if data:
                        return not is_over
        finally:
            worker.close()
        return False

    assert asyncio.run(hear())


# ------------------------------------------------------------------------------ deployed workers


@pytest.fixture(scope="module", params=["1", "0"], ids=["streaming", "plain"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    cwd = tmp_path_factory.mktemp("deployed")
    environment = without_ours(os.environ) | {"MODEL": "draft", "STREAMING": request.param}
    with Platform() as platform:
        platform.start_worker([sys.executable, str(HANDLER)], cwd=cwd, log=cwd / "log", environment=environment)
        yield platform


def at(platform: Platform) -> list[str]:
    url, _, endpoint = platform.url.rpartition("/")
    return ["--endpoint", endpoint, "--api-url", url]


def test_a_deployed_worker_of_either_kind_speaks(deployed: Platform, tmp_path: Path) -> None:
    arguments = at(deployed)
    ended = speak(tmp_path, "Hello there, this is a text.", "-o", "a.wav", *arguments, RUNPOD_API_KEY=deployed.api_key)
    assert ended.status == 0, ended.err
    assert 1.0 < seconds(tmp_path / "a.wav") < 4.0


def test_what_a_deployed_worker_refuses_is_told_with_its_code(deployed: Platform, tmp_path: Path) -> None:
    arguments = at(deployed)
    ended = speak(tmp_path, "Hello.", "-v", "Ann", "-o", "a.wav", *arguments, RUNPOD_API_KEY=deployed.api_key)
    assert ended.status == 1 and "voice_not_found" in ended.err
    assert not list(tmp_path.iterdir())


def test_lines_that_a_worker_of_either_kind_speaks_are_one_wav(deployed: Platform, tmp_path: Path) -> None:
    arguments = ["--lines", "-o", "-", "--seed", "1", *at(deployed)]
    one = speak(tmp_path, "One line.", *arguments, RUNPOD_API_KEY=deployed.api_key)
    three = speak(tmp_path, "One line.\n\nOne line.\nOne line.", *arguments, RUNPOD_API_KEY=deployed.api_key)
    assert three.status == 0 and three.out == one.out[:44] + one.out[44:] * 3, three.err
    assert one.out[40:44] == b"\xff" * 4, "a player would stop after the first"


@pytest.mark.parametrize("lines", [0, 1])
def test_an_interrupt_ends_the_job_and_leaves_a_file_of_whole_lines_only(
    lines: int, deployed: Platform, tmp_path: Path
) -> None:
    """An mp3, of which nothing tells where a line ends."""
    asked_for: list[str] = []

    def note(operation: str, job_id: str) -> None:
        if operation == "stream" and job_id not in asked_for:
            asked_for.append(job_id)

    deployed.fault = note
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *["--lines"] * lines, "-o", "a.mp3", "--seed", "1", *at(deployed)],
        cwd=tmp_path,
        env=without_ours(os.environ) | {"RUNPOD_API_KEY": deployed.api_key},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    process.stdin.write(b"One line.\n" * lines + LONG.encode() * 2 + b"\n")
    if not lines:
        process.stdin.close()
    wait_until(lambda: len(asked_for) > lines)
    job_id = asked_for[lines]
    wait_until(lambda: deployed.status(job_id)["status"] == "IN_PROGRESS")
    interrupt(process)
    assert deployed.ended(job_id)["status"] == "CANCELLED"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp3"] * lines
    if lines:
        arguments = ["One line.", "-o", "one.mp3", "--seed", "1", *at(deployed)]
        speak(tmp_path, *arguments, RUNPOD_API_KEY=deployed.api_key)
        assert (tmp_path / "a.mp3").read_bytes() == (tmp_path / "one.mp3").read_bytes()
