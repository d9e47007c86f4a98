"""`scripts/speak.py` as a person runs it: this machine and deployed workers speak, into files, pipes and speakers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from tests.platform import Platform, wait_until, without_ours

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


def test_a_listener_who_has_heard_enough_ends_it_without_a_word(tmp_path: Path) -> None:
    command = f"{sys.executable} {SCRIPT} -f long.txt -o - | head -c 100 | wc -c"
    (tmp_path / "long.txt").write_text(LONG)
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


def test_an_interrupt_ends_the_job_and_leaves_no_file(deployed: Platform, tmp_path: Path) -> None:
    arguments = at(deployed)
    (tmp_path / "long.txt").write_text(LONG * 2)
    asked_for: list[str] = []

    def note(operation: str, job_id: str) -> None:
        if operation == "stream":
            asked_for.append(job_id)

    deployed.fault = note
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "-f", "long.txt", "-o", "a.wav", *arguments],
        cwd=tmp_path,
        env=without_ours(os.environ) | {"RUNPOD_API_KEY": deployed.api_key},
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: len(asked_for) > 0)
    job_id = asked_for[0]
    wait_until(lambda: deployed.status(job_id)["status"] == "IN_PROGRESS")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err
    assert deployed.ended(job_id)["status"] == "CANCELLED"
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
