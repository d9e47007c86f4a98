"""Many jobs of all kinds at once, while workers die and the platform has bad moments: all end, and each as it should.

The small run is for every day; the long ones (`make soak`, SOAK_JOBS of them) look at a worker's memory too.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

import handler
from scripts.local_platform import LocalWorker
from tests.platform import LIMITS, Fault, Platform, wait_until
from tests.speaking_jobs import LONG, Alone, alone, recording, samples, sentence

HANDLER = Path(handler.__file__).resolve()
NUM_CLIENTS = 8
FORMATS = ("wav", "flac", "mp3", "opus")
VOICES: Sequence[Mapping[str, str]] = ({}, *({"reference_audio": recording(hz)} for hz in (90.0, 150.0, 210.0)))
NUM_JOBS = int(os.environ.get("SOAK_JOBS", "500"))
"""Of a long run."""
_STUBBORN_EVERY = 8
"""Of so many jobs one is not answered for longer than the SDK itself tries."""


class BadMoments:
    """What goes wrong with the platform: some posts are answered 500 or 429 again and again, some late, some never.

    Attributes:
        kinds: what went wrong, and how often.
    """

    NUM_KINDS = 6

    def __init__(self) -> None:
        self.kinds: Counter[Fault] = Counter()
        self._numbers: dict[str, int] = {}
        self._tries: Counter[str] = Counter()
        self._takes = itertools.count()

    def __call__(self, operation: str, job_id: str) -> Fault | None:
        fault = None
        if operation == "job-done":
            number = self._numbers.setdefault(job_id, len(self._numbers))
            self._tries[job_id] += 1
            fault = self._of_result(number, self._tries[job_id])
        elif operation.startswith("job-take") and next(self._takes) % 25 == 10:
            fault = Fault(status=502)
        if fault is not None:
            self.kinds[fault] += 1
        return fault

    @staticmethod
    def _of_result(number: int, num_tries: int) -> Fault | None:
        kind = number % (2 * _STUBBORN_EVERY)
        if kind in (2, 2 + _STUBBORN_EVERY) and num_tries <= 4:
            return Fault(status=500 if kind == 2 else 429)
        if num_tries == 1:
            return {4: Fault(delay_s=1.0), 6: Fault(is_cut=True), 11: Fault(status=503)}.get(kind)
        return None


def job(number: int) -> dict[str, Any]:
    """Mostly speech, every one different; errors, long jobs and some that are cancelled among it."""
    text = sentence(number)
    kinds: Mapping[int, dict[str, Any]] = {
        0: {"text": ""},
        7: {"text": text, "voice_name": "Nobody"},
        9: {"operation": "info"},
        13: {"operation": "long_form", "text": " ".join([text] * 3), "seed": number, "subtitles": "srt"},
        17: {
            "operation": "voice_clone",
            "reference_audio": recording(100.0 + number % 80),
            "text": text,
            "seed": number,
        },
        19: {"operation": "long_form", "text": LONG * 10, "output_format": "opus"},
    }
    speech = {"text": text, "seed": number, "output_format": FORMATS[number % 4], **VOICES[number // 4 % 4]}
    return kinds.get(number % 20, speech)


@dataclass
class Answers:
    """What clients asked and were told, by number; the platform's id of each."""

    ids: dict[int, str]
    told: dict[int, dict[str, Any]]


def ask_all(platform: Platform, num_jobs: int, on_answer: Callable[[int], None]) -> Answers:
    """So many jobs by several clients, half of whom wait for each result and half ask for it.

    Args:
        on_answer: is told how many are answered.
    """
    answers = Answers({}, {})
    lock = threading.Lock()

    def ask(number: int) -> None:
        fields = job(number)
        if number % 2 == 0:
            told = platform.ask("POST", "runsync?wait=300000", input=fields)
        else:
            job_id = platform.ask("POST", "run", input=fields)["id"]
            if number % 20 == 19:
                wait_until(lambda: platform.status(job_id)["status"] != "IN_QUEUE")
                platform.stop(job_id)
            told = platform.ended(job_id)
        with lock:
            answers.ids[number], answers.told[number] = told["id"], told
            num_answered = len(answers.told)
        on_answer(num_answered)

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        list(clients.map(ask, range(num_jobs)))
    return answers


def check_answers(answers: Answers, platform: Platform, by_itself: Alone, *, exact: bool) -> None:
    """Each job ended, with what this process makes of it, and no worker ever said another thing of it."""
    for number, told in sorted(answers.told.items()):
        fields = job(number)
        if number % 20 == 19:
            assert told["status"] == "CANCELLED", (number, told)
            continue
        expected = by_itself.result(fields)
        if "error" in expected:
            assert (told["status"], told["output"]["error_code"]) == ("FAILED", expected["error_code"]), (number, told)
            continue
        assert told["status"] == "COMPLETED", (number, told)
        for answer in platform.answers[answers.ids[number]]:
            assert "audio" in answer["output"] or fields["operation"] == "info", (number, answer.keys())
            if "audio" in answer["output"]:
                check_audio(answer["output"], expected, number, exact=exact)


