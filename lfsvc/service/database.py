"""The queue in SQLite: one connection, transactions, migrations. Synchronous: `store` gives it a thread.

Every change of state goes through `job.change` and, below it, a trigger made from the same table, so
a change that is not allowed cannot be stored, whoever writes.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from enum import Enum
from typing import Any

from lfsvc.errors import Internal, NoSuchJob
from lfsvc.files import make_private, replace_file, sync_folder
from lfsvc.job import TRANSITIONS, Job, State, Step, StepState, change
from lfsvc.task import Command, Task

SCHEMA_VERSION = 2

# Columns that hold a value as JSON, and how it becomes a value of Job again.
_JSON: dict[str, Callable[[Any], Any]] = {
    "environment": dict,
    "warnings": tuple,
    "evaluations": tuple,
    "progress": dict,
    "steps": lambda rows: tuple(Step(**{**row, "state": StepState(row["state"])}) for row in rows),
}
_TASK_COLUMNS = ("command", "path", "devices", "evaluate")
_JOB_FIELDS = tuple(field.name for field in fields(Job) if field.name not in ("id", "task"))


def _create(connection: sqlite3.Connection) -> None:
    connection.execute(
        """
        CREATE TABLE jobs (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            position INTEGER NOT NULL DEFAULT 0,
            state TEXT NOT NULL,
            command TEXT NOT NULL, path TEXT NOT NULL, devices TEXT NOT NULL, evaluate INTEGER NOT NULL,
            text TEXT NOT NULL, name TEXT NOT NULL,
            working_directory TEXT NOT NULL, output_dir TEXT NOT NULL,
            environment TEXT NOT NULL, umask INTEGER NOT NULL, requeue INTEGER,
            queued_at INTEGER NOT NULL, started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL,
            attempt INTEGER NOT NULL, interruptions INTEGER NOT NULL, kill_requested_at INTEGER NOT NULL,
            launcher TEXT NOT NULL, instance TEXT NOT NULL, handle TEXT NOT NULL,
            exit_status INTEGER, failed_step TEXT NOT NULL, failure TEXT NOT NULL,
            steps TEXT NOT NULL, log TEXT NOT NULL, parent INTEGER NOT NULL, warnings TEXT NOT NULL
        )"""
    )
    connection.execute("CREATE INDEX jobs_queue ON jobs (position) WHERE state = 'queued'")
    connection.execute("CREATE INDEX jobs_state ON jobs (state, id)")
    connection.execute("CREATE TABLE transitions (old TEXT NOT NULL, new TEXT NOT NULL, UNIQUE (old, new))")
    connection.executemany(
        "INSERT INTO transitions VALUES (?, ?)",
        [(old.value, new.value) for old, allowed in TRANSITIONS.items() for new in allowed],
    )
    connection.execute(
        """
        CREATE TRIGGER legal_change BEFORE UPDATE OF state ON jobs
        WHEN OLD.state <> NEW.state
            AND NOT EXISTS (SELECT 1 FROM transitions WHERE old = OLD.state AND new = NEW.state)
        BEGIN SELECT RAISE(ABORT, 'illegal change of state'); END"""
    )


def _add_what_a_job_made(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE jobs ADD COLUMN model TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE jobs ADD COLUMN progress TEXT NOT NULL DEFAULT '{}'")
    connection.execute("ALTER TABLE jobs ADD COLUMN evaluations TEXT NOT NULL DEFAULT '[]'")


# MIGRATIONS[n] brings a database of version n to n + 1. Only ever appended to.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create, _add_what_a_job_made)
assert len(MIGRATIONS) == SCHEMA_VERSION


class Database:
    """The queue of one state folder. Not safe to use from two threads."""

    def __init__(self, state_folder: str) -> None:
        """Open or make the queue.

        Raises:
            Internal: it cannot be opened, is damaged, or is of a newer version.
        """
        self.jobs_folder = os.path.join(state_folder, "jobs")
        path = os.path.join(state_folder, "queue.db")
        try:
            make_private(self.jobs_folder)
            # Made here with its mode; SQLite gives the -wal and -shm files beside it the same.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=10)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            # A commit is on the disk when it returns: an acknowledged job survives a power cut.
            self._connection.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except (sqlite3.Error, OSError) as error:
            raise Internal(
                f"The queue {path} cannot be opened: {error}.",
                "mend what the sentence names; a damaged queue.db can be moved away, jobs/ keeps their files",
            ) from error

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _migrate(self, path: str) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise Internal(
                f"The queue {path} was written by a newer lfsvc (format {version}, this one knows {SCHEMA_VERSION}).",
                "install that version again",
            )
        for step in range(version, SCHEMA_VERSION):
            with self._transaction():
                MIGRATIONS[step](self._connection)
                if step == 0:
                    self._skip_used_ids()
                self._connection.execute(f"PRAGMA user_version = {step + 1}")

    def _skip_used_ids(self) -> None:
        # The folders of a queue.db that was lost: their results must not be taken for those of new jobs.
        used = [int(name) for name in os.listdir(self.jobs_folder) if name.isdigit()]
        if used:
            self._connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('jobs', ?)", (max(used),))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def job_folder(self, job_id: int) -> str:
        """The folder of a job's documents."""
        return os.path.join(self.jobs_folder, str(job_id))

    def add(self, job: Job, snapshot: bytes) -> Job:
        """Queue a job at the back; give it with its id. `job.id` is ignored.

        When this returns, both the row and the snapshot are durable.
        """
        with self._transaction():
            added = self._insert(job)
            self._write_snapshot(added, snapshot)
        return added

    def _insert(self, job: Job) -> Job:
        row = _row_of(job)
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        cursor = self._connection.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", tuple(row.values()))  # noqa: S608 - names of our own columns
        assert cursor.lastrowid is not None
        self._connection.execute("UPDATE jobs SET position = id WHERE id = ?", (cursor.lastrowid,))
        return replace(job, id=cursor.lastrowid)

    def _write_snapshot(self, job: Job, snapshot: bytes) -> None:
        # Before the commit: a crash leaves a folder without a job, never a job without its file.
        folder = self.job_folder(job.id)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        replace_file(os.path.join(folder, snapshot_name(job.task.command)), snapshot, durable=True)
        sync_folder(self.jobs_folder)

    def change(self, job_id: int, to: State, *, at_head: bool = False, **values: Any) -> Job:
        """Change a job's state and other fields in one transaction; `at_head` puts it before all that wait.

        Raises:
            IllegalChange: the state machine has no such change from the state that is stored.
            NoSuchJob: there is no such job.
        """
        with self._transaction():
            job = change(self.get(job_id), to, **values)
            self._update(job)
            if at_head:
                self._put_at_head(job_id)
        return job

    def end(
        self, job_id: int, to: State, *, followers: Sequence[tuple[Job, bytes]], at_head: bool, **values: Any
    ) -> tuple[Job, list[Job]]:
        """End a job and queue what follows from it, with their snapshots, in one transaction.

        `at_head` puts the followers before all that wait, in their order. Gives the job and the followers.

        Raises:
            IllegalChange, NoSuchJob: as `change`.
        """
        with self._transaction():
            job = change(self.get(job_id), to, **values)
            added = []
            for follower, snapshot in followers:
                added.append(self._insert(replace(follower, parent=job_id)))
                self._write_snapshot(added[-1], snapshot)
            for follower in reversed(added if at_head else []):
                self._put_at_head(follower.id)
            job = replace(job, evaluations=tuple(follower.id for follower in added))
            self._update(job)
        return job, added

    def _put_at_head(self, job_id: int) -> None:
        self._connection.execute(
            "UPDATE jobs SET position = "
            "(SELECT COALESCE(MIN(position), id) - 1 FROM jobs WHERE state = 'queued') WHERE id = ?",
            (job_id,),
        )

    def update(self, job_id: int, **values: Any) -> Job:
        """Change fields other than the state."""
        assert "state" not in values
        with self._transaction():
            job = replace(self.get(job_id), **values)
            self._update(job)
        return job

    def _update(self, job: Job) -> None:
        row = _row_of(job)
        assignments = ", ".join(f"{name} = ?" for name in row)
        self._connection.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*row.values(), job.id))  # noqa: S608 - names of our own columns

    def get(self, job_id: int) -> Job:
        """Give a job.

        Raises:
            NoSuchJob: there is none with this id.
        """
        # SQLite's integers are signed; what does not fit cannot be an id.
        row = (
            self._connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if job_id < 2**63
            else None
        )
        if row is None:
            newest = self._connection.execute("SELECT MAX(id) FROM jobs").fetchone()[0]
            last = f"the newest is job {newest}; " if newest else ""
            raise NoSuchJob(f"No job {job_id}.", f"{last}lfsvc list shows the last 100")
        return _job_of(row)

    def running(self) -> list[Job]:
        """Give the jobs that run, oldest first."""
        return self._jobs("WHERE state = 'running' ORDER BY id", ())

    def queued(self, limit: int) -> list[Job]:
        """Give the first jobs that wait, in the order in which they will run."""
        return self._jobs("WHERE state = 'queued' ORDER BY position LIMIT ?", (limit,))

    def count_queued(self) -> int:
        """Say how many jobs wait."""
        return int(self._connection.execute("SELECT COUNT(*) FROM jobs WHERE state = 'queued'").fetchone()[0])

    def output_folders(self) -> list[tuple[int, str]]:
        """Give id and output_dir of all jobs that run or wait, in the order in which they run."""
        rows = self._connection.execute(
            "SELECT id, output_dir FROM jobs WHERE state IN ('running', 'queued') ORDER BY state DESC, position"
        )
        return [(row["id"], row["output_dir"]) for row in rows]

    def newest(self, *, states: tuple[State, ...], limit: int, before: int) -> list[Job]:
        """Give the newest jobs, newest first; `states` () means all, `before` 0 means from the newest on."""
        conditions = []
        values: list[Any] = []
        if states:
            conditions.append(f"state IN ({', '.join('?' * len(states))})")
            values += [state.value for state in states]
        if before:
            conditions.append("id < ?")
            values.append(min(before, 2**63 - 1))
        where = "WHERE " + " AND ".join(conditions) if conditions else ""
        return self._jobs(f"{where} ORDER BY id DESC LIMIT ?", (*values, limit))

    def _jobs(self, tail: str, values: tuple[Any, ...]) -> list[Job]:
        return [_job_of(row) for row in self._connection.execute(f"SELECT * FROM jobs {tail}", values)]  # noqa: S608 - the tails above


