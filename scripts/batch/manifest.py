"""What a batch has done, on disk: for each job its key, its id on the platform, how often it was sent, how it ended.

SQLite, so that whatever moment a run is killed at, the next one finds a state that was true:

    waiting   nothing is known to be under way. It may be, if a run was killed while it sent the job, which is why the
              job is sent again under the same idempotency_key
    sent      the platform has it under job_id
    written   its audio is on disk, under its temporary name or already under its own
    done      its audio has its own name
    failed    for good, until --retry-failed

A folder has one run at a time: SQLite's own lock is held until the end of the process, whatever that end is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from scripts.batch import names
from scripts.batch.checking import Part, Row
from scripts.batch.errors import BatchError
from scripts.batch.rows import SUFFIXES

FILE = "batch.sqlite"

WAITING, SENT, WRITTEN, DONE, FAILED = "waiting", "sent", "written", "done", "failed"

_VERSION = "2"
_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (
    key TEXT PRIMARY KEY, position INTEGER, folded TEXT NOT NULL UNIQUE, stem TEXT NOT NULL,
    joined TEXT, joined_of TEXT, join_error TEXT
) WITHOUT ROWID;
CREATE TABLE abandoned (job_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE tasks (
    key TEXT, part INTEGER, digest TEXT NOT NULL, state TEXT NOT NULL, job_id TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, worker_s REAL NOT NULL DEFAULT 0,
    file TEXT, num_bytes INTEGER, result TEXT, error_code TEXT, error TEXT,
    PRIMARY KEY (key, part)
) WITHOUT ROWID;
"""


@dataclass
class Task:
    """One job of the batch, as it stands.

    Args:
        key, part: of which row the how manieth job.
        digest: of what it asks for.
        state: see above.
        job_id: on the platform, while it is sent.
        attempts: how often it was sent.
        worker_s: what workers spent on it, seconds.
        file: its audio, relative to the folder; num_bytes: its size.
        result: the job's, without audio.
        error_code, error: why it failed.
    """

    key: str
    part: int
    digest: str
    state: str = WAITING
    job_id: str | None = None
    attempts: int = 0
    worker_s: float = 0.0
    file: str | None = None
    num_bytes: int | None = None
    result: dict[str, Any] = field(default_factory=dict)
    error_code: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.key} [{self.part + 1}]" if self.part else self.key


@dataclass(frozen=True)
class Joined:
    """What came of joining a row's parts.

    Args:
        file: relative to the folder; None for none.
        of: digest of the parts.
        error: why there is no file.
    """

    file: str | None
    of: str | None
    error: str | None


_COLUMNS = tuple(each.name for each in fields(Task))


