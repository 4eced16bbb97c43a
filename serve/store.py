"""v2 jobs on disk, so that they outlive the process: SQLite for what is known of them, files for their pictures.

Every change is one transaction that is on the disk when the call returns. Calls block: they are made from one thread.
A job's picture files are named when it is accepted and appear whole or not at all, so a job whose files are all there
was drawn, even if the process ended before it could say so.

One server writes in a folder: the one that holds the lock of `owner.sqlite`, for as long as its process lives and no
longer, however it ends. Another one reads what the first has written.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import VegaEdgeError
from ..whole_file import writing
from .record import COMPLETED, FAILED, PROCESSING, QUEUED, Record, record_of

_VERSION = 1
_PROBE_BYTES, _PROMPT_BYTES = 4_000_000, 64 * 1024  # a large picture, and the longest prompt
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    client TEXT NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL, options TEXT NOT NULL, base64 INTEGER NOT NULL,
    files TEXT NOT NULL, error TEXT, metrics TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL, finished REAL
);
CREATE INDEX by_status ON jobs (status, number);
"""
_COLUMNS = {"number", "id", "status", "attempts", "client", "model", "prompt", "options", "base64", "files", "error",
            "metrics", "created", "finished"}  # fmt: skip


class StoreError(VegaEdgeError):
    """The jobs can't be kept now: locked, full or damaged; it may pass."""


