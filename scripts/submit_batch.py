"""Speaks many texts: `python scripts/submit_batch.py examples/batch.csv --local 2`.

Takes a CSV or JSONL file with a row for each job, a folder of .txt and .md files, or a text or EPUB that is a whole
book; gives an audio file for each, in one folder with results.jsonl. Rows are checked before anything is sent. A run
that ends, however it does, is gone on with by the same command, and nothing is spoken twice. --local N speaks on this
machine, with MODEL (draft) from the environment; otherwise the endpoint is --endpoint, and its key RUNPOD_API_KEY.

Exit codes: 0 all done, 1 some failed, 2 bad rows or usage, 130 interrupted. How it is built: scripts/batch/__init__.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # run as a file, Python looks for packages beside it; they are in the folder above

import typer  # noqa: E402

from scripts.addresses import checked_key, checked_url  # noqa: E402
from scripts.batch import costs  # noqa: E402
from scripts.batch.board import Board, Style  # noqa: E402
from scripts.batch.checking import Checked, Reading, Row, check_rows, is_webhook  # noqa: E402
from scripts.batch.client import Client, Refused  # noqa: E402
from scripts.batch.errors import BatchError, EndpointError  # noqa: E402
from scripts.batch.interrupts import EXIT_CODE as INTERRUPTED  # noqa: E402
from scripts.batch.interrupts import Interrupts, OnInterrupt, asked_about_jobs  # noqa: E402
from scripts.batch.manifest import Changes, Manifest  # noqa: E402
from scripts.batch.rates import limits_of  # noqa: E402
from scripts.batch.report import FILE as RESULTS  # noqa: E402
from scripts.batch.report import Summary, write_results  # noqa: E402
from scripts.batch.rows import Problem, read_rows  # noqa: E402
from scripts.batch.runner import Policy, Runner  # noqa: E402
from scripts.batch.voices import missing_voices  # noqa: E402
from scripts.console import complain, counted  # noqa: E402

API_URL = "https://api.runpod.ai/v2"
SOME_FAILED, BAD_USAGE = 1, 2

_ENDPOINT_ID = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN_KEYS = 5
_SHOWN_PROBLEMS = 50


@dataclass(frozen=True)
class Endpoint:
    """Where jobs go.

    Args:
        name: what ids of jobs are worth something at.
        url: what stands before /run.
        key: to it.
        ends_with_us: whether it is gone after the run.
    """

    name: str
    url: str
    key: str | None
    ends_with_us: bool = False


INPUT, OUTPUT, WHERE, HOW = "What is spoken", "What comes out", "Where", "How"


def main(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="CSV, JSONL, folder of texts, text or EPUB.")],
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FIELD=COLUMN", help="Which column holds a field.", rich_help_panel=INPUT),
    ] = None,
    defaults: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Of rows that do not say.", rich_help_panel=INPUT),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Of the rows' keys; else key or id.", rich_help_panel=INPUT),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="That is no field; * for any characters.", rich_help_panel=INPUT),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Only these rows; * for any characters.", rich_help_panel=INPUT),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of the input.", rich_help_panel=INPUT)] = "utf-8-sig",
    part_chars: Annotated[
        int,
        typer.Option(min=1_000, max=500_000, help="Longer texts go as several jobs.", rich_help_panel=INPUT),
    ] = 100_000,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without bad rows.", rich_help_panel=INPUT)
    ] = False,
    check_voices: Annotated[
        bool, typer.Option(help="Ask the endpoint for the voices that rows name.", rich_help_panel=INPUT)
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Else out/NAME-OF-INPUT.", rich_help_panel=OUTPUT),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.", rich_help_panel=OUTPUT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines.", rich_help_panel=OUTPUT)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, estimate, send nothing.", rich_help_panel=OUTPUT)
    ] = False,
    local_workers: Annotated[
        int | None, typer.Option("--local", metavar="N", min=1, help="Workers on this machine.", rich_help_panel=WHERE)
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="ID", help="[RUNPOD_ENDPOINT_ID]", rich_help_panel=WHERE)
    ] = None,
    api_url: Annotated[str, typer.Option(metavar="URL", help="Of the platform.", rich_help_panel=WHERE)] = API_URL,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="Called by the platform for each job.", rich_help_panel=WHERE)
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, max=10_000, help="Jobs at once.", rich_help_panel=HOW)
    ] = Policy.in_flight,
    attempts: Annotated[
        int, typer.Option(min=1, help="Of a job whose error may pass.", rich_help_panel=HOW)
    ] = Policy.max_failures,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="run=N", help="Requests in 10 s: run, status, stream, cancel.", rich_help_panel=HOW),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="What failed in earlier runs, too.", rich_help_panel=HOW)
    ] = False,
    on_interrupt: Annotated[
        OnInterrupt, typer.Option(help="With what the platform has, at Ctrl-C.", rich_help_panel=HOW)
    ] = OnInterrupt.ASK,
    max_audio_bytes: Annotated[
        int, typer.Option(min=1, help="Of a file that lies in a bucket.", rich_help_panel=HOW)
    ] = Policy.max_audio_bytes,
    gpu: Annotated[
        str | None, typer.Option(metavar="KIND", help="For its price (scripts/prices.toml).", rich_help_panel=HOW)
    ] = None,
    price_per_second: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Of a worker.", rich_help_panel=HOW)
    ] = None,
    chars_per_second: Annotated[
        float | None,
        typer.Option(min=0.001, help="That a worker speaks, to estimate its cost.", rich_help_panel=HOW),
    ] = None,
) -> None:
    """Speak many texts; the same command goes on where it stopped."""
    style = Style.JSON if as_json else Style.QUIET if quiet else Style.PEOPLE
    try:
        reading = Reading(
            columns=_pairs("--map", mapping),
            defaults=_pairs("--set", defaults),
            key=key,
            ignored=tuple(ignore or ()),
            part_chars=part_chars,
        )
        limits = limits_of(_pairs("--rate", rate))
        if webhook is not None and not is_webhook(webhook):
            raise BatchError("--webhook: expected an address with https:// or http://")
        rates = _rates(gpu, price_per_second, chars_per_second)
        checked = _checked(source, encoding, reading, tuple(only or ()))
        _tell_problems(checked.problems)
        _refuse(checked, skip_bad, source, only or ())
        board = Board(style, rates)
        _tell_estimate(checked.rows, rates, board)
        if dry_run:
            return
        folder = out or Path("out") / (source.resolve().name if source.is_dir() else source.stem)
        _check_folder(folder, source)
        batch = _Batch(
            source=source,
            checked=checked,
            folder=folder,
            is_folder_meant=out is not None,
            board=board,
            rates=rates,
            policy=Policy(in_flight, attempts, max_audio_bytes, webhook),
            limits=limits,
            is_all=not only,
            retry_failed=retry_failed,
            check_voices=check_voices,
            skip_bad=skip_bad,
            on_interrupt=on_interrupt,
        )
        where = None if local_workers is not None else _remote(endpoint, api_url)
        raise typer.Exit(batch.run(where, local_workers or 0))
    except BatchError as error:
        complain(f"error: {error}")
        raise typer.Exit(BAD_USAGE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except (EndpointError, OSError, sqlite3.Error) as error:
        complain(f"error: {error}; what is done is kept, and the same command goes on")
        raise typer.Exit(SOME_FAILED) from error


def _pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value:
            raise BatchError(f"{option} {text}: expected NAME=VALUE")
        pairs[name.strip()] = value
    return pairs


def _checked(source: Path, encoding: str, reading: Reading, only: Sequence[str]) -> Checked:
    try:
        return check_rows(read_rows(source, encoding), reading, only)
    except OSError as error:
        raise BatchError(f"{source} cannot be read: {error}") from error


def _check_folder(folder: Path, source: Path) -> None:
    """Refuse a folder for the output that is none, or in which the input would be written over.

    Raises:
        BatchError
    """
    if folder.exists() and not folder.is_dir():
        raise BatchError(f"--out {folder}: expected a folder")
    if source.resolve() == (folder / RESULTS).resolve():
        raise BatchError(f"{source} is where the results would be written; say --out with another folder")


def _rates(gpu: str | None, usd_per_s: float | None, chars_per_s: float | None) -> costs.Rates:
    return costs.Rates.of(
        gpu,
        usd_per_s,
        chars_per_s,
        model=os.environ.get("MODEL") or "turbo",
        table=ROOT / "scripts" / "prices.toml",
        measured=ROOT / "docs" / "benchmarks",
    )


def _remote(endpoint: str | None, api_url: str) -> Endpoint:
    endpoint = endpoint or os.environ.get("RUNPOD_ENDPOINT_ID")
    key = os.environ.get("RUNPOD_API_KEY")
    if not endpoint:
        raise BatchError("which endpoint? say --endpoint ID (or RUNPOD_ENDPOINT_ID), or --local 2 for this machine")
    if not key:
        raise BatchError("RUNPOD_API_KEY is not set")
    try:
        checked_url(api_url)
        key = checked_key(key)
    except ValueError as error:
        raise BatchError(str(error)) from None
    if not _ENDPOINT_ID.fullmatch(endpoint):
        raise BatchError(f"--endpoint {endpoint}: expected the id of an endpoint")
    url = f"{api_url.rstrip('/')}/{endpoint}"
    return Endpoint(url, url, key)


def _tell_problems(problems: Sequence[Problem]) -> None:
    for problem in problems[:_SHOWN_PROBLEMS]:
        complain(str(problem))
    if len(problems) > _SHOWN_PROBLEMS:
        complain(f"and {len(problems) - _SHOWN_PROBLEMS:,} more")


def _refuse(checked: Checked, skip_bad: bool, source: Path, only: Sequence[str]) -> None:
    """Nothing is sent of a batch with bad rows, unless that was said.

    Raises:
        BatchError: for bad rows, and for none at all.
    """
    if checked.problems and not skip_bad:
        bad = counted(len(checked.problems), "problem")
        raise BatchError(f"{bad}, nothing was sent (--skip-bad goes on without bad rows)")
    if not checked.rows and only:
        raise BatchError(f"no row has a key that is {' or '.join(map(repr, only))}")
    if not checked.rows:
        raise BatchError(f"{source} holds no rows{' that are good' if checked.problems else ''}")


def _tell_estimate(rows: Sequence[Row], rates: costs.Rates, board: Board) -> None:
    parts = [part for row in rows for part in row.parts]
    num_chars = sum(part.num_chars for part in parts)
    audio_s = costs.total_spoken_s((part.num_chars, part.language) for part in parts)
    usd = rates.expected_usd(num_chars)
    cost = "" if usd is None else f", some {costs.as_usd(usd)} ({rates.chars_per_s:.0f} characters/s, {rates.source})"
    if usd is None and rates.usd_per_s is not None:
        cost = ", at a cost that is not known: nobody measured the speed, say --chars-per-second"
    board.event("plan", rows=len(rows), jobs=len(parts), chars=num_chars, expected_audio_s=audio_s, expected_usd=usd)
    jobs = counted(len(rows), "row") + ("" if len(rows) == len(parts) else f", {counted(len(parts), 'job')}")
    board.say(f"{jobs}, {num_chars:,} characters: about {costs.as_time(audio_s)} of audio{cost}; an estimate")
    for warning in dict.fromkeys(warning for row in rows for warning in row.warnings):
        board.say(f"warning: {warning}")


@dataclass(frozen=True)
class _Batch:
    """A run, all that it needs in one place."""

    source: Path
    checked: Checked
    folder: Path
    is_folder_meant: bool
    board: Board
    rates: costs.Rates
    policy: Policy
    limits: dict[str, int]
    is_all: bool
    retry_failed: bool
    check_voices: bool
    skip_bad: bool
    on_interrupt: OnInterrupt

    def run(self, where: Endpoint | None, num_local: int) -> int:
        """The exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with Manifest(self.folder) as manifest:
            manifest.meet_input(self.source, is_meant=self.is_folder_meant)
            if where is not None:
                return self._run_at(where, manifest)
            from scripts.batch.local import DEFAULT_MODEL, kept_in, local_endpoint  # and a web server, only then

            if not os.environ.get("MODEL"):
                self.board.say(f"with the {DEFAULT_MODEL} voice; MODEL=nano, MODEL=turbo, … for a real model")
            with local_endpoint(num_local, self.folder) as platform:
                name = f"this machine, {uuid.uuid4()}"  # whose jobs are gone with it
                code = self._run_at(Endpoint(name, platform.url, platform.api_key, ends_with_us=True), manifest)
            if self.is_all and code == 0:
                shutil.rmtree(kept_in(self.folder), ignore_errors=True)  # nobody goes on with it
            return code

    def _run_at(self, where: Endpoint, manifest: Manifest) -> int:
        began_s = time.monotonic()
        try:
            code = asyncio.run(self._run(manifest, where))
        except EndpointError:
            self._write_results(manifest, time.monotonic() - began_s)
            raise
        finally:
            self.board.close()
        return self._finish(manifest, code, time.monotonic() - began_s)

    async def _run(self, manifest: Manifest, where: Endpoint) -> int:
        async with Client(where.url, where.key, self.limits, on_trouble=self.board.trouble) as client:
            with Interrupts() as interrupts:
                preparing = asyncio.create_task(self._prepare(manifest, client, where))
                if not await interrupts.ended_before(preparing):
                    preparing.cancel()
                    return INTERRUPTED
                runner = Runner(client, manifest, self.folder, self.checked.rows, self.policy, self.board)
                running = asyncio.create_task(runner.run())
                if await interrupts.ended_before(running):
                    return 0
                self.board.close()
                self.board.say("stopping; Ctrl-C again leaves at once")
                await runner.stop(running)
                await self._settle(runner, where, interrupts)
                return INTERRUPTED

    async def _prepare(self, manifest: Manifest, client: Client, where: Endpoint) -> None:
        """Look for the voices, and take the rows in."""
        if self.check_voices:
            rows = [*manifest.open_rows(self.checked.rows, retry_failed=self.retry_failed)]
            problems = await missing_voices(client, rows)
            _tell_problems(problems)
            self.checked.problems.extend(problems)
            bad = {problem.source for problem in problems}
            self.checked.bad_keys |= {row.key for row in self.checked.rows if row.source in bad}
            self.checked.rows[:] = [row for row in self.checked.rows if row.source not in bad]
            _refuse(self.checked, self.skip_bad, self.source, ())
        changes = manifest.meet(
            self.checked.rows,
            is_all=self.is_all and not self.checked.has_nameless,
            endpoint=where.name,
            retry_failed=self.retry_failed,
            bad_keys=self.checked.bad_keys,
        )
        self._tell_changes(changes)
        for job_id in manifest.abandoned_jobs():
            try:
                with contextlib.suppress(Refused):  # it has ended
                    await client.cancel(job_id)
            except EndpointError as error:  # the next run tries again; this one has better things to do
                self.board.trouble("cancel", str(error))
                break
            manifest.note_cancelled(job_id)

    def _tell_changes(self, changes: Changes) -> None:
        told = {"changed since the last run, to be done anew": changes.changed}
        told["not in the input any more, files stay"] = changes.gone
        for what, keys in told.items():
            if keys:
                more = ", …" if len(keys) > _SHOWN_KEYS else ""
                self.board.say(f"{counted(len(keys), 'row')} {what}: {', '.join(keys[:_SHOWN_KEYS])}{more}")
        self.board.event("changes", new=len(changes.new), changed=changes.changed, gone=changes.gone)

    async def _settle(self, runner: Runner, where: Endpoint, interrupts: Interrupts) -> None:
        """After an interrupt: cancel or leave what the platform has."""
        if where.ends_with_us:
            return
        answer = self.on_interrupt
        if answer is OnInterrupt.ASK:
            answer = await asked_about_jobs(interrupts)
        if answer is not OnInterrupt.CANCEL:
            return
        self.board.say("cancelling; Ctrl-C again leaves at once")
        try:
            self.board.say(f"{await runner.cancel_all():,} jobs cancelled")
        except EndpointError as error:
            complain(f"error: not all jobs could be cancelled: {error}")

    def _finish(self, manifest: Manifest, code: int, wall_s: float) -> int:
        summary = self._write_results(manifest, wall_s)
        self.board.event("summary", **summary.as_json())
        self.board.failed_before(summary.failures)
        for line in summary.lines():
            self.board.say(line)
        if code == INTERRUPTED:
            self.board.say("interrupted; the same command goes on")
            return code
        return SOME_FAILED if summary.failed or summary.open or self.checked.problems else code

    def _write_results(self, manifest: Manifest, wall_s: float) -> Summary:
        summary = write_results(manifest, self.folder, {row.key for row in self.checked.rows}, self.rates)
        summary.wall_s, summary.run_audio_s = wall_s, self.board.audio_s
        summary.left_out = len(self.checked.problems)
        return summary


if __name__ == "__main__":
    typer.run(main)
