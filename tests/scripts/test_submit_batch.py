"""scripts/submit_batch.py as a person runs it: against a fleet that fails in every way, and with workers of its own."""

from __future__ import annotations

import base64
import contextlib
import csv
import itertools
import json
import random
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from scripts.batch import files
from scripts.batch.manifest import Manifest
from scripts.local_platform.jobs import Job, Refused, Status
from tests.scripts.batches import (
    EXAMPLE,
    at,
    audio_files,
    audio_of,
    interrupted,
    on,
    results,
    run,
    run_apart,
    start,
    texts,
    write_rows,
)
from tests.scripts.books import write_epub
from tests.scripts.fleet import LIMITS, Fleet, fleet_of, spoken
from tests.scripts.serving import Silent, serving

# ------------------------------------------------------------------------------------------- with real workers


def test_the_example_becomes_audio_files_on_this_machine(tmp_path: Path) -> None:
    done = run_apart(EXAMPLE, "--local", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = results(tmp_path)
    assert "with the draft voice" in done.stderr and not (tmp_path / ".batch-work").exists()
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


def test_a_folder_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(1)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        with contextlib.closing(sqlite3.connect(out / "batch.sqlite", isolation_level=None)) as database:
            database.execute("UPDATE about SET value = '1' WHERE name = 'version'")
        for _ in range(2):  # nor does the first try keep the lock
            done = on(fleet, source, "--out", out, "--retry-failed")
            assert done.returncode == 2 and "of another version" in done.stderr and len(fleet.asked) == 1


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


def test_a_job_that_ends_while_it_is_being_cancelled_is_collected_by_the_next_run(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(5)), tmp_path / "out"
    with Fleet() as fleet:
        cancel = fleet._endpoint.cancel
        ended: list[str] = []

        def too_late(job: Job) -> None:
            if not ended:
                ended.append(job.id)
                assert job.request is not None
                result = {"output": spoken(json.loads(job.request.read())["input"])}
                fleet._endpoint._end(job, Status.COMPLETED, result)
            cancel(job)

        fleet._endpoint.cancel = too_late  # type: ignore[method-assign]
        assert interrupted(fleet, source, out, tmp_path / "log", "--on-interrupt", "cancel") == 130
        fleet.work()
        assert on(fleet, source, "--out", out).returncode == 0
        assert len(ended) == 1 and len(fleet.asked) == 4, "what had ended was not spoken again"


# ------------------------------------------------------------------------------------------- rows that change


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
        assert done.returncode == 1 and "not joined: long: 001-Part-1.opus cannot be read" in done.stderr
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


def test_what_failed_before_is_told_even_when_all_else_is_not(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out"
    with fleet_of() as fleet:
        fleet.answer = lambda fields: spoken(fields) if "0" in fields["text"] else {"error": "no", "error_code": "x"}
        assert on(fleet, source, "--out", out).returncode == 1
        again = on(fleet, source, "--out", out, "--quiet")
        assert (again.returncode, again.stderr.splitlines()) == (1, ["failed before: row-1: x: no"])
        assert "--retry-failed" in on(fleet, source, "--out", out).stderr and len(fleet.asked) == 2


def test_files_that_are_not_of_the_batch_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = ("row-0.wav", "Row-1.srt", "long.srt", "long.m4b", ".work/x", "longer-parts/002-Part-2.opus")
    theirs = [out / name for name in names]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    long = "This is a sentence of a text that goes in parts. " * 110
    rows = [*texts(2), {"key": "long", "text": long}, {"key": "longer", "text": long}]
    source = write_rows(tmp_path / "rows.csv", rows)
    with fleet_of() as fleet:
        for _ in range(2):
            on(fleet, source, "--out", out, "--part-chars", 3000, "--set", "subtitles=srt")
    assert {path.read_text() for path in theirs} == {"mine"}
    assert audio_of(out, "row-0") == b"None: This is sentence number 0."


def test_audio_whose_new_name_is_taken_fails_until_that_is_moved_away(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(1)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        (out / "row-0.mp3").write_text("mine")
        assert on(fleet, source, "--out", out, "--set", "output_format=mp3").returncode == 1
        assert (out / "row-0.mp3").read_text() == "mine" and results(out)["row-0"]["error_code"] == "file_exists"
        (out / "row-0.mp3").unlink()
        assert on(fleet, source, "--out", out, "--set", "output_format=mp3", "--retry-failed").returncode == 0
        assert audio_files(out) == {"row-0.mp3"} and set(fleet.made.values()) == {1}


def test_a_text_that_went_in_parts_and_does_not_any_more_leaves_no_book(tmp_path: Path) -> None:
    pytest.importorskip("av")
    long = "This is a sentence of a text that goes in parts. " * 110
    source, out = tmp_path / "rows.csv", tmp_path / "out"
    soundfile.write(tmp_path / "sound.wav", [0.1] * 4_800, 24_000)
    audio = base64.b64encode((tmp_path / "sound.wav").read_bytes()).decode()
    with fleet_of() as fleet:
        fleet.answer = lambda fields: {**spoken(fields), "audio": audio, "format": "wav"}
        for text in (long, "Short.", long):
            write_rows(source, [{"key": "a", "text": text}])
            on(fleet, source, "--out", out, "--part-chars", 3000)
            assert {path.name for path in out.glob("a.*")} == ({"a.wav"} if text == "Short." else {"a.m4b", "a.m3u8"})
            assert len(results(out)["a"].get("parts", ())) == (0 if text == "Short." else 2)


def test_a_row_without_a_key_is_the_same_whatever_stands_in_columns_that_are_ignored(tmp_path: Path) -> None:
    source, out = tmp_path / "rows.csv", tmp_path / "out"
    with fleet_of() as fleet:
        for rows, more in (
            ([{"text": "Hi.", "Note": "x"}], []),
            ([{"text": "Hi.", "Note": "y"}], []),
            ([{"Says": "Hi.", "Note": "y"}], ["--map", "text=Says"]),
        ):
            write_rows(source, rows)
            assert on(fleet, source, "--out", out, "--ignore", "Note", *more).returncode == 0
        assert len(fleet.asked) == 1


def test_a_row_that_was_done_and_is_bad_now_is_not_gone(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out"
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", out).returncode == 0
        write_rows(source, [texts(2)[0] | {"text": "…"}, texts(2)[1]])
        done = on(fleet, source, "--out", out, "--skip-bad")
        assert done.returncode == 1 and "not in the input" not in done.stderr
        assert "1 of 1 rows done, left out for 1 problem" in done.stderr and list(results(out)) == ["row-0", "row-1"]
        source.write_bytes(b"key,text\nrow-1,This is sentence number 1.\nrow-0,\xff\n")
        assert "not in the input" not in on(fleet, source, "--out", out, "--skip-bad").stderr, "row-0 may be that line"
        write_rows(source, texts(2)[1:])
        assert "not in the input any more" in on(fleet, source, "--out", out).stderr and list(results(out)) == ["row-1"]


def test_long_texts_go_as_opus_unless_something_else_is_said(tmp_path: Path) -> None:
    long = "This is a sentence of a text that is long. " * 130
    source = write_rows(tmp_path / "rows.csv", [{"text": "Short."}, {"text": long}])
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", tmp_path / "1").returncode == 0
        assert on(fleet, source, "--out", tmp_path / "2", "--set", "output_format=mp3").returncode == 0
        assert [fields.get("output_format") for fields in fleet.asked] == [None, "opus", "mp3", "mp3"]


def test_jobs_that_nobody_wants_are_cancelled_by_the_next_run_that_can(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(5)), tmp_path / "out"
    with Fleet() as fleet:
        assert interrupted(fleet, source, out, tmp_path / "log") == 130
        write_rows(source, texts(5)[3:])
        cancel = fleet._endpoint.cancel

        def refuse(job: Job) -> None:
            raise Refused(403, "not now")

        fleet._endpoint.cancel = refuse  # type: ignore[method-assign]
        fleet.is_open.clear()
        client = start(fleet, source, "--out", out, "--json", log=tmp_path / "log")
        fleet.wait_until(lambda: (tmp_path / "log").read_text().count('"sent"') == 5)
        client.kill()
        client.wait()
        fleet._endpoint.cancel = cancel  # type: ignore[method-assign]
        fleet.requests["cancel"] = 0
        client = start(fleet, source, "--out", out, "--json", log=tmp_path / "log")
        fleet.wait_until(lambda: fleet.requests["cancel"] == 3)
        fleet.is_open.set()
        fleet.work()
        assert client.wait(30) == 0
        assert {fields["text"][-2] for fields in fleet.asked} == {"3", "4"}


def test_parts_that_a_text_no_longer_has_are_cancelled(tmp_path: Path) -> None:
    long = "This is a sentence of a text that goes in parts. " * 180
    source, out = write_rows(tmp_path / "rows.csv", [{"key": "a", "text": long}]), tmp_path / "out"
    with Fleet() as fleet:
        assert interrupted(fleet, source, out, tmp_path / "log", "--part-chars", 3000) == 130
        write_rows(source, [{"key": "a", "text": "Short."}])
        client = start(fleet, source, "--out", out, log=tmp_path / "log")
        fleet.wait_until(lambda: fleet.requests["cancel"] == 3)
        fleet.work()
        assert client.wait(30) == 0 and len(fleet.asked) == 1


def test_at_another_endpoint_jobs_are_not_asked_for_by_ids_of_the_one_before(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(3)), tmp_path / "out"
    with Fleet() as one, fleet_of() as other:
        assert interrupted(one, source, out, tmp_path / "log") == 130
        assert on(other, source, "--out", out).returncode == 0
        assert other.num_unknown == 0 and len(other.asked) == 3


def test_no_more_is_sent_than_the_platform_takes(tmp_path: Path) -> None:
    source, log = write_rows(tmp_path / "rows.csv", texts(60)), tmp_path / "log"
    with Fleet(replace(LIMITS, rates={"run": 20})) as fleet:
        client = start(fleet, source, "--out", tmp_path / "out", "--json", "--rate", "run=20", log=log)
        fleet.wait_until(lambda: fleet.requests["run"] >= 1)
        threading.Event().wait(1.5)
        client.kill()
        client.wait()
        assert fleet.num_refused == 0


def test_what_was_too_much_once_is_not_tried_by_others(tmp_path: Path) -> None:
    source, log = write_rows(tmp_path / "rows.csv", texts(60)), tmp_path / "log"
    with Fleet(replace(LIMITS, rates={"run": 5})) as fleet:
        fleet.work()
        client = start(fleet, source, "--out", tmp_path / "out", "--json", "--in-flight", 8, log=log)
        fleet.wait_until(lambda: log.read_text().count('"done"') == 5)
        threading.Event().wait(0.5)
        client.kill()
        client.wait()
        assert 0 < fleet.num_refused <= 3


@pytest.mark.parametrize(
    "odd",
    [
        {"warnings": None, "timings": None, "duration_s": "x", "subtitles": "half \ud83d"},
        {"duration_s": 10**400},
        {"error": "half \ud83d", "error_code": "\ud83d"},
    ],
)
def test_odd_results_end_no_run(tmp_path: Path, odd: dict[str, Any]) -> None:
    source, out = write_rows(tmp_path / "rows.csv", texts(2)), tmp_path / "out"
    with fleet_of() as fleet:
        fleet.answer = lambda fields: {**spoken(fields), **(odd if "0" in fields["text"] else {})}
        assert on(fleet, source, "--out", out, "--attempts", 1).returncode == (1 if "error" in odd else 0)
    rows = results(out)
    assert rows["row-1"]["state"] == "done" and rows["row-0"]["state"] == ("failed" if "error" in odd else "done")


def test_events_are_json_whatever_the_terminal_speaks(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", [{"key": "Ä", "text": "Hi."}])
    with fleet_of() as fleet:
        arguments = at(fleet, source, "--out", tmp_path / "out", "--json")
        done = run_apart(*arguments, RUNPOD_API_KEY=fleet.api_key, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Ä" in {json.loads(line).get("key") for line in done.stdout.splitlines()}


def test_parts_that_are_no_audio_are_no_book(tmp_path: Path) -> None:
    pytest.importorskip("av")
    text = "This is a sentence of a text that goes in parts. " * 110
    source, out = write_rows(tmp_path / "rows.csv", [{"key": "long", "text": text}]), tmp_path / "out"
    subtitles = base64.b64encode(b"1\n00:00:00,000 --> 00:00:01,000\nHello\n").decode()
    with fleet_of() as fleet:
        fleet.answer = lambda fields: {**spoken(fields), "audio": subtitles}
        assert on(fleet, source, "--out", out, "--part-chars", 3000).returncode == 1
    assert results(out)["long"]["error_code"] == "join_failed"


def test_an_account_that_cannot_pay_ends_the_run(tmp_path: Path) -> None:
    class Till(Silent):
        def answer(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": "out of credit"}).encode()
            self.send_response(402)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    source = write_rows(tmp_path / "rows.csv", texts(50))
    with serving(Till) as url:
        arguments = ("--api-url", url, "--endpoint", "x", "--no-check-voices", "--out", tmp_path / "out")
        done = run(source, *arguments, "--in-flight", 1, RUNPOD_API_KEY="k")
    assert done.returncode == 1 and "cannot pay" in done.stderr and "out of credit" in done.stderr
    assert {row["state"] for row in results(tmp_path / "out").values()} == {"open"}


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
        assert done.returncode == 0 and "1 row changed since the last run, to be done anew: row-1" in done.stderr
        assert "1 row not in the input any more, files stay: row-2" in done.stderr
        assert len({fields["idempotency_key"] for fields in fleet.asked}) == 4
    assert list(results(out)) == ["row-0", "row-1"]
    assert audio_files(out) == {"row-0.wav", "row-1.mp3", "row-2.wav"}
    assert audio_of(out, "row-1") == b"None: Something else."


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

    class Bucket(Silent):
        num_requests = 0

        def answer(self) -> None:
            assert "Authorization" not in self.headers, "the key is for the platform only"
            Bucket.num_requests += 1
            if Bucket.num_requests % 2:
                self.send_error(503)
                return
            body = data[int(self.path.strip("/"))]
            self.send_response(200)
            if body.startswith(b"no gzip"):
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Bucket) as url:

        def put(body: bytes) -> str:
            data.append(body)
            return f"{url}/{len(data) - 1}"

        yield put


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
        done = on(fleet, source, "--out", out, "--max-audio-bytes", 1000)
        assert done.returncode == 1 and "row-1: download_failed" in done.stderr and "127.0.0.1" not in done.stderr
        assert len(fleet.asked) == 2, "it does not become smaller by being spoken again"
    assert audio_of(out, "row-0") == bytes(900)
    assert audio_files(out) == {"row-0.wav"}


def test_audio_that_arrives_damaged_is_a_failure_of_its_row(
    tmp_path: Path, bucket: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.batch.client.DOWNLOAD_PATIENCE_S", 1.0)
    source, out = write_rows(tmp_path / "rows.csv", texts(1)), tmp_path / "out"
    url = bucket(b"no gzip at all")
    with fleet_of() as fleet:
        fleet.answer = lambda fields: {"audio_url": url, "format": "wav"}
        assert on(fleet, source, "--out", out, "--attempts", 1).returncode == 1
    assert results(out)["row-0"]["error_code"] == "download_failed"


def test_an_endpoint_that_never_answers_is_given_up_soon_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.batch.client.FIRST_PATIENCE_S", 0.5)
    source = write_rows(tmp_path / "rows.csv", texts(1))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        arguments = ("--api-url", url, "--endpoint", "x", "--no-check-voices", "--out", tmp_path / "out")
        done = run(source, *arguments, RUNPOD_API_KEY="k")
    assert done.returncode == 1 and f"{url}/x: run: gave up" in done.stderr, done.stderr


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
