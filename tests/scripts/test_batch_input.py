"""What scripts/submit_batch.py takes for rows, and what it says of others before anything is sent."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.batches import (
    EXAMPLE,
    audio_files,
    audio_of,
    on,
    results,
    run,
    texts,
    write_rows,
)
from tests.scripts.books import write_epub
from tests.scripts.fleet import fleet_of, spoken


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
        (
            "key,text\na,Hello.\n",
            ["--map", "voice_name=Speaker"],
            "rows.csv:1: voice_name: there is no column 'Speaker'",
        ),
        (
            "key,text\na,Hello.\n",
            ["--map", "seed=Sed", "--set", "seed=1"],
            "rows.csv:1: seed: there is no column 'Sed'",
        ),
        ("key,text\na,Hello.\n", ["--set", "idempotency_key=one"], "each job has to have its own"),
        ("key,text,idempotency_key\na,Hi.,x\nb,Ho.,x\n", [], "the idempotency_key 'x' is that of"),
        ("key,text\na,Hello.\n", ["--encoding", "nonsense"], "--encoding nonsense: no such encoding"),
        ("key,text\na,Hello.\n", ["--encoding", "base64"], "--encoding base64: no such encoding"),
        ('key,"te\nxt\na,Hello.\n', [], "not CSV"),
        ("key,text,\na,Hello, world.\n", [], "rows.csv:2: a cell is in a column without a name"),
        ("text,segments\nHi.," + "[" * 200_000 + "\n", [], "rows.csv:2: segments: expected a list"),
        ("No,Sentence\n1,Hi.\n2,Ho.\n", [], "say which with --map text=COLUMN"),
        ("No,text,Who\n1,Hi.,Ann\n", [], "leave out what is none with --ignore 'No' --ignore 'Who'"),
        ("key,text\na,Hello.\n", ["--key", "kee"], "rows.csv:1: key: there is no column 'kee'; did you mean key?"),
        ("key,text\na,Hello.\n", ["--only", "b*"], "no row has a key that is 'b*'"),
        ("key,text\n", [], "holds no rows"),
        ("text,reference_audio\nHi.,AAA\n", [], "rows.csv:2: reference_audio: expected base64"),
        ("text,reference_audio\nHi.,file:nowhere.wav\n", [], "rows.csv:2: reference_audio: cannot read nowhere.wav"),
        (
            "text,reference_audio\nHi.,https://u:p@x.example/x.wav\n",
            [],
            "rows.csv:2: reference_audio: the address is not",
        ),
        ("text,reference_audio\nHi.,ftp://x.example/x.wav\n", [], "does not fetch ftp: addresses"),
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


def test_recordings_of_this_machine_go_along_and_new_ones_make_a_row_another(tmp_path: Path) -> None:
    recording, out = tmp_path / "voice.wav", tmp_path / "out"
    source = write_rows(tmp_path / "rows.csv", [{"key": "a", "text": "Hi.", "reference_audio": f"file:{recording}"}])
    with fleet_of() as fleet:
        for content in (b"one", b"one", b"two"):
            recording.write_bytes(content)
            assert on(fleet, source, "--out", out).returncode == 0
        assert [base64.b64decode(fields["reference_audio"]) for fields in fleet.asked] == [b"one", b"two"]


def test_of_rows_that_are_not_wanted_nothing_is_wrong(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"key": "a", "s": "Hello."}\n{"key": "b", "x": "y"}\n')
    assert run(source, "--dry-run", "--map", "text=s", "--only", "a").returncode == 0
    assert run(source, "--dry-run", "--map", "text=s").returncode == 2


def test_each_problem_of_the_columns_is_told_once(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", [{"No": str(number), "Sentence": "Hi."} for number in range(100)])
    done = run(source, "--dry-run", "--map", "text=Sentence")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr


@pytest.mark.parametrize(
    "policy",
    [
        '{"ttl": NaN}',
        '{"ttl": 1e999}',
        '{"ttl": true}',
        '{"x": "\\ud800"}',
        '{"ttl": "soon"}',
        '{"executionTimeout": -1}',
        "[]",
    ],
)
def test_a_policy_that_the_platform_would_not_take_is_told(tmp_path: Path, policy: str) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"input": {"text": "Hi."}, "policy": ' + policy + "}\n")
    done = run(source, "--dry-run")
    assert done.returncode == 2 and f"{source}:1: " in done.stderr, done.stderr


def test_a_line_ends_where_it_does_in_any_encoding(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes("key,text\na,One\u2028line.\n".encode("utf-16"))
    done = run(source, "--dry-run", "--encoding", "utf-16")
    assert done.returncode == 0 and done.stderr.startswith("1 row, "), done.stderr


def test_any_name_of_an_input_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.csv")), texts(1))
    (tmp_path / "book" / "deep").mkdir(parents=True)
    (tmp_path / "book" / "a.txt").write_text("Hello.")
    monkeypatch.chdir(tmp_path / "book" / "deep")
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", tmp_path / "out").returncode == 0
        assert on(fleet, "..").returncode == 0
        assert (tmp_path / "book" / "deep" / "out" / "book" / "a.wav").is_file()


def test_folders_and_endpoints_that_cannot_be_are_wrong_usage(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.csv", texts(1))
    lines = tmp_path / "results.jsonl"
    lines.write_text('{"text": "Hi."}\n')
    with fleet_of() as fleet:
        assert on(fleet, source, "--out", source).returncode == 2
        assert on(fleet, lines, "--out", tmp_path).returncode == 2
        assert on(fleet, source, "--out", tmp_path / "out", "--endpoint", "my endpoint").returncode == 2
        assert not fleet.asked and lines.read_text() == '{"text": "Hi."}\n'