def check_audio(output: Mapping[str, Any], expected: Mapping[str, Any], number: int, *, exact: bool) -> None:
    """The right words, and the right samples; other rows in a model's batch may change their last bits."""
    assert [chunk["text"] for chunk in output["chunks"]] == [chunk["text"] for chunk in expected["chunks"]], number
    ours, alone_ = samples(output), samples(expected)
    assert ours.shape == alone_.shape, number
    assert np.abs(ours.astype(int) - alone_).max() <= (0 if exact else 600), number


def rss_mb(place: LocalWorker) -> float:
    return float(psutil.Process(place.process.pid).memory_info().rss) / 1e6


@dataclass
class Run:
    """One soak: two places for workers, the first of which dies now and then.

    Args:
        folder: for logs, temporary files and what long jobs keep.
        settings: the workers'.
        num_jobs: how many.
        dies_at: from how many answered jobs on, as soon as it has one.
    """

    folder: Path
    settings: Mapping[str, str]
    num_jobs: int
    dies_at: Sequence[int]
    weights_mb: dict[int, float] = field(default_factory=dict)
    """Memory of the worker that lives, by how many jobs were answered."""

    def ask(self) -> tuple[Answers, Platform]:
        """Everything."""
        limits = replace(LIMITS, rates={}, max_losses=100, kept_sync_s=1800.0)
        with Platform(limits) as platform, ExitStack() as stack:
            dies, lives = [stack.enter_context(self._place(platform, name)) for name in ("dies", "lives")]
            wait_until(lambda: platform.ask("GET", "health")["workers"]["ready"] == 2)
            platform.fault = bad = BadMoments()

            left, lock = sorted(self.dies_at), threading.Lock()

            def note(num_answered: int) -> None:
                self.weights_mb[num_answered] = rss_mb(lives)
                with lock:
                    if left and num_answered >= left[0] and platform.has_jobs(dies):
                        del left[0]
                        dies.kill()

            answers = ask_all(platform, self.num_jobs, note)
            assert not left, "it has not died"
            assert len(bad.kinds) == BadMoments.NUM_KINDS, bad.kinds
            wait_until(lambda: platform.ask("GET", "health")["jobs"]["inProgress"] == 0)
        return answers, platform

    def peaks_mb(self) -> tuple[float, float]:
        """Most memory in the middle of the run, when the worker has seen all kinds of jobs, and in its last third."""
        third = self.num_jobs // 3
        middle, end = [
            max(mb for num_answered, mb in self.weights_mb.items() if start < num_answered <= start + third)
            for start in (third, 2 * third)
        ]
        return middle, end

    def _place(self, platform: Platform, name: str) -> Any:
        folder = self.folder / name
        (folder / "tmp").mkdir(parents=True)
        own = {"TMPDIR": str(folder / "tmp"), "WORK_DIR": str(folder / "work")}
        return platform.place(HANDLER, folder, {"MAX_CONCURRENCY": "4", **self.settings, **own})

    def check_folder(self) -> None:
        """A worker that ended as it should leaves nothing that is not kept on purpose."""
        lived = self.folder / "lives"
        assert list((lived / "tmp").iterdir()) == []
        left = [path for path in (lived / "work").rglob("*") if "tmp" in path.relative_to(lived / "work").parts]
        assert [path for path in left if path.is_file()] == []


@pytest.fixture(scope="module")
def by_itself() -> Iterator[Alone]:
    with alone() as worker:
        yield worker


def soak(run: Run, caplog: pytest.LogCaptureFixture) -> tuple[Answers, Platform]:
    """Everything is answered, and by whoever had the job, unless that one died."""
    answers, platform = run.ask()
    assert sorted(answers.told) == list(range(run.num_jobs))
    assert "goes back into the queue" in caplog.text and "is gone" in caplog.text
    assert "dropped it" not in caplog.text
    run.check_folder()
    return answers, platform


def test_jobs_of_all_kinds_end_as_they_should_while_a_worker_dies_and_the_platform_fails(
    by_itself: Alone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers, platform = soak(Run(tmp_path, {"MODEL": "draft"}, num_jobs=30, dies_at=[9]), caplog)
    check_answers(answers, platform, by_itself, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["draft", "turbo"])
def test_hundreds_of_jobs_end_as_they_should_and_leave_the_memory_flat(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"model": model} if model == "draft" else {**tiny_turbo(tmp_path), "device": "cpu"}
    variables = {name.upper(): str(value) for name, value in settings.items()}
    run = Run(tmp_path, variables, NUM_JOBS, dies_at=[NUM_JOBS // 8, NUM_JOBS // 3, NUM_JOBS // 2])
    started_s = time.monotonic()
    answers, platform = soak(run, caplog)
    seconds, (middle_mb, end_mb) = time.monotonic() - started_s, run.peaks_mb()
    print(f"{model}: {NUM_JOBS} jobs in {seconds:.0f} s, {middle_mb:.0f} MB in the middle, {end_mb:.0f} MB at the end")
    with alone(**settings) as by_itself:
        check_answers(answers, platform, by_itself, exact=model == "draft")
    assert end_mb < 1.2 * middle_mb + 100


def tiny_turbo(folder: Path) -> dict[str, Any]:
    """Settings of a model that says the same of every text, in whatever voice it is asked for."""
    from engine.random_checkpoint import PlantedSpeech, write_checkpoint

    plan = PlantedSpeech(tokens=tuple(range(100, 140)))
    return {"model": "turbo", "model_dir": write_checkpoint(folder / "weights", "turbo", plan=plan)}
