"""scripts/submit_batch.py stopped by a person at a terminal or by a signal, and who is told of its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from scripts.local_platform.web import operation_of
from tests.scripts.batches import ROOT, at, command, environment, on, results, run, start, texts, write_rows
from tests.scripts.fleet import Fleet, fleet_of, spoken
from tests.scripts.serving import Silent, serving

CTRL_C, CTRL_D = "\x03", "\x04"
CURSOR_ON, CURSOR_OFF = "\x1b[?25h", "\x1b[?25l"
QUESTION = "Cancel the jobs that the platform has?"
NUM_JOBS = 3

_PATIENCE_S = 60.0
_AT_HOME = 'exec "$@" <"$0" >"$0" 2>&1'
"""In a shell: the first terminal that a session's leader opens becomes its own, whose Ctrl-C is a signal to it."""


class Terminal:
    """A pseudo-terminal with the program in it. `with Terminal(…) as terminal`; killed at the end of the block.

    Args:
        fleet: that it sends to.
        arguments: of the program.
        shell: how it is run, with the terminal's name as $0.

    Attributes:
        process: the shell, which becomes the program.
        shown: what was printed until now.
    """

    def __init__(self, fleet: Fleet, *arguments: object, shell: str = _AT_HOME) -> None:
        self.shown = ""
        self._ours, self._theirs = pty.openpty()
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", shell, os.ttyname(self._theirs), *command(*at(fleet, *arguments))],
            cwd=ROOT,
            env=environment(RUNPOD_API_KEY=fleet.api_key, TERM="xterm"),
            start_new_session=True,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, words: str, count: int = 1) -> None:
        """Until it was printed so often."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while self.shown.count(words) < count:
            assert time.monotonic() < deadline_s and self.process.poll() is None, self.shown
            self._read()

    def end(self) -> int:
        """The exit code."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, self.shown
            self._read()
        self._read()
        return self.process.returncode

    def _read(self) -> None:
        while select.select([self._ours], [], [], 0.05)[0]:
            self.shown += os.read(self._ours, 65_536).decode(errors="replace")


class Unwilling(Fleet):
    """A fleet whose platform does not do something.

    Args:
        operation: that it does not do.

    Attributes:
        was_asked: to do it.
        may_refuse: until it is set there is no answer.
    """

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.was_asked, self.may_refuse = threading.Event(), threading.Event()
        self._operation = operation

    @web.middleware
    async def _watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if operation_of(request) != self._operation:
            return await super()._watch(request, handler)
        self.was_asked.set()
        while not self.may_refuse.is_set():
            await asyncio.sleep(0.01)
        return web.json_response({"error": "no"}, status=403)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.csv", texts(5))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def waiting(fleet: Fleet) -> int:
    """How many jobs the platform has."""
    return int(fleet._call(fleet._endpoint.health)["jobs"]["inQueue"])


def wait_until_sent(fleet: Fleet) -> None:
    fleet.wait_until(lambda: waiting(fleet) == NUM_JOBS)


@contextlib.contextmanager
def asked(fleet: Fleet, source: Path, out: Path, *arguments: object) -> Iterator[Terminal]:
    """A person has pressed Ctrl-C while jobs wait at the platform, and is asked."""
    with Terminal(fleet, source, "--out", out, "--in-flight", NUM_JOBS, *arguments) as terminal:
        wait_until_sent(fleet)
        terminal.type(CTRL_C)
        terminal.wait_for(QUESTION)
        yield terminal


