"""The queue in a real SQLite."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
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


def test_the_end_of_a_training_and_its_evaluations_are_one_transaction(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    for _ in range(3):
        database.add(job(), b"")
    database.change(1, State.RUNNING, attempt=1)
    evaluations = [(job("eval:/a/one.yaml"), b"one"), (job("eval:/a/two.yaml"), b"two")]
    with pytest.raises(IllegalChange):
        database.end(2, State.SUCCEEDED, followers=evaluations, at_head=False)
    assert database.count_queued() == 2
    ended, added = database.end(1, State.SUCCEEDED, followers=evaluations, at_head=True, model="/a/merged")
    assert (ended.evaluations, ended.model) == ((4, 5), "/a/merged")
    assert database.get(1) == ended
    assert [follower.parent for follower in added] == [1, 1]
    assert [waiting.id for waiting in database.queued(10)] == [4, 5, 2, 3]
    assert (tmp_path / "jobs" / "5" / "snapshot.yaml").read_bytes() == b"two"
    database.change(4, State.RUNNING, attempt=1)
    database.end(4, State.SUCCEEDED, followers=evaluations[:1], at_head=False)
    assert [waiting.id for waiting in database.queued(10)] == [5, 2, 3, 6]
    database.close()


def test_jobs_ahead_are_named_with_their_folders_in_their_order(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    for number in range(4):
        database.add(replace(job(), output_dir=f"/out/{number}"), b"")
    database.change(1, State.RUNNING, attempt=1)
    database.end(1, State.FAILED, followers=(), at_head=False)
    database.change(3, State.RUNNING, attempt=1)
    assert database.output_folders() == [(3, "/out/2"), (2, "/out/1"), (4, "/out/3")]
    database.close()


@pytest.mark.parametrize("stored", sorted((Path(__file__).parent.parent / "data").glob("queue-v*.sql")), ids=str)
def test_every_queue_that_was_ever_stored_loads(tmp_path: Path, stored: Path) -> None:
    connection = sqlite3.connect(tmp_path / "queue.db")
    connection.executescript(stored.read_text())
    connection.close()
    database = Database(str(tmp_path))
    failed, waiting = database.get(1), database.get(2)
    assert (failed.state, failed.name, failed.task.devices, failed.environment) == (
        State.FAILED, "first", (0, 1), {"A": "b"},
    )  # fmt: skip
    assert (failed.model, failed.progress, failed.evaluations) == ("", {}, ())
    assert failed.steps[0].log == "/lab/saves/run/x.log"
    assert (waiting.state, waiting.requeue) == (State.QUEUED, True)
    assert database.add(job(), b"").id == 3
    database.close()
