"""scripts/submit_batch.py as a person runs it: against a fleet that fails in every way, and with workers of its own."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import soundfile
import typer
from typer.testing import CliRunner

from scripts.batch import files
from scripts.batch.manifest import Manifest
from scripts.submit_batch import main
from tests.platform import without_ours
from tests.scripts.books import write_epub
from tests.scripts.fleet import LIMITS, Fleet, fleet_of, spoken

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "batch.csv"

APP = typer.Typer()
APP.command()(main)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "scripts/submit_batch.py", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return without_ours(os.environ) | {"COLUMNS": "160"} | more


@dataclass(frozen=True)
class Done:
    """What came of it."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, **more: str) -> Done:
    """The program, to its end; in this process, since its start takes longer than all the rest."""
    ours = environment(**more)
    removed: dict[str, str | None] = dict.fromkeys(os.environ.keys() - ours.keys())
    result = CliRunner().invoke(APP, [*map(str, arguments)], env=removed | ours)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def run_apart(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """The program as a person runs it."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def at(fleet: Fleet, *arguments: object) -> tuple[object, ...]:
    """What makes it run at a fleet, without questions about voices."""
    where = fleet.url.removesuffix("/local")
    return ("--api-url", where, "--endpoint", "local", "--no-check-voices", *arguments)


def on(fleet: Fleet, *arguments: object) -> Done:
    return run(*at(fleet, *arguments), RUNPOD_API_KEY=fleet.api_key)


def start(fleet: Fleet, *arguments: object, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command(*at(fleet, *arguments)),
            cwd=ROOT,
            env=environment(RUNPOD_API_KEY=fleet.api_key),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))))
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(count: int) -> list[dict[str, Any]]:
    return [{"key": f"row-{number}", "text": f"This is sentence number {number}."} for number in range(count)]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line for line in lines}


def audio_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".wav", ".mp3", ".flac", ".opus", ".part")}


def audio_of(folder: Path, key: str) -> bytes:
    return (folder / results(folder)[key]["file"]).read_bytes()


# ------------------------------------------------------------------------------------------- with real workers


def test_the_example_becomes_audio_files_on_this_machine(tmp_path: Path) -> None:
    done = run_apart(EXAMPLE, "--local", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = results(tmp_path)
    with EXAMPLE.open(encoding="utf-8") as file:
        assert list(rows) == [row["key"] for row in csv.DictReader(file)]
    for row in rows.values():
        assert row["state"] == "done" and row["attempts"] == 1 and row["model"] == "draft", row
        assert soundfile.info(tmp_path / row["file"]).duration == pytest.approx(row["duration_s"], abs=0.1)
    assert (tmp_path / "story.srt").read_text(encoding="utf-8").startswith("1\n00:00:00,000 --> ")
    assert "8 of 8 rows done" in done.stderr


def test_a_book_becomes_one_file_with_chapters_and_subtitles_that_fit(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    sentence = "The old ferry crossed the bay at noon. "
    chapters = [("One & Only", sentence * 2), ("The Second", sentence * 28), ("The Third", sentence)]
    book = write_epub(tmp_path / "harbour.epub", "Harbour Lights", chapters)
    out = tmp_path / "out"
    done = run_apart(book, "--local", 1, "--out", out, "--part-chars", 1000, "--set", "subtitles=srt")
    assert done.returncode == 0, done.stderr
    row = results(out)["harbour"]
    assert row["file"] == "harbour.m4b" and len(row["parts"]) == 4, "the second is longer than a part"
    with av.open(str(out / "harbour.m4b")) as container:
        marks = container.chapters()
        seconds = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
        assert container.metadata["title"] == "Harbour Lights"
    assert [mark["metadata"]["title"] for mark in marks] == [title for title, _ in chapters]
    starts = [float(mark["start"] * mark["time_base"]) for mark in marks]
    durations = [part["duration_s"] for part in row["parts"]]
    assert starts == pytest.approx([0.0, durations[0], sum(durations[:3])], abs=0.1)
    assert seconds == pytest.approx(sum(durations), abs=0.2)
    cues = (out / "harbour.srt").read_text(encoding="utf-8").strip().split("\n\n")
    assert [int(cue.split("\n")[0]) for cue in cues] == list(range(1, len(cues) + 1))
    last_s = [int(part) for part in cues[-1].split("\n")[1].split(" --> ")[1].replace(",", ":").split(":")]
    end_s = last_s[0] * 3600 + last_s[1] * 60 + last_s[2] + last_s[3] / 1000
    assert starts[-1] < end_s <= seconds + 0.1
    listed = [line for line in (out / "harbour.m3u8").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(listed) == 4 and all((out / each).is_file() for each in listed)


def test_workers_that_stream_are_understood(tmp_path: Path) -> None:
    rows = [*texts(1), {"key": "other", "text": "Another one.", "output_format": "mp3"}]
    source = write_rows(tmp_path / "rows.csv", rows)
    done = run_apart(source, "--local", 1, "--out", tmp_path / "out", STREAMING="1")
    assert done.returncode == 0, done.stderr
    assert {row["file"] for row in results(tmp_path / "out").values()} == {"row-0.wav", "other.mp3"}
    for row in results(tmp_path / "out").values():
        file = tmp_path / "out" / row["file"]
        assert soundfile.info(file).duration == pytest.approx(row["duration_s"], abs=0.1)
    header = (tmp_path / "out" / "row-0.wav").read_bytes()
    assert int.from_bytes(header[4:8], "little") == len(header) - 8, "its size is said"


# ------------------------------------------------------------------------------------------- a fleet that fails


def run_with_kills(tmp_path: Path, num_rows: int, num_kills: int, seed: int, timeout_s: float) -> None:
    """Every row is done exactly once, whatever is killed and lost on the way."""
    draw = random.Random(seed)
    source, out, log = write_rows(tmp_path / "rows.csv", texts(num_rows)), tmp_path / "out", tmp_path / "log"
    with Fleet(LIMITS, seed) as fleet:
        fleet.lost_share = 0.01
        fleet.work(4, failing=0.05, dying=0.02)
        for marker in sorted(draw.sample(range(1, int(num_rows * 0.9)), num_kills)):
            client = start(fleet, source, "--out", out, "--json", "--attempts", 9, log=log)
            while len(fleet.made) < marker and client.poll() is None:
                threading.Event().wait(0.005)
            threading.Event().wait(draw.random() * 0.1)
            assert client.poll() is None, "it ended before it could be killed"
            client.kill()
            client.wait()
        last = start(fleet, source, "--out", out, "--json", "--attempts", 9, log=log)
        assert last.wait(timeout_s) == 0, log.read_text()[-3000:]
        assert fleet.num_refused == 0, "a rate limit was exceeded"
        assert len(fleet.made) == num_rows and set(fleet.made.values()) == {1}, "something was made twice"
    rows = results(out)
    assert len(rows) == num_rows and all(row["state"] == "done" for row in rows.values())
    for number in range(num_rows):
        assert (out / rows[f"row-{number}"]["file"]).read_bytes() == f"None: This is sentence number {number}.".encode()
    assert len(audio_files(out)) == num_rows, "nothing is left over"


def test_every_row_is_done_once_while_clients_and_workers_are_killed(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 250, 3, seed=1, timeout_s=60)


@pytest.mark.slow
def test_thousands_of_rows_are_done_once_while_clients_and_workers_are_killed(tmp_path: Path) -> None:
    run_with_kills(tmp_path, 5_000, 10, seed=2, timeout_s=600)


def test_a_second_run_does_nothing_and_touches_nothing(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", texts(3))
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", tmp_path / "out").returncode == 0
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.wav")}
        again = on(fleet, source, "--out", tmp_path / "out")
        assert again.returncode == 0 and "3 of 3 jobs are done already" in again.stderr
        assert len(fleet.asked) == 3
        assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_file_that_is_gone_or_cut_short_is_fetched_again(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(3)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        (out / "row-0.wav").unlink()
        (out / "row-1.wav").write_bytes(b"None: This")
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(fleet.asked) == 5 and set(fleet.made.values()) == {1}
    assert audio_of(out, "row-1") == b"None: This is sentence number 1."


def test_two_runs_in_one_folder_do_not_work_at_once(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out"
    with fleet_of() as fleet:
        out.mkdir()
        with Manifest(out):
            second = on(fleet, source, "--out", out)
        assert second.returncode == 2 and "another run is at work in this folder" in second.stderr
        assert not fleet.asked


def test_a_job_that_the_platform_has_forgotten_is_sent_again_under_the_same_key(tmp_path: Path) -> None:
    source, out, log = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out", tmp_path / "log"
    with Fleet() as fleet:
        client = start(fleet, source, "--out", out, "--json", log=log)
        fleet.wait_until(lambda: log.read_text().count('"sent"') == 2)
        client.kill()
        client.wait()
        fleet._call(fleet._endpoint._jobs.clear)
        fleet.work()
        assert on(fleet, source, "--out", out).returncode == 0
        assert set(fleet.made.values()) == {1} and len(fleet.made) == 2
    assert all(row["attempts"] == 2 for row in results(out).values())


def test_failures_that_may_pass_are_tried_again_and_others_are_not(tmp_path: Path) -> None:
    rows = [
        {"key": "passing", "text": "Say this."},
        {"key": "useless", "text": "Say that."},
        {"key": "stubborn", "text": "Say on."},
    ]
    tries: list[str] = []

    def answer(fields: dict[str, Any]) -> dict[str, Any]:
        tries.append(fields["text"])
        if fields["text"] == "Say that.":
            return {"error": "no such voice", "error_code": "voice_not_found"}
        if fields["text"] == "Say on." or tries.count("Say this.") == 1:
            return {"error": "the card is full", "error_code": "out_of_memory"}
        return spoken(fields)

    source, out = write_rows(tmp_path / "rows.csv", rows), tmp_path / "out"
    with fleet_of() as fleet:
        fleet.answer = answer
        done = on(fleet, source, "--out", out, "--attempts", 2, "--in-flight", 1)
        assert done.returncode == 1 and "failed: useless: voice_not_found: no such voice" in done.stderr
        found = results(out)
        assert {key: (row["state"], row["attempts"]) for key, row in found.items()} == {
            "passing": ("done", 2),
            "useless": ("failed", 1),
            "stubborn": ("failed", 2),
        }
        assert found["stubborn"]["error_code"] == "out_of_memory"
        assert on(fleet, source, "--out", out).returncode == 1 and len(tries) == 5, "what failed has failed"
        fleet.answer = spoken
        only = on(fleet, source, "--out", out, "--retry-failed", "--only", "stub*")
        assert only.returncode == 0, "what was asked for is done"
        assert "1 of 1 rows done" in only.stderr
        assert {key: row["state"] for key, row in results(out).items()} == {
            "passing": "done",
            "useless": "failed",
            "stubborn": "done",
        }
        assert on(fleet, source, "--out", out, "--retry-failed").returncode == 0


def test_a_job_that_ends_without_a_result_is_tried_again(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(1)), tmp_path / "out"
    answers: Iterator[dict[str, Any]] = iter([{}, {"duration_s": 1.0}])
    with fleet_of() as fleet:
        fleet.answer = lambda fields: next(answers, None) or spoken(fields)
        fleet._kept = _Forgetful()
        done = on(fleet, source, "--out", out)
        assert done.returncode == 0, done.stderr
    assert audio_of(out, "row-0") == b"None: This is sentence number 0."


class _Forgetful(dict[str, Any]):
    """A store that keeps nothing."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass


# ------------------------------------------------------------------------------------------- interrupts


def interrupted(fleet: Fleet, source: Path, out: Path, log: Path, *arguments: object) -> int:
    """Ctrl-C while three jobs wait at the platform; the exit code."""
    client = start(fleet, source, "--out", out, "--json", "--in-flight", 3, *arguments, log=log)
    fleet.wait_until(lambda: log.read_text().count('"sent"') == 3)
    client.send_signal(signal.SIGINT)
    return client.wait(30)


def test_an_interrupted_run_leaves_its_jobs_for_the_next_to_collect(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(5)), tmp_path / "out"
    with Fleet() as fleet:
        assert interrupted(fleet, source, out, tmp_path / "log") == 130
        assert {row["state"] for row in results(out).values()} == {"open"}
        fleet.work()
        fleet.wait_for_jobs(3)
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(fleet.asked) == 5, "those three were not sent again"


def test_an_interrupted_run_cancels_its_jobs_if_it_is_told_to(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(5)), tmp_path / "out"
    with Fleet() as fleet:
        assert interrupted(fleet, source, out, tmp_path / "log", "--on-interrupt", "cancel") == 130
        assert fleet.requests["cancel"] == 3 and fleet._call(fleet._endpoint.health)["jobs"]["inQueue"] == 0
        fleet.work()
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(fleet.asked) == 5 and set(fleet.made.values()) == {1}


# ------------------------------------------------------------------------------------------- rows


def test_bad_rows_are_told_with_their_place_before_anything_is_sent(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    lines = [
        "key,text,temperature,seed",
        "good,Hello there.,,7",
        "empty,,,",
        "silent,…,,",
        'hot,"Two\nlines.",hot,',
        "good,Again.,,",
        "markup,Hello [giggle].,,",
        "many,Hello,there,1,2",
        "half,Hello.,,1.5",
    ]
    source.write_bytes("\n".join(lines).encode() + b"\nlatin,caf\xe9,,\n")
    with fleet_of() as fleet:
        done = on(fleet, source, "--out", tmp_path / "out")
        assert done.returncode == 2 and not fleet.asked and not (tmp_path / "out").exists()
        *told, last = done.stderr.strip().splitlines()
        for line, words in {
            3: "text: expected text, it is missing",
            4: "nothing in it that could be said",
            5: "temperature: expected a number",
            7: f"the key 'good' is that of {source}:2 too",
            8: "unknown markup '[giggle]'",
            9: "5 cells, and 4 columns have names",
            10: "seed: expected an integer",
            11: "byte 0xe9 at column 10 is not utf-8",
        }.items():
            assert any(each.startswith(f"{source}:{line}: ") and words in each for each in told), (line, told)
        assert last.startswith("error: ") and "nothing was sent" in last
        assert on(fleet, source, "--out", tmp_path / "out", "--skip-bad").returncode == 1
        assert [fields["text"] for fields in fleet.asked] == ["Hello there."]
        assert fleet.asked[0]["seed"] == 7


def test_columns_and_defaults_become_fields_of_the_schemas_types(tmp_path: Path) -> None:
    rows = [
        {"Sentence": "Hello.", "Speaker": "Anna", "Note": "x", "temp": "0.5"},
        {"Sentence": "Hi.", "Speaker": "", "Note": "", "temp": ""},
    ]
    source = write_rows(tmp_path / "rows.csv", rows)
    maps = ("--map", "text=Sentence", "--map", "voice_name=Speaker", "--map", "temperature=temp")
    with fleet_of() as fleet:
        unknown = on(fleet, source, *maps, "--out", tmp_path / "out")
        assert unknown.returncode == 2 and "--ignore 'Note'" in unknown.stderr
        sets = ("--set", "seed=7", "--set", "voice_name=Ben", "--set", 'pronunciations={"SQL": "sequel"}')
        done = on(fleet, source, *maps, *sets, "--ignore", "N*", "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        asked = sorted(fleet.asked, key=lambda fields: str(fields["voice_name"]))
        assert [(each["text"], each["voice_name"], each["seed"]) for each in asked] == [
            ("Hello.", "Anna", 7),
            ("Hi.", "Ben", 7),
        ]
        assert asked[0]["temperature"] == 0.5 and "temperature" not in asked[1]
        assert asked[0]["pronunciations"] == {"SQL": "sequel"}
        wrong = on(fleet, source, "--set", "output_fromat=mp3")
        assert wrong.returncode == 2 and "did you mean output_format?" in wrong.stderr


def test_voices_that_the_endpoint_does_not_have_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    rows = [{"text": "Hello.", "voice_name": name} for name in ("anna", "Bern", "voice-3")]
    source = write_rows(tmp_path / "rows.csv", rows)
    library = [{"voice_id": f"voice-{n}", "name": name} for n, name in enumerate(("Anna", "Ben", "Cleo"), 1)]

    def answer(fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("operation") != "list_voices":
            return spoken(fields)
        page = library[fields["offset"] : fields["offset"] + 2]
        return {"voices": page, "total": len(library)}

    with fleet_of() as fleet:
        fleet.answer = answer
        told = on(fleet, source, "--out", tmp_path / "out", "--check-voices")
        assert told.returncode == 2 and "there is no voice 'Bern'; did you mean Ben?" in told.stderr
        assert f"{source}:3" in told.stderr and f"{source}:2" not in told.stderr and f"{source}:4" not in told.stderr
        assert {fields.get("operation") for fields in fleet.asked} == {"list_voices"}


def test_voices_of_rows_that_are_done_are_not_looked_for_again(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", [{"text": "Hello.", "voice_name": "Anna"}]), tmp_path / "out"

    def answer(fields: dict[str, Any]) -> dict[str, Any]:
        is_question = fields.get("operation") == "list_voices"
        return {"voices": [{"voice_id": "1", "name": "Anna"}], "total": 1} if is_question else spoken(fields)

    with fleet_of() as fleet:
        fleet.answer = answer
        assert on(fleet, source, "--out", out, "--check-voices").returncode == 0
        assert on(fleet, source, "--out", out, "--check-voices").returncode == 0
        assert len(fleet.asked) == 2


def test_a_row_of_which_nothing_changed_is_its_own_wherever_it_stands(tmp_path: Path) -> None:
    source, out = tmp_path / "rows.csv", tmp_path / "out"
    write_rows(source, [{"text": "One."}, {"text": "Two."}, {"text": "Two."}])
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(fleet.asked) == 3
        before = results(out)
        write_rows(source, [{"text": "Zero."}, {"text": "One."}, {"text": "Two."}, {"text": "Two."}])
        assert on(fleet, source, "--out", out).returncode == 0
        assert [fields["text"] for fields in fleet.asked[3:]] == ["Zero."]
    after = results(out)
    assert [*after][1:] == [*before] and [row["file"] for row in after.values()][1:] == [
        row["file"] for row in before.values()
    ]
    assert sorted(row["file"].partition("-")[0] for row in before.values()) == ["00002", "00003", "00004"]


def test_each_row_has_one_line_in_the_order_of_the_input_whatever_ran_first(tmp_path: Path) -> None:
    long = "This is a sentence of a text that goes in parts. " * 110
    rows = [{"key": key, "text": f"{key}. {long}"} for key in ("b", "a", "c")]
    source, out = write_rows(tmp_path / "rows.csv", rows), tmp_path / "out"
    with fleet_of() as fleet:
        for key in ("c", "a", "b"):
            on(fleet, source, "--out", out, "--part-chars", 3000, "--only", key)
        assert [*results(out)] == ["b", "a", "c"]
        assert all([part["state"] for part in row["parts"]] == ["done", "done"] for row in results(out).values())


def test_a_book_that_cannot_be_joined_has_failed_with_its_parts_kept(tmp_path: Path) -> None:
    pytest.importorskip("av")
    text = "This is a sentence of a text that goes in parts. " * 110
    source, out = write_rows(tmp_path / "rows.csv", [{"key": "long", "text": text}]), tmp_path / "out"
    with fleet_of() as fleet:  # whose audio is none
        done = on(fleet, source, "--out", out, "--part-chars", 3000, "--quiet")
        assert done.returncode == 1 and "not joined: long: 001-Part-1.wav cannot be read" in done.stderr
        row = results(out)["long"]
        assert (row["state"], row["error_code"], row["file"]) == ("failed", "join_failed", None)
        assert all((out / part["file"]).is_file() for part in row["parts"])
        assert on(fleet, source, "--out", out, "--part-chars", 3000).returncode == 1
        assert len(fleet.asked) == 2, "nothing was spoken again"


def test_subtitles_that_a_row_no_longer_asks_for_are_gone(tmp_path: Path) -> None:
    def answer(fields: dict[str, Any]) -> dict[str, Any]:
        kind = fields.get("subtitles")
        return {**spoken(fields), **({"subtitles": f"of {kind}"} if kind else {})}

    source, out = write_rows(tmp_path / "rows.csv", texts(1)), tmp_path / "out"
    with fleet_of() as fleet:
        fleet.answer = answer
        for more, left in ((["subtitles=srt"], {"row-0.srt"}), (["subtitles=vtt"], {"row-0.vtt"}), ([], set())):
            assert on(fleet, source, "--out", out, *itertools.chain(*(("--set", m) for m in more))).returncode == 0
            assert {path.name for path in out.glob("row-0.*")} == {"row-0.wav", *left}


def test_jobs_of_rows_that_are_gone_or_changed_are_cancelled(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(5)), tmp_path / "out"
    with Fleet() as fleet:
        assert interrupted(fleet, source, out, tmp_path / "log") == 130
        rows = [row for row in texts(5) if row["key"] not in ("row-0", "row-4")]
        rows[0]["text"] = "Something else."
        write_rows(source, rows)
        client = start(fleet, source, "--out", out, log=tmp_path / "log")
        fleet.wait_until(lambda: fleet.requests["cancel"] == 2)
        fleet.work()
        assert client.wait(30) == 0 and fleet.requests["cancel"] == 2, "row-0 is gone, row-1 has changed"
        said = {fields["text"] for fields in fleet.asked}
        assert said == {"Something else.", "This is sentence number 2.", "This is sentence number 3."}


def test_two_inputs_do_not_share_a_folder_by_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.csv", [{"key": "same", "text": f"From {name}."}])
    with fleet_of() as fleet:
        assert on(fleet, "one/rows.csv").returncode == 0
        refused = on(fleet, "two/rows.csv")
        assert refused.returncode == 2 and "--out" in refused.stderr and len(fleet.asked) == 1
        assert audio_of(tmp_path / "out" / "rows", "same") == b"None: From one."
        assert on(fleet, "one/rows.csv").returncode == 0
        assert on(fleet, "two/rows.csv", "--out", "out/rows").returncode == 0, "then it is meant"


def test_what_went_wrong_is_told_even_when_all_else_is_not(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out"
    with fleet_of() as fleet:
        fleet.answer = lambda fields: spoken(fields) if "0" in fields["text"] else {"error": "no", "error_code": "x"}
        done = on(fleet, source, "--out", out, "--quiet")
    assert (done.returncode, done.stderr.splitlines(), done.stdout) == (1, ["failed: row-1: x: no"], "")


def test_an_account_that_cannot_pay_ends_the_run(tmp_path: Path, paying: Callable[[], str]) -> None:
    source = write_rows(tmp_path / "rows.csv", texts(50))
    arguments = ("--api-url", paying(), "--endpoint", "x", "--no-check-voices", "--out", tmp_path / "out")
    done = run(source, *arguments, "--in-flight", 1, RUNPOD_API_KEY="k")
    assert done.returncode == 1 and "cannot pay" in done.stderr and "out of credit" in done.stderr
    assert {row["state"] for row in results(tmp_path / "out").values()} == {"open"}


@pytest.fixture
def paying() -> Iterator[Callable[[], str]]:
    """An address that wants money."""

    class Till(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": "out of credit"}).encode()
            self.send_response(402)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Till) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda: f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_stands_beside_a_jobs_input_goes_along(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    config = {"accessId": "a", "accessSecret": "b", "bucketName": "mine", "endpointUrl": "https://s3.example.com"}
    job = {"key": "one", "input": {"text": "Uno."}, "s3Config": config, "policy": {"ttl": 60_000}}
    lines.write_text(json.dumps(job) + "\n", encoding="utf-8")
    taken: list[dict[str, Any]] = []
    with fleet_of() as fleet:
        fleet.on_job = taken.append
        assert on(fleet, lines, "--out", tmp_path / "out").returncode == 0
        assert [(each["s3Config"], each["policy"]) for each in taken] == [(config, {"ttl": 60_000})]
        for name, wrong in (("policy", 7), ("webhook", "ftp://x"), ("s3Config", 7)):
            lines.write_text(json.dumps({"input": {"text": "Uno."}, name: wrong}) + "\n", encoding="utf-8")
            done = on(fleet, lines, "--out", tmp_path / "2")
            assert done.returncode == 2 and f"{lines}:1: {name}: expected" in done.stderr, done.stderr
        assert b'"b"' not in (tmp_path / "out" / "batch.sqlite").read_bytes(), "a secret is in the manifest"


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("key,text\na,Hello.\n", ["--map", "voice_name=Speaker"], "voice_name: there is no 'Speaker' in it"),
        ("key,text\na,Hello.\n", ["--map", "seed=Sed", "--set", "seed=1"], "seed: there is no 'Sed' in it"),
        ("key,text\na,Hello.\n", ["--set", "idempotency_key=one"], "each job has to have its own"),
        ("key,text,idempotency_key\na,Hi.,x\nb,Ho.,x\n", [], "the idempotency_key 'x' is that of"),
        ("key,text\na,Hello.\n", ["--encoding", "nonsense"], "--encoding nonsense: no such encoding"),
        ("key,text\na,Hello.\n", ["--encoding", "base64"], "--encoding base64: no such encoding"),
        ('key,"te\nxt\na,Hello.\n', [], "not CSV"),
    ],
)
def test_what_is_wrong_with_columns_and_options_is_told_before_anything_is_sent(
    tmp_path: Path, content: str, arguments: list[str], words: str
) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(content, encoding="utf-8")
    done = run(source, "--dry-run", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_an_input_that_cannot_be_read_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").symlink_to("a.txt")
    (tmp_path / "texts" / "b.txt").write_text("Hello.")
    folder = tmp_path / "texts" / "deep.txt"
    folder.mkdir()
    assert run(tmp_path / "texts", "--dry-run").returncode == 0, "a link to nowhere is no text"
    source = tmp_path / "rows.csv"
    os.mkfifo(source)
    assert run(source, "--dry-run").returncode == 2


def test_a_row_with_a_line_that_cannot_be_read_is_left_out_whole(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes(b'key,text\na,"One.\ncaf\xe9\nthree."\nb,Two.\n')
    with fleet_of() as fleet:
        done = on(fleet, source, "--out", tmp_path / "out", "--skip-bad")
        assert done.returncode == 1 and f"{source}:3: byte 0xe9" in done.stderr
        assert [fields["text"] for fields in fleet.asked] == ["Two."]


def test_a_language_that_was_said_beats_the_books_own(tmp_path: Path) -> None:
    book = write_epub(tmp_path / "b.epub", "A Book", [("One", "First."), ("Two", "Second.")])
    with fleet_of() as fleet:
        on(fleet, book, "--out", tmp_path / "1")
        on(fleet, book, "--out", tmp_path / "2", "--set", "language=de")
        assert [fields["language"] for fields in fleet.asked] == ["en", "en", "de", "de"]


def test_a_full_disk_ends_the_run_with_a_word(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(3)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out, "--only", "row-0").returncode == 0
        with contextlib.closing(sqlite3.connect(out / "batch.sqlite", isolation_level=None)) as database:
            full = "SELECT RAISE(ABORT, 'disk is full')"
            database.execute(f"CREATE TRIGGER full BEFORE UPDATE ON tasks BEGIN {full}; END")
        done = on(fleet, source, "--out", out)
        assert done.returncode == 1 and "disk is full; what is done is kept" in done.stderr


def test_a_row_whose_text_changed_is_told_and_done_anew(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(3)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        rows = texts(2)
        rows[1] |= {"text": "Something else.", "output_format": "mp3"}
        write_rows(source, rows)
        done = on(fleet, source, "--out", out)
        assert done.returncode == 0 and "1 rows changed since the last run, and are done anew: row-1" in done.stderr
        assert "1 rows are not in the input any more; their files stay: row-2" in done.stderr
        assert len({fields["idempotency_key"] for fields in fleet.asked}) == 4
    assert list(results(out)) == ["row-0", "row-1"]
    assert audio_files(out) == {"row-0.wav", "row-1.mp3", "row-2.wav"}
    assert audio_of(out, "row-1") == b"None: Something else."


def test_keys_never_become_files_outside_the_folder_or_of_the_same_name(tmp_path: Path) -> None:
    keys = ["../../up", "up", "UP", "/etc/passwd", "CON", "nul.txt", "..", "a" * 300, "a" * 301, "Ä", "A\u0308", " x "]
    rows = [{"key": key, "text": f"Text {number}."} for number, key in enumerate(keys)]
    source, out = write_rows(tmp_path / "rows.csv", rows), tmp_path / "down" / "out"
    with fleet_of() as fleet:
        done = on(fleet, source, "--out", out)
        assert done.returncode == 0, done.stderr
    found = results(out)
    names = [row["file"] for row in found.values()]
    assert len({name.casefold() for name in names}) == len(keys) and all("/" not in name for name in names)
    assert audio_files(out) == set(names)
    assert not {name.partition(".")[0].upper() for name in names} & {"CON", "NUL", ""}
    for number, key in enumerate(keys):
        assert audio_of(out, key.strip()) == f"None: Text {number}.".encode()
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} >= {"rows.csv"}
    assert not list((tmp_path / "down").glob("up*")) and not list(tmp_path.glob("up*"))


def test_json_lines_and_folders_are_rows_too(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    jobs = [{"id": "one", "input": {"text": "Uno."}}, {"key": "two", "text": "Due.", "seed": 3}]
    lines.write_text("\n".join(map(json.dumps, jobs)) + '\n{"text": \n', encoding="utf-8")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("Plain text.", encoding="utf-8")
    (folder / "deep" / "b.md").write_text("Some **bold** [words](https://x.example).\n\n- one\n", encoding="utf-8")
    with fleet_of() as fleet:
        assert f"{lines}:3: not JSON" in on(fleet, lines, "--out", tmp_path / "1").stderr
        assert on(fleet, lines, "--out", tmp_path / "1", "--skip-bad").returncode == 1
        assert set(results(tmp_path / "1")) == {"one", "two"}
        done = on(fleet, folder, "--out", tmp_path / "2")
        assert done.returncode == 0, done.stderr
        assert set(results(tmp_path / "2")) == {"a", "deep/b"}
        assert audio_of(tmp_path / "2", "deep/b") == b"None: Some bold words.\n\none"


def test_a_dry_run_estimates_and_sends_nothing(tmp_path: Path) -> None:
    cost = ("--gpu", "ADA_24", "--chars-per-second", 200)
    done = run(EXAMPLE, "--dry-run", "--out", tmp_path / "out", *cost)
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    assert "8 rows, 563 characters: about 40.2 s of audio, some $0.0009" in done.stderr and "estimate" in done.stderr


def test_without_an_endpoint_or_its_key_nothing_begins(tmp_path: Path) -> None:
    assert "--local 2" in run(EXAMPLE, "--out", tmp_path).stderr
    without_key = run(EXAMPLE, "--out", tmp_path, "--endpoint", "x")
    assert without_key.returncode == 2 and "RUNPOD_API_KEY" in without_key.stderr
    plain = run(EXAMPLE, "--out", tmp_path, "--endpoint", "x", "--api-url", "http://x.example", RUNPOD_API_KEY="k")
    assert plain.returncode == 2 and "https" in plain.stderr


def test_a_key_that_is_not_taken_ends_the_run_and_is_not_told(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", texts(1))
    with fleet_of() as fleet:
        done = run(*at(fleet, source, "--out", tmp_path / "out"), RUNPOD_API_KEY="secret-of-mine")
    assert done.returncode == 1 and "does not take the key" in done.stderr
    assert "secret-of-mine" not in done.stderr + done.stdout
    for path in (tmp_path / "out").iterdir():
        assert b"secret-of-mine" not in path.read_bytes()


def test_an_endpoint_that_cannot_speak_ends_the_run(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(200)), tmp_path / "out"
    with fleet_of() as fleet:
        fleet.answer = lambda _: {"error": "there are no weights", "error_code": "weights_missing"}
        done = on(fleet, source, "--out", out, "--in-flight", 2)
        assert done.returncode == 1 and "answers every job with weights_missing" in done.stderr
        assert len(fleet.asked) < 10
        fleet.answer = spoken
        assert on(fleet, source, "--out", out, "--retry-failed").returncode == 0


# ------------------------------------------------------------------------------------------- audio in a bucket


@pytest.fixture
def bucket() -> Iterator[Callable[[bytes], str]]:
    """Gives an address at which some bytes lie; every other request of it fails."""
    data: list[bytes] = []

    class Bucket(BaseHTTPRequestHandler):
        num_requests = 0

        def do_GET(self) -> None:
            assert "Authorization" not in self.headers, "the key is for the platform only"
            Bucket.num_requests += 1
            if Bucket.num_requests % 2:
                self.send_error(503)
                return
            body = data[int(self.path.strip("/"))]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def put(body: bytes) -> str:
            data.append(body)
            return f"http://127.0.0.1:{server.server_port}/{len(data) - 1}"

        yield put
        server.shutdown()


def test_audio_in_a_bucket_is_fetched_up_to_a_size(tmp_path: Path, bucket: Callable[[bytes], str]) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out"
    urls = {
        f"This is sentence number {number}.": bucket(bytes([number]) * size) for number, size in ((0, 900), (1, 2000))
    }

    def answer(fields: dict[str, Any]) -> dict[str, Any]:
        result = {name: value for name, value in spoken(fields).items() if name != "audio"}
        return {**result, "audio_url": urls[fields["text"]]}

    with fleet_of() as fleet:
        fleet.answer = answer
        done = on(fleet, source, "--out", out, "--max-audio-bytes", 1000, "--attempts", 1)
        assert done.returncode == 1 and "row-1: download_failed" in done.stderr and "127.0.0.1" not in done.stderr
    assert audio_of(out, "row-0") == bytes(900)
    assert audio_files(out) == {"row-0.wav"}


# ------------------------------------------------------------------------------------------- between two lines


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_run_killed_between_writing_and_noting_fetches_nothing_again(tmp_path: Path, is_renamed: bool) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(1)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        with Manifest(out) as manifest:
            (task,) = manifest.tasks()
            assert task.file is not None and task.num_bytes is not None
            manifest.note_written(task, task.file, task.num_bytes, task.result)
        path = out / task.file
        if not is_renamed:
            path.rename(files.temporary(path))
        num_before = fleet.requests["status"]
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(fleet.asked) == 1 and fleet.requests["status"] == num_before
    assert audio_files(out) == {task.file}