@contextlib.contextmanager
def started(fleet: Fleet, *arguments: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program without a terminal; killed at the end of the block."""
    client = start(fleet, *arguments, log=log)
    try:
        yield client
    finally:
        client.kill()
        client.wait()


def check_left(out: Path) -> None:
    """A run that ended in order: what is not done is told to be open."""
    rows = results(out)
    assert len(rows) == 5 and {row["state"] for row in rows.values()} == {"open"}


# ------------------------------------------------------------------------------------------- at a terminal


def test_a_person_who_says_yes_has_what_waits_cancelled(source: Path, out: Path) -> None:
    with Fleet() as fleet, asked(fleet, source, out) as terminal:
        terminal.type("y\n")
        assert terminal.end() == 130
        assert waiting(fleet) == 0 and fleet.requests["cancel"] == NUM_JOBS
        assert f"{NUM_JOBS} jobs cancelled" in terminal.shown and "Traceback" not in terminal.shown
        check_left(out)


def test_a_person_who_says_no_has_it_left_and_is_asked_until_that_is_clear(source: Path, out: Path) -> None:
    with Fleet() as fleet, asked(fleet, source, out) as terminal:
        terminal.type("what?\n")
        terminal.wait_for(QUESTION, 2)
        terminal.type("n\n")
        assert terminal.end() == 130
        assert waiting(fleet) == NUM_JOBS and not fleet.requests["cancel"]
        check_left(out)
        fleet.work()
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(fleet.asked) == 5, "those that were left were collected"


@pytest.mark.parametrize("keys", [CTRL_D, CTRL_C], ids=["ctrl-d", "ctrl-c"])
def test_a_person_who_gives_no_answer_has_it_left(source: Path, out: Path, keys: str) -> None:
    with Fleet() as fleet, asked(fleet, source, out) as terminal:
        terminal.type(keys)
        assert terminal.end() == 130
        assert waiting(fleet) == NUM_JOBS and not fleet.requests["cancel"]
        assert "Traceback" not in terminal.shown and "interrupted; the same command goes on" in terminal.shown
        check_left(out)


def test_ctrl_c_while_jobs_are_being_cancelled_ends_at_once(source: Path, out: Path) -> None:
    fleet = Unwilling("cancel")
    with fleet, asked(fleet, source, out) as terminal:
        terminal.type("y\n")
        assert fleet.was_asked.wait(_PATIENCE_S)
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown and waiting(fleet) == NUM_JOBS


def test_ctrl_c_while_a_run_is_being_stopped_ends_at_once_and_leaves_the_terminal_as_it_was(
    source: Path, out: Path
) -> None:
    fleet = Unwilling("run")
    with fleet, Terminal(fleet, source, "--out", out) as terminal:
        assert fleet.was_asked.wait(_PATIENCE_S)
        terminal.type(CTRL_C)
        terminal.wait_for("stopping")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert QUESTION not in terminal.shown and "Traceback" not in terminal.shown
        assert terminal.shown.rindex(CURSOR_ON) > terminal.shown.rindex(CURSOR_OFF)


def test_jobs_that_cannot_be_cancelled_are_told_and_the_results_written(source: Path, out: Path) -> None:
    fleet = Unwilling("cancel")
    fleet.may_refuse.set()
    with fleet, asked(fleet, source, out) as terminal:
        terminal.type("y\n")
        assert terminal.end() == 130
        assert "not all jobs could be cancelled" in terminal.shown and "Traceback" not in terminal.shown
        check_left(out)


def test_a_signal_to_end_asks_nothing_even_at_a_terminal(source: Path, out: Path) -> None:
    with Fleet() as fleet, Terminal(fleet, source, "--out", out, "--in-flight", NUM_JOBS) as terminal:
        wait_until_sent(fleet)
        terminal.process.terminate()
        assert terminal.end() == 130
        assert QUESTION not in terminal.shown and "Traceback" not in terminal.shown
        assert waiting(fleet) == NUM_JOBS
        check_left(out)


def test_nobody_is_asked_who_does_not_see_the_question(source: Path, out: Path) -> None:
    arguments, shell = (source, "--out", out, "--in-flight", NUM_JOBS), 'exec "$@" <"$0" >"$0" 2>/dev/null'
    with Fleet() as fleet, Terminal(fleet, *arguments, shell=shell) as terminal:
        wait_until_sent(fleet)
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert waiting(fleet) == NUM_JOBS


def test_nobody_is_asked_in_the_background_where_reading_would_stop_the_run(source: Path, out: Path) -> None:
    arguments = (source, "--out", out, "--in-flight", NUM_JOBS)
    shell = 'exec <"$0" >"$0" 2>&1; set -m; "$@" & echo "<$!>"; wait "$!"'
    with Fleet() as fleet, Terminal(fleet, *arguments, shell=shell) as terminal:
        terminal.wait_for(">")
        group = int(terminal.shown.partition("<")[2].partition(">")[0])
        try:
            wait_until_sent(fleet)
            os.kill(group, signal.SIGINT)
            assert terminal.end() == 130
        except BaseException:
            os.killpg(group, signal.SIGKILL)
            raise
        assert QUESTION not in terminal.shown and waiting(fleet) == NUM_JOBS
        check_left(out)


# ------------------------------------------------------------------------------------------- without one


@pytest.mark.parametrize(
    ("number", "wish", "num_left"), [(signal.SIGINT, "ask", NUM_JOBS), (signal.SIGTERM, "cancel", 0)]
)
def test_a_signal_without_a_terminal_does_what_the_command_says(
    tmp_path: Path, source: Path, out: Path, number: int, wish: str, num_left: int
) -> None:
    log = tmp_path / "log"
    arguments = (source, "--out", out, "--in-flight", NUM_JOBS, "--on-interrupt", wish)
    with Fleet() as fleet, started(fleet, *arguments, log=log) as client:
        wait_until_sent(fleet)
        client.send_signal(number)
        assert client.wait(_PATIENCE_S) == 130
        assert waiting(fleet) == num_left
        assert QUESTION not in log.read_text() and "Traceback" not in log.read_text()
        check_left(out)


def test_a_run_that_asks_for_voices_can_be_interrupted(tmp_path: Path, out: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", [{"key": "a", "text": "Hello.", "voice_name": "Anna"}])
    log = tmp_path / "log"
    with Fleet() as fleet, started(fleet, source, "--out", out, "--check-voices", log=log) as client:
        fleet.wait_until(lambda: fleet.requests["status"] > 0)
        client.send_signal(signal.SIGINT)
        assert client.wait(_PATIENCE_S) == 130
        assert "Traceback" not in log.read_text() and "exception" not in log.read_text().lower()


def test_what_fails_while_a_run_is_being_stopped_is_not_told(tmp_path: Path, source: Path, out: Path) -> None:
    log, fleet = tmp_path / "log", Unwilling("run")
    with fleet, started(fleet, source, "--out", out, log=log) as client:
        assert fleet.was_asked.wait(_PATIENCE_S)
        client.send_signal(signal.SIGTERM)
        fleet.wait_until(lambda: "stopping" in log.read_text())
        fleet.may_refuse.set()
        assert client.wait(_PATIENCE_S) == 130
        assert "Traceback" not in log.read_text() and "exception" not in log.read_text().lower()
        check_left(out)


# ------------------------------------------------------------------------------------------- webhooks


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address, and what came to it."""
    told: list[dict[str, Any]] = []

    class Told(Silent):
        def answer(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    with serving(Told) as url:
        yield f"{url}/told?of=me", told


def speak_or_fail(fields: dict[str, Any]) -> dict[str, Any]:
    if "number 3" in fields["text"]:
        return {"error": "cannot be said", "error_code": "invalid_request"}
    return spoken(fields)


def test_a_webhook_is_told_the_end_of_each_job_once(source: Path, out: Path) -> None:
    with webhook() as (url, told), fleet_of() as fleet:
        fleet.answer = speak_or_fail
        assert on(fleet, source, "--out", out, "--webhook", url).returncode == 1
        fleet.wait_until(lambda: len(told) >= 5)
        done = {row["job_id"] for row in results(out).values() if row["state"] == "done"}
        assert len(done) == 4 and done == {end["id"] for end in told if end["status"] == "COMPLETED"}
        assert [end["status"] for end in told].count("FAILED") == 1
        assert on(fleet, source, "--out", out, "--webhook", url).returncode == 1, "the next run has nothing to do"
    assert len(told) == 5


def test_results_are_the_same_where_the_webhook_is_down(source: Path, out: Path, tmp_path: Path) -> None:
    with webhook() as (url, _):
        """Now it is down."""
    lines = []
    for folder, arguments in ((out, ()), (tmp_path / "other", ("--webhook", url))):
        with fleet_of() as fleet:
            fleet.answer = speak_or_fail
            assert on(fleet, source, "--out", folder, *arguments).returncode == 1
        rows = results(folder).values()
        lines.append([{name: row[name] for name in ("key", "state", "file", "error", "attempts")} for row in rows])
        assert sum(row["state"] == "done" for row in rows) == 4
    assert lines[0] == lines[1]


@pytest.mark.parametrize("url", ["ftp://example.com/", "example.com/told", "https://", "", "https://[::1"])
def test_a_webhook_that_is_no_address_is_refused_before_anything_is_sent(source: Path, out: Path, url: str) -> None:
    with fleet_of() as fleet:
        done = run(*at(fleet, source, "--out", out, "--webhook", url), RUNPOD_API_KEY=fleet.api_key)
        assert done.returncode == 2 and "--webhook: expected an address" in done.stderr
        assert not fleet.requests["run"] and not out.exists()
