"""The queue in a real SQLite."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lfsvc.errors import Internal, NoSuchJob
from lfsvc.job import IllegalChange, Job, State
from lfsvc.service.database import Database
from lfsvc.task import parse


def job(path: str = "/a/x.yaml@0,1#no_eval") -> Job:
    return Job(
        id=0,
        task=parse(path),
        text=path,
        working_directory="/a",
        environment={"K": "ü"},
        warnings=("odd",),
        queued_at=5,
    )


def test_a_job_comes_back_as_it_was(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    added = database.add(job(), b"output_dir: x")
    database.close()
    again = Database(str(tmp_path))
    assert again.get(added.id) == added
    assert (tmp_path / "jobs" / "1" / "snapshot.yaml").read_bytes() == b"output_dir: x"
    assert (tmp_path / "queue.db").stat().st_mode & 0o777 == 0o600
    again.close()


def test_an_illegal_change_cannot_be_stored_by_whatever_way(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    database.add(job(), b"")
    with pytest.raises(IllegalChange):
        database.change(1, State.SUCCEEDED)
    other = sqlite3.connect(tmp_path / "queue.db")
    with pytest.raises(sqlite3.IntegrityError, match="illegal change of state"):
        other.execute("UPDATE jobs SET state = 'succeeded' WHERE id = 1")
    other.close()
    assert database.get(1).state is State.QUEUED
    database.close()


def test_a_job_that_is_put_back_comes_first(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    for _ in range(3):
        database.add(job(), b"")
    database.change(1, State.RUNNING, attempt=1)
    database.change(1, State.QUEUED, at_head=True)
    assert [waiting.id for waiting in database.queued(10)] == [1, 2, 3]
    database.change(2, State.RUNNING)
    database.change(2, State.QUEUED, at_head=True)
    assert [waiting.id for waiting in database.queued(10)] == [2, 1, 3]
    assert database.count_queued() == 3
    database.close()


def test_a_lost_queue_does_not_use_ids_again(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    for _ in range(4):
        database.add(job(), b"")
    database.close()
    for path in tmp_path.glob("queue.db*"):
        path.unlink()
    again = Database(str(tmp_path))
    assert again.add(job(), b"").id == 5
    again.close()


def test_a_failed_submit_leaves_no_job(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    (tmp_path / "jobs" / "1").write_text("in the way")
    with pytest.raises(OSError):
        database.add(job(), b"")
    with pytest.raises(NoSuchJob):
        database.get(1)
    database.close()


def test_a_newer_and_a_damaged_queue_are_refused_with_a_sentence(tmp_path: Path) -> None:
    Database(str(tmp_path)).close()
    connection = sqlite3.connect(tmp_path / "queue.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(Internal, match="was written by a newer lfsvc"):
        Database(str(tmp_path))
    (tmp_path / "queue.db").write_bytes(b"no database at all, and long enough to be looked at" * 50)
    with pytest.raises(Internal, match="cannot be opened"):
        Database(str(tmp_path))


def test_listing_goes_page_by_page(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    for _ in range(7):
        database.add(job(), b"")
    database.change(6, State.CANCELLED)
    newest = database.newest(states=(), limit=3, before=0)
    assert [found.id for found in newest] == [7, 6, 5]
    assert [found.id for found in database.newest(states=(State.QUEUED,), limit=3, before=7)] == [5, 4, 3]
    database.close()