@dataclass
class Changes:
    """What a run finds to be other than the last one left it: keys."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


class Manifest:
    """Open, and locked for others, until `close`.

    Args:
        folder: of the batch's output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = sqlite3.connect(folder / FILE, isolation_level=None, timeout=0.2, check_same_thread=False)
        try:
            self._open()
        except sqlite3.OperationalError as error:
            self._database.close()
            if "locked" in str(error):
                raise BatchError(f"{folder}: another run is at work in this folder") from error
            raise BatchError(f"{folder / FILE}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise BatchError(f"{folder / FILE} is no manifest of a batch: {error}") from error
        except BatchError:
            self._database.close()
            raise
        self.id = self._about("id")

    def _open(self) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode=EXCLUSIVE")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")  # a loss of power may take the last lines, which are then done again
        execute("BEGIN IMMEDIATE")
        if not execute("SELECT 1 FROM sqlite_master WHERE name = 'about'").fetchone():
            for statement in _SCHEMA.split(";"):
                execute(statement)
            about = {"version": _VERSION, "id": uuid.uuid4().hex}
            self._database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        execute("COMMIT")
        if self._about("version") != _VERSION:
            raise BatchError(f"{self._folder} holds a batch of another version of this program; say another --out")

    def _about(self, name: str) -> str:
        return str(self._database.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()[0])

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------ at the start

    def meet_input(self, source: Path, *, is_meant: bool) -> None:
        """Note what the batch is of.

        Args:
            source: the input.
            is_meant: whether it was said that this folder is for it.

        Raises:
            BatchError: the folder has the batch of another input, and may have it by chance.
        """
        before = self._database.execute("SELECT value FROM about WHERE name = 'input'").fetchone()
        path = str(source.resolve()).encode("utf-8", "backslashreplace").decode()
        if before is not None and before[0] != path and not is_meant:
            ways = f"say --out with another folder, or --out {self._folder} to go on there"
            raise BatchError(f"{self._folder} holds what became of {before[0]}; {ways}")
        self._database.execute("INSERT OR REPLACE INTO about VALUES ('input', ?)", (path,))

    def meet(
        self, rows: Sequence[Row], *, is_all: bool, endpoint: str, retry_failed: bool, bad_keys: Set[str] = frozenset()
    ) -> Changes:
        """Take in what a run is to do.

        Args:
            rows: of the run.
            is_all: whether those are all rows of the batch, so that others are gone from it.
            endpoint: ids of jobs are worth something there only.
            retry_failed: whether what failed is to be tried again.
            bad_keys: of rows that are in the batch, and cannot be done as they are.
        """
        changes = Changes()
        with self._transaction():
            self._forget_jobs_elsewhere(endpoint)
            known = {key for (key,) in self._database.execute("SELECT key FROM rows")}
            foreign = {names.folded(path.stem) for path in self._folder.iterdir() if _may_be_in_the_way(path)}
            if is_all:
                self._let_go(known - {row.key for row in rows} - bad_keys, changes)
            for row in rows:
                self._meet_row(row, row.key not in known, foreign, changes)
            if retry_failed:
                retry = "UPDATE tasks SET state = ?, attempts = 0, job_id = NULL WHERE key = ? AND state = ?"
                self._database.executemany(retry, [(WAITING, row.key, FAILED) for row in rows])
        return changes

    def _let_go(self, keys: Iterable[str], changes: Changes) -> None:
        """Of rows that are not in the batch any more, nothing is to be under way."""
        changes.gone = sorted(keys)
        self._database.executemany("UPDATE rows SET position = NULL WHERE key = ?", [(key,) for key in changes.gone])
        for task in itertools.chain(*(self.tasks(key) for key in changes.gone)):
            if task.state == SENT:
                self._abandon(task)
                self.note_waiting(task)

    def _meet_row(self, row: Row, is_new: bool, foreign: Set[str], changes: Changes) -> None:
        if is_new:
            changes.new.append(row.key)
            stem = self._free_stem(row.name or row.key, row.key, foreign)
            insert = "INSERT INTO rows (key, position, folded, stem) VALUES (?, ?, ?, ?)"
            self._database.execute(insert, (row.key, row.position, names.folded(stem), stem))
        else:
            self._database.execute("UPDATE rows SET position = ? WHERE key = ?", (row.position, row.key))
        before = {task.part: task for task in self.tasks(row.key)}
        differs = len(before) != len(row.parts)
        for number, part in enumerate(row.parts):
            if number not in before or before[number].digest != part.digest:
                differs = True
                self._begin_anew(row.key, number, part, before.get(number))
        for task in [*before.values()][len(row.parts) :]:
            self._abandon(task)
        self._database.execute("DELETE FROM tasks WHERE key = ? AND part >= ?", (row.key, len(row.parts)))
        if differs and before:
            changes.changed.append(row.key)

    def _begin_anew(self, key: str, number: int, part: Part, before: Task | None) -> None:
        if before is not None:
            self._abandon(before)
        file = None if before is None else before.file  # replaced, or removed, once there is another
        insert = "INSERT OR REPLACE INTO tasks (key, part, digest, state, file) VALUES (?, ?, ?, ?, ?)"
        self._database.execute(insert, (key, number, part.digest, WAITING, file))

    def _abandon(self, task: Task) -> None:
        """Nobody wants what it may have under way; it is to be cancelled, in whatever run."""
        if task.state == SENT:
            self._database.execute("INSERT OR IGNORE INTO abandoned VALUES (?)", (task.job_id,))

    def _free_stem(self, name: str, key: str, foreign: Set[str]) -> str:
        """A name for files of which there are none: what a user has in the folder is not written over."""
        stem, number = names.stem_of(name), 1
        while self._is_taken(stem) or not foreign.isdisjoint(map(names.folded, (stem, stem + names.PARTS))):
            stem, number = names.distinct_stem_of(key, number), number + 1
        return stem

    def _is_taken(self, stem: str) -> bool:
        select = "SELECT 1 FROM rows WHERE folded = ?"
        return self._database.execute(select, (names.folded(stem),)).fetchone() is not None

    def _forget_jobs_elsewhere(self, endpoint: str) -> None:
        before = self._database.execute("SELECT value FROM about WHERE name = 'endpoint'").fetchone()
        if before is not None and before[0] != endpoint:
            forget = "UPDATE tasks SET state = ?, job_id = NULL WHERE state = ?"
            self._database.execute(forget, (WAITING, SENT))
            self._database.execute("DELETE FROM abandoned")
        self._database.execute("INSERT OR REPLACE INTO about VALUES ('endpoint', ?)", (endpoint,))

    # ------------------------------------------------------------------------------ what there is

    def tasks(self, key: str | None = None) -> Iterator[Task]:
        """All jobs, in the order of the input; or those of a row."""
        select = f"SELECT {', '.join(_COLUMNS)} FROM tasks JOIN rows USING (key) "
        order = "ORDER BY position, key, part"  # positions are of the run that met the row last: two may be the same
        where = f"WHERE position IS NOT NULL {order}" if key is None else "WHERE key = ? ORDER BY part"
        found = self._database.execute(select + where, () if key is None else (key,))
        for values in found.fetchall():
            named: dict[str, Any] = dict(zip(_COLUMNS, values, strict=True))
            yield Task(**named | {"result": json.loads(named["result"] or "{}")})

    def stem(self, key: str) -> str:
        """The name of a row's file, without extension."""
        return str(self._database.execute("SELECT stem FROM rows WHERE key = ?", (key,)).fetchone()[0])

    def open_rows(self, rows: Iterable[Row], *, retry_failed: bool) -> Iterator[Row]:
        """Those of which something is left to do: what they ask for is not what was done, or has failed for good."""
        over = (DONE,) if retry_failed else (DONE, FAILED)
        for row in rows:
            ended = [task.digest for task in self.tasks(row.key) if task.state in over]
            if ended != [part.digest for part in row.parts]:
                yield row

    def abandoned_jobs(self) -> list[str]:
        """Ids of jobs that nobody wants, and that may be under way."""
        return [job_id for (job_id,) in self._database.execute("SELECT job_id FROM abandoned")]

    def note_cancelled(self, job_id: str) -> None:
        """A job that nobody wants is not under way any more."""
        self._database.execute("DELETE FROM abandoned WHERE job_id = ?", (job_id,))

    def is_done(self, key: str) -> bool:
        """Whether all jobs of a row are."""
        select = "SELECT 1 FROM tasks WHERE key = ? AND state != ? LIMIT 1"
        return self._database.execute(select, (key, DONE)).fetchone() is None

    def joined(self, key: str) -> Joined:
        """What came of joining a row's parts."""
        select = "SELECT joined, joined_of, join_error FROM rows WHERE key = ?"
        return Joined(*self._database.execute(select, (key,)).fetchone())

    def idempotency_key(self, task: Task) -> str:
        """The same for the same job, however often and from whatever run it is sent; another for another text."""
        text = json.dumps([self.id, task.key, task.digest])
        return f"batch-{hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=20).hexdigest()}"

    # ------------------------------------------------------------------------------ what happens

    def note_waiting(self, task: Task) -> None:
        """Nothing of it is under way any more."""
        task.state, task.job_id = WAITING, None
        self._note(task, "state", "job_id", "worker_s", "error_code", "error")

    def note_sent(self, task: Task, job_id: str) -> None:
        task.state, task.job_id = SENT, job_id
        task.attempts += 1
        self._note(task, "state", "job_id", "attempts")

    def note_written(self, task: Task, file: str, num_bytes: int, result: Mapping[str, Any]) -> None:
        """Its audio is whole, under its temporary name."""
        task.state, task.file, task.num_bytes, task.result = WRITTEN, file, num_bytes, dict(result)
        self._note(task, "state", "file", "num_bytes", "result", "worker_s")

    def note_done(self, task: Task) -> None:
        task.state, task.error_code, task.error = DONE, None, None
        self._note(task, "state", "error_code", "error")

    def note_failed(self, task: Task, code: str, message: str) -> None:
        task.state, task.job_id, task.error_code, task.error = FAILED, None, code, message
        self._note(task, "state", "job_id", "error_code", "error", "worker_s")

    def forget_joined(self, key: str) -> None:
        """A row that was a text in parts, and is not any more."""
        update = "UPDATE rows SET joined = NULL, joined_of = NULL, join_error = NULL WHERE key = ?"
        self._database.execute(update, (key,))

    def note_joined(self, key: str, file: str, digest: str) -> None:
        update = "UPDATE rows SET joined = ?, joined_of = ?, join_error = NULL WHERE key = ?"
        self._database.execute(update, (file, digest, key))

    def note_not_joined(self, key: str, digest: str, error: str) -> None:
        update = "UPDATE rows SET joined = NULL, joined_of = ?, join_error = ? WHERE key = ?"
        self._database.execute(update, (digest, error, key))

    def _note(self, task: Task, *columns: str) -> None:
        values = [getattr(task, column) for column in columns]
        values = [json.dumps(value) if isinstance(value, dict) else value for value in values]
        assignments = ", ".join(f"{column} = ?" for column in columns)
        update = f"UPDATE tasks SET {assignments} WHERE key = ? AND part = ?"
        self._database.execute(update, (*values, task.key, task.part))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)


class _Transaction:
    """All or nothing.

    Args:
        database: of which.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")


def _may_be_in_the_way(path: Path) -> bool:
    """Whether a file may have a name that audio, subtitles or a playlist would get."""
    return path.suffix.lower() not in (*SUFFIXES, ".sqlite") and not path.name.startswith((".", FILE))


def digest_of(tasks: Iterable[Task]) -> str:
    """Of what some jobs made together."""
    made = json.dumps([[task.digest, task.file, task.num_bytes] for task in tasks])
    return hashlib.blake2b(made.encode(), digest_size=20).hexdigest()