class Taken(StoreError):
    """Another server writes in this folder; its jobs can be read."""


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = folder / "generations"
        self._database = folder / "jobs.sqlite"
        self._owned: sqlite3.Connection | None = None  # open while this process is the one that writes
        self._connection: sqlite3.Connection | None = None
        self.set_aside: Path | None = None  # a database that was damaged

    def open(self) -> None:
        """Open the folder for writing; does nothing if it is open. A damaged database is set aside and a new one begun.

        Raises Taken where another server writes, StoreError for anything else that may pass: a full disk, a folder that
        can't be written to.
        """
        if self._connection is not None:
            return
        with _as_store_error(self._database):
            self.folder.mkdir(0o700, parents=True, exist_ok=True)  # prompts and pictures are their owner's
            self.pictures.mkdir(exist_ok=True)
            self._own()
            try:
                self._connection = self._connected()
            except BaseException:
                self.close()  # or nobody could write
                raise

    def _own(self) -> None:
        """Takes the folder's lock: an empty database in which a transaction never ends."""
        if self._owned is not None:
            return
        owned = sqlite3.connect(
            self.folder / "owner.sqlite", timeout=0.0, isolation_level=None, check_same_thread=False
        )
        try:
            owned.execute("PRAGMA journal_mode=MEMORY")
            owned.execute("BEGIN EXCLUSIVE")
        except BaseException as error:
            owned.close()
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise Taken(
                    f"{self.folder} is in use by another server: send new jobs to that one; this one reads its jobs, "
                    "and takes over when it ends"
                ) from error
            raise
        self._owned = owned

    def _connected(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._move_aside()
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._database, timeout=0.5, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            connection.text_factory = _text  # or one damaged text would keep all of them from being read
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise _of_version(version)
            if version == 0:
                if connection.execute("SELECT name FROM sqlite_master").fetchone():
                    raise sqlite3.DatabaseError("it has tables, and no version")
                connection.executescript(f"BEGIN EXCLUSIVE;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;")
            elif missing := _COLUMNS - {row["name"] for row in connection.execute("PRAGMA table_info(jobs)")}:
                raise sqlite3.DatabaseError(f"its table of jobs has no {', '.join(sorted(missing))}")
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _move_aside(self) -> None:
        aside = self._database.with_name(f"jobs-damaged-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.sqlite")
        os.replace(self._database, aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._database}{suffix}", f"{aside}{suffix}")
        self.set_aside = aside

    def close(self) -> None:
        for connection in (self._connection, self._owned):
            if connection is not None:
                connection.close()
        self._connection = self._owned = None

    def add(self, record: Record) -> None:
        self._write(
            "INSERT INTO jobs (id, status, client, model, prompt, options, base64, files, metrics, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            record.id, record.status, record.client, record.model, record.prompt, json.dumps(dict(record.options)),
            record.base64, json.dumps(list(record.files)), _metrics(record.metrics, record.adjusted),
            record.created,
        )  # fmt: skip

    def drop(self, job: str) -> None:
        self._write("DELETE FROM jobs WHERE id = ?", job)

    def begin(self, job: str) -> None:
        self._write("UPDATE jobs SET status = ?, attempts = attempts + 1 WHERE id = ?", PROCESSING, job)

    def put_back(self, job: str) -> None:
        """It was stopped, through no fault of its own, and waits again."""
        self._write(
            "UPDATE jobs SET status = ?, attempts = max(attempts - 1, 0) WHERE id = ? AND status = ?",
            QUEUED, job, PROCESSING,
        )  # fmt: skip

    def complete(self, job: str, metrics: Mapping[str, Any], adjusted: Sequence[str] = ()) -> None:
        self._end(job, COMPLETED, None, _metrics(metrics, adjusted))

    def fail(self, job: str, error: str, metrics: Mapping[str, Any]) -> None:
        self._end(job, FAILED, error, _metrics(metrics))

    def _end(self, job: str, status: str, error: str | None, metrics: str) -> None:
        """The first end counts; there is no second."""
        self._write(
            "UPDATE jobs SET status = ?, error = ?, metrics = ?, finished = ? WHERE id = ? AND status IN (?, ?)",
            status, error, metrics, time.time(), job, QUEUED, PROCESSING,
        )  # fmt: skip

    def get(self, job: str) -> Record | None:
        """Also where another server writes."""
        query = "SELECT * FROM jobs WHERE id = ?"
        rows = self._read(query, job) if self._connection else self._read_from_other_server(query, job)
        return record_of(rows[0]) if rows else None

    def recover(self) -> list[Record]:
        """After a start: what is still to be drawn, in order. A job that was being drawn when the process ended waits
        again, once; the second time it has failed. One whose pictures are all there has been drawn."""
        for record in self._readable(PROCESSING):
            if all((self.pictures / file).is_file() for file in record.files):
                self.complete(record.id, _since(record), record.adjusted)
            elif record.attempts > 1:
                self.fail(record.id, f"the server ended {record.attempts} times while it drew this", _since(record))
            else:
                self._write("UPDATE jobs SET status = ? WHERE id = ?", QUEUED, record.id)
        return self._readable(QUEUED)

    def _readable(self, status: str) -> list[Record]:
        """In order. Those that can't be read have failed, each for itself."""
        found = [record_of(row) for row in self._read("SELECT * FROM jobs WHERE status = ? ORDER BY number", status)]
        for record in found:
            if record.status == FAILED:
                self.fail(record.id, str(record.error), {})
        return [record for record in found if record.status != FAILED]

    def expire(self, before: float) -> int:
        """Forgets jobs that ended before a time, in seconds since 1970, and their pictures; also files of nobody."""
        rows = self._read("SELECT id FROM jobs WHERE finished < ?", before)
        self._write("DELETE FROM jobs WHERE finished < ?", before)
        known = {file for row in self._read("SELECT * FROM jobs") for file in record_of(row).files}
        with _as_store_error(self.pictures):
            paths = list(self.pictures.iterdir())
        for path in paths:
            with contextlib.suppress(OSError):
                if path.name not in known and path.stat().st_mtime < before:
                    path.unlink()
        return len(rows)

    def save(self, name: str, data: bytes) -> None:
        """A picture, whole or not at all."""
        with _as_store_error(self.pictures), writing(self.pictures / name) as file:
            file.write(data)

    def probe(self) -> None:
        """StoreError where the disk does not take a job and its picture now. Nothing of it stays."""
        name = f"{secrets.token_urlsafe(24)}.jpeg"
        with _as_store_error(self.pictures):
            self.pictures.mkdir(exist_ok=True)
        try:
            self.save(name, bytes(_PROBE_BYTES))
        finally:
            with contextlib.suppress(OSError):
                (self.pictures / name).unlink()
        job = Record(name, FAILED, 0, "", "", " " * _PROMPT_BYTES, {}, False, (), "", {}, time.time())
        self.add(job)
        self.drop(job.id)

    def _write(self, text: str, *values: Any) -> None:
        with _as_store_error(self._database):
            self._required().execute(text, values)

    def _read(self, text: str, *values: Any) -> list[sqlite3.Row]:
        with _as_store_error(self._database):
            return self._required().execute(text, values).fetchall()

    def _read_from_other_server(self, text: str, *values: Any) -> list[sqlite3.Row]:
        """By a connection of its own each time: the other server may set the file aside and begin a new one."""
        with _as_store_error(self._database):
            uri = f"{self._database.resolve().as_uri()}?mode=rw"  # rw: reading a write-ahead log writes its index
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=0.5, isolation_level=None)) as connection:
                connection.row_factory, connection.text_factory = sqlite3.Row, _text
                connection.execute("PRAGMA query_only=1")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version != _VERSION:
                    raise _of_version(version)
                return connection.execute(text, values).fetchall()

    def _required(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self._database} is not open")
        return self._connection


def _of_version(version: int) -> sqlite3.OperationalError:
    return sqlite3.OperationalError(f"it is of version {version}, this program reads {_VERSION}")


@contextlib.contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        cure = "another server uses it: stop that one, or give this one another --data folder"
        text = str(error)
        raise StoreError(f"{path} can't be used: {text}{f'; {cure}' if 'locked' in text else ''}") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} can't be used: {error}") from error
    except OSError as error:
        raise StoreError(f"{path} can't be used: {error.strerror or error}") from error


def _since(record: Record) -> dict[str, float]:
    return {"total_time": round(time.time() - record.created, 4)}


def _metrics(metrics: Mapping[str, Any], adjusted: Sequence[str] = ()) -> str:
    return json.dumps({**metrics, **({"adjusted": list(adjusted)} if adjusted else {})})


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