def snapshot_name(command: Command) -> str:
    """The name of a snapshot in its job's folder. Without a blank, which the launcher could not take."""
    return "snapshot.sh" if command is Command.SHELL else "snapshot.yaml"


def _row_of(job: Job) -> dict[str, Any]:
    row: dict[str, Any] = {
        "command": job.task.command.value,
        "path": job.task.path,
        "devices": json.dumps(job.task.devices),
        "evaluate": int(job.task.evaluate),
    }
    for name in _JOB_FIELDS:
        value = getattr(job, name)
        if name == "steps":
            value = json.dumps([asdict(step) for step in value])
        elif name in _JSON:
            value = json.dumps(value)
        elif isinstance(value, Enum):
            value = value.value
        elif isinstance(value, bool):
            value = int(value)
        row[name] = value
    return row


def _job_of(row: sqlite3.Row) -> Job:
    """Make the Job of a row; an unknown word in it is an error, never a default."""
    values = {name: row[name] for name in _JOB_FIELDS}
    for name, read in _JSON.items():
        values[name] = read(json.loads(values[name]))
    values["state"] = State(values["state"])
    values["requeue"] = None if values["requeue"] is None else bool(values["requeue"])
    task = Task(
        command=Command(row["command"]),
        path=row["path"],
        devices=tuple(json.loads(row["devices"])),
        evaluate=bool(row["evaluate"]),
    )
    return Job(id=row["id"], task=task, **values)
