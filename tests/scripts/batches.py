"""scripts/submit_batch.py run as a person runs it, its inputs, and what it leaves."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from scripts.submit_batch import main
from tests.platform import without_ours
from tests.scripts.fleet import Fleet

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


def interrupted(fleet: Fleet, source: Path, out: Path, log: Path, *arguments: object) -> int:
    """Ctrl-C while three jobs wait at the platform; the exit code."""
    client = start(fleet, source, "--out", out, "--json", "--in-flight", 3, *arguments, log=log)
    fleet.wait_until(lambda: log.read_text().count('"sent"') == 3)
    client.send_signal(signal.SIGINT)
    return client.wait(30)
