"""The database on a thread of its own: an fsync beside a checkpoint can take seconds, and the loop goes on."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lfsvc.errors import Internal
from lfsvc.job import Job, State
from lfsvc.service.database import Database

T = TypeVar("T")


class Store:
    """The queue, for the event loop. Calls are carried out one after another, in their order.

    What a method has returned is durable. Every method raises Internal where the disk fails; then
    nothing has changed.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._database: Database | None = None

    async def open(self, state_folder: str) -> None:
        """Open the queue of a state folder, which the caller has locked."""
        self._database = await asyncio.get_running_loop().run_in_executor(self._executor, Database, state_folder)

    async def close(self) -> None:
        """Finish what was asked for, then close."""
        if self._database is not None:
            await self._call(self._database.close)
        self._executor.shutdown()

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        def call() -> T:
            try:
                return function(*args, **kwargs)
            except (sqlite3.Error, OSError) as error:
                raise Internal(
                    f"The queue cannot be written or read: {error}.", "look at the disk of the state folder"
                ) from error

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    @property
    def _open_database(self) -> Database:
        assert self._database is not None, "the store is opened before it is used"
        return self._database

    def job_folder(self, job_id: int) -> str:
        """The folder of a job's documents."""
        return self._open_database.job_folder(job_id)

    async def add(self, job: Job, snapshot: bytes) -> Job:
        """Queue a job at the back; give it with its id."""
        return await self._call(self._open_database.add, job, snapshot)

    async def change(self, job_id: int, to: State, *, at_head: bool = False, **values: Any) -> Job:
        """Change a job's state; IllegalChange where the state machine has no such change."""
        return await self._call(self._open_database.change, job_id, to, at_head=at_head, **values)

    async def end(
        self, job_id: int, to: State, *, followers: Sequence[tuple[Job, bytes]], at_head: bool, **values: Any
    ) -> tuple[Job, list[Job]]:
        """End a job and queue what follows from it in one transaction."""
        return await self._call(self._open_database.end, job_id, to, followers=followers, at_head=at_head, **values)

    async def output_folders(self) -> list[tuple[int, str]]:
        """Give id and output_dir of all jobs that run or wait."""
        return await self._call(self._open_database.output_folders)

    async def update(self, job_id: int, **values: Any) -> Job:
        """Change fields other than the state."""
        return await self._call(self._open_database.update, job_id, **values)

    async def get(self, job_id: int) -> Job:
        """Give a job; NoSuchJob where there is none."""
        return await self._call(self._open_database.get, job_id)

    async def running(self) -> list[Job]:
        """Give the jobs that run."""
        return await self._call(self._open_database.running)

    async def queued(self, limit: int) -> list[Job]:
        """Give the first jobs that wait, in their order."""
        return await self._call(self._open_database.queued, limit)

    async def count_queued(self) -> int:
        """Say how many jobs wait."""
        return await self._call(self._open_database.count_queued)

    async def newest(self, *, states: tuple[State, ...] = (), limit: int = 100, before: int = 0) -> list[Job]:
        """Give the newest jobs, newest first."""
        return await self._call(self._open_database.newest, states=states, limit=limit, before=before)
