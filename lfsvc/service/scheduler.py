"""The policy: what starts next, what an end means, what a kill does. One task starts jobs, one watches each.

A change is a transaction first; what follows from it (starting a unit, telling the listeners) comes
after the commit and is found again by `reconcile` where a crash falls between.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from lfsvc import documents, journal
from lfsvc.config import Config
from lfsvc.errors import Internal, JobEnded, LfsvcError, NoRunningJob, ShuttingDown
from lfsvc.job import NOTHING_RAN, Job, State
from lfsvc.llamafactory.checks import Ahead
from lfsvc.service import evaluations
from lfsvc.service.admission import Options, admit
from lfsvc.service.events import Listener, Log
from lfsvc.service.launchers.base import CannotStart, Launcher, Refused, Start, boot_id
from lfsvc.service.running import Running
from lfsvc.service.specs import Surroundings, spec_of
from lfsvc.service.store import Store
from lfsvc.service.verdict import Verdict, judge, main_log

# A job counts as started when its runner's first document says so; its datagram may be lost.
FIRST_STATUS_SECONDS = 2.0

# After a disk that failed, how long until the end of a job is tried to be stored again.
RETRY_SECONDS = 5.0

# How long the evaluations of a training may take to be made: its end must be stored, too.
FOLLOW_UP_SECONDS = 60.0


# Jobs with their snapshots that the end of another queues, and its warnings about them.
FollowUps = tuple[Sequence[tuple[Job, bytes]], Sequence[str]]


class Scheduler:
    """Owns the queue. All methods are for the event loop."""

    def __init__(
        self,
        *,
        store: Store,
        launcher: Launcher,
        others: Mapping[str, Launcher],
        config: Config,
        surroundings: Surroundings,
        log: Log,
    ) -> None:
        """`others`: launchers that jobs of an earlier service may have been started by, by name."""
        self._store = store
        self._launcher = launcher
        self._launchers = {**others, launcher.name: launcher}
        self.config = config
        self._surroundings = surroundings
        self._log = log
        self._listeners: list[Listener] = []
        # For files of the user's, on file systems that may not answer: what the queue needs has other threads.
        self._files = ThreadPoolExecutor(max_workers=4, thread_name_prefix="files")
        self._running: dict[int, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        # Choosing, killing and ending a job are each one decision about the stored state.
        self._lock = asyncio.Lock()
        self._instance = ""
        self._stopping = False
        self._journal_spent: list[list[int]] = []
        self.queue_length = 0

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of every change from now on."""
        self._listeners.append(listener)

    def _tell(self, event: str, *arguments: Job) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, event)(*arguments)
            except Exception as error:
                # It is stored; who cannot be told must not keep the queue.
                self._log.fault(error)

    # -- what clients ask ------------------------------------------------------------------------

    async def check(self, text: str, options: Options) -> tuple[str, ...]:
        """Say what `submit` would: its warnings, or the error that it would raise."""
        return (await self._admit(text, options))[0].warnings

    async def submit(self, text: str, options: Options) -> Job:
        """Queue a task; when this returns, the job survives any crash."""
        self._refuse_when_stopping()
        job, snapshot = await self._admit(text, options)
        self._refuse_when_stopping()
        job = await self._store.add(replace(job, queued_at=_now()), snapshot)
        self.queue_length += 1
        self._tell("queued", job)
        self._tell("changed")
        self._wake.set()
        return job

    async def _admit(self, text: str, options: Options) -> tuple[Job, bytes]:
        # A script is not judged by what comes before it, and thousands may.
        folders = [] if text.endswith(".sh") else await self._store.output_folders()
        ahead = [Ahead(job_id=number, output_dir=folder) for number, folder in folders]
        admitted = await asyncio.get_running_loop().run_in_executor(
            self._files,
            lambda: admit(
                text,
                options,
                config=self.config,
                service_environment=self._surroundings.environment,
                environment_file=self._surroundings.environment_file(),
                default_umask=self._surroundings.umask,
                ahead=ahead,
            ),
        )
        return admitted.job, admitted.snapshot

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise ShuttingDown("The scheduler is stopping and takes nothing in.", "try again when it is back")

    async def get(self, job_id: int) -> Job:
        """Give a job with its present steps; NoSuchJob where there is none."""
        running = self._running.get(job_id)
        return running.view if running is not None else await self._store.get(job_id)

    async def newest(self, *, states: Sequence[State], limit: int, before: int) -> list[Job]:
        """Give the newest jobs, newest first."""
        jobs = await self._store.newest(states=tuple(states), limit=limit, before=before)
        return [self._running[job.id].view if job.id in self._running else job for job in jobs]

    def running(self) -> list[Job]:
        """Give the jobs that run."""
        return [running.view for running in self._running.values()]

    async def queued(self, limit: int) -> list[Job]:
        """Give the first jobs that wait, in their order."""
        return await self._store.queued(limit)

    async def kill_running(self) -> Job:
        """Kill the job that runs; NoRunningJob where none does."""
        if not self._running:
            raise NoRunningJob("No job is running.", "lfsvc status shows what waits; lfsvc kill ID cancels it")
        return await self.kill(min(self._running))

    async def kill(self, job_id: int) -> Job:
        """Kill a running job or cancel a waiting one; returns when the intent is durable."""
        async with self._lock:
            job = await self._store.get(job_id)
            if job.ended:
                raise JobEnded(f"Job {job_id} has ended already ({job.state.value}).", f"lfsvc show {job_id} tells how")
            if job.state is State.QUEUED:
                job = await self._store.change(job_id, State.CANCELLED, finished_at=_now(), exit_status=NOTHING_RAN)
                self.queue_length -= 1
                self._tell("finished", job)
                self._tell("changed")
                return job
            if not job.kill_requested_at:
                job = await self._store.update(job_id, kill_requested_at=_now())
                self._tell("kill_requested", job)
            running = self._running[job_id]
            running.job = replace(running.job, kill_requested_at=job.kill_requested_at)
        self._spawn(running.launcher.stop(job_id))
        return job

    # -- life ------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take up the queue: attach to jobs that run, take in the ends that were missed."""
        self._instance = await self._launcher.instance()
        self.queue_length = await self._store.count_queued()
        for job in await self._store.running():
            await self._reconcile(job)

    async def run(self) -> None:
        """Start jobs, one after another, until `stop` is called; a start under way is finished first.

        Cut off in the middle, a start would leave a runner of which nobody wrote down where it is.
        """
        self._wake.set()
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            try:
                while not self._stopping and await self._start_next():
                    pass
            except LfsvcError as error:
                self._log.write(f"No job can be started: {error.text}", journal.ERROR)
                asyncio.get_running_loop().call_later(RETRY_SECONDS, self._wake.set)

    async def stop(self) -> None:
        """Stop deciding. Jobs go on; what ends from now on is taken in by the next service."""
        self._stopping = True
        self._wake.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._files.shutdown(wait=False, cancel_futures=True)

    def on_nudge(self, job_id: int) -> None:
        """A runner says that its documents have changed."""
        if job_id in self._running:
            self._spawn(self._nudged(self._running[job_id]))

    async def _nudged(self, running: Running) -> None:
        before = running.status
        await self._read_status(running)
        if any(before.get(key) != running.status.get(key) for key in ("progress", "step")):
            self._tell("progressed", running.view)
        self._tell("changed")

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.fault(error)

    # -- starting --------------------------------------------------------------------------------

    async def _start_next(self) -> bool:
        """Start the job whose turn it is; False where there is none or nothing may start."""
        async with self._lock:
            if self._running:
                return False
            waiting = await self._store.queued(1)
            if not waiting:
                return False
            job = await self._store.change(
                waiting[0].id,
                State.RUNNING,
                attempt=waiting[0].attempt + 1,
                started_at=_now(),
                launcher=self._launcher.name,
                instance=self._instance,
                handle="",
            )
            self.queue_length -= 1
            running = self._running[job.id] = Running(job=job, launcher=self._launcher)
        return await self._launch(running)

    async def _launch(self, running: Running) -> bool:
        job = running.job
        start = self._start_of(job)
        try:
            await asyncio.to_thread(self._write_spec, job)
            handle = await self._launcher.start(start)
        except Refused as refused:
            await self._put_back(job)
            self._log.write(f"Job {job.id} stays queued: {refused}", journal.NOTICE)
            return False
        except Exception as error:
            # Whatever it is, it is this job's end and not the queue's.
            if not isinstance(error, CannotStart | OSError | LfsvcError):
                self._log.fault(error)
            text = error.text if isinstance(error, LfsvcError) else str(error)
            verdict = Verdict(state=State.FAILED, exit_status=NOTHING_RAN, failure=text)
            await self._surely(job, lambda: self._store_end(running, verdict))
            return True
        # The handle tells a later service which run this was; it would find the unit by name as well.
        running.job = replace(running.job, handle=handle)
        self._spawn(self._watch(running, announce=True))
        try:
            await self._store.update(job.id, handle=handle)
        except Internal as error:
            self._log.write(f"Job {job.id} runs, but that cannot be stored: {error}", journal.ERROR)
        if running.job.kill_requested_at:
            # It was asked for while the unit did not exist yet.
            await self._launcher.stop(job.id)
        return True

    async def _put_back(self, job: Job) -> None:
        """Undo a start of which nothing ran."""
        async with self._lock:
            await self._store.change(
                job.id, State.QUEUED, at_head=True, attempt=job.attempt - 1, started_at=0, handle=""
            )
            # Together: nobody may see an empty queue between them.
            self._running.pop(job.id, None)
            self.queue_length += 1

    def _start_of(self, job: Job) -> Start:
        return Start(
            job_id=job.id,
            title=job.title,
            folder=self._store.job_folder(job.id),
            grace_seconds=self.config.kill_grace,
        )

    def _write_spec(self, job: Job) -> None:
        folder = self._store.job_folder(job.id)
        spec = spec_of(
            job, folder=folder, config=self.config, surroundings=self._surroundings, journal_spent=self._journal_spent
        )
        documents.write(folder, documents.SPEC, spec)

    # -- ending ----------------------------------------------------------------------------------

    async def _watch(self, running: Running, *, announce: bool) -> None:
        """Follow a job to its end. Its start is announced when its first step has begun."""
        job_id = running.job.id
        end = asyncio.ensure_future(running.launcher.wait(job_id))
        try:
            if announce:
                first = asyncio.ensure_future(running.first_status.wait())
                await asyncio.wait({end, first}, timeout=FIRST_STATUS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                first.cancel()
                await self._read_status(running)
                self._tell("started", running.view)
                self._tell("changed")
            reason = await end
        finally:
            end.cancel()
        await self._take_in_end(running, reason)

    async def _read_status(self, running: Running) -> None:
        status = await self._read(running.job, documents.STATUS)
        if status is not None:
            running.status = status
            running.first_status.set()

    async def _read(self, job: Job, name: str) -> dict[str, Any] | None:
        """Read a document of the present attempt; a damaged one is as good as none, but it is said."""
        folder = self._store.job_folder(job.id)
        try:
            return await asyncio.to_thread(documents.read, folder, name, attempt=job.attempt)
        except documents.Unreadable as error:
            self._log.write(f"Job {job.id}: {error}", journal.WARNING)
            return None

    async def _take_in_end(self, running: Running, reason: str) -> None:
        """Store what became of a job whose processes are gone."""
        job = running.job
        result = await self._read(job, documents.RESULT)
        decided = (result is not None and not result["stopped"]) or job.kill_requested_at
        if not decided and await running.launcher.going_down():
            # Was it stopped by hand, or by the machine's end? The next service sees another instance.
            self._log.write(f"Job {job.id} ended while the user manager is stopping", journal.NOTICE)
            self._stopping = True
            return
        await self._conclude(running, result, reason, interrupted=False)

    async def _conclude(
        self, running: Running, result: Mapping[str, Any] | None, reason: str, *, interrupted: bool
    ) -> None:
        status = None if result is not None else await self._read(running.job, documents.STATUS)
        self._journal_spent = (result or status or {}).get("journal_spent", self._journal_spent)
        follow_ups: list[FollowUps] = []

        async def conclude() -> None:
            # Judged anew at each try: a kill may have come in while the disk was full.
            verdict = judge(
                running.job,
                result=result,
                status=status,
                reason=reason,
                interrupted=interrupted,
                requeue=running.job.may_requeue(default=self.config.requeue),
            )
            if evaluations.is_due(running.job, verdict) and not follow_ups:
                follow_ups.append(await self._follow_ups(running.job, verdict))
            try:
                await self._store_end(running, verdict, *follow_ups)
            except (ValueError, TypeError) as error:
                # Not the disk: something in them that cannot be stored.
                problem = f"no evaluation was queued: it cannot be stored ({error})"
                await self._store_end(running, verdict, ((), (problem,)))

        await self._surely(running.job, conclude)

    async def _follow_ups(self, job: Job, verdict: Verdict) -> FollowUps:
        folder = self._store.job_folder(job.id)
        try:
            made = asyncio.get_running_loop().run_in_executor(
                self._files, lambda: evaluations.follow_ups(job, folder, model=verdict.model, config=self.config)
            )
            return await asyncio.wait_for(made, FOLLOW_UP_SECONDS)
        except asyncio.TimeoutError:
            where = f"{job.output_dir} or {self.config.results_folder}"
            return (), (f"no evaluation was queued: {where} did not answer within {FOLLOW_UP_SECONDS:g} s",)
        except Exception as error:
            # The end of the training is stored all the same, and the queue goes on.
            self._log.fault(error)
            return (), (f"no evaluation was queued: a fault in lfsvc ({type(error).__name__}: {error})",)

    async def _surely(self, job: Job, store_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Store the end of a job, however long the disk does not take it."""
        while True:
            try:
                await store_end()
            except Internal as error:
                self._log.write(f"The end of job {job.id} cannot be stored yet: {error}", journal.ERROR)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    async def _store_end(self, running: Running, verdict: Verdict, follow_ups: FollowUps = ((), ())) -> None:
        """Store the end of a job and, in the same transaction, what its end queues."""
        job_id = running.job.id
        followers, warnings = follow_ups
        async with self._lock:
            if verdict.state is State.QUEUED:
                job = await self._store.change(
                    job_id,
                    State.QUEUED,
                    at_head=True,
                    interruptions=running.job.interruptions + 1,
                    started_at=0,
                    handle="",
                    steps=verdict.steps,
                    warnings=verdict.warnings,
                )
                added: list[Job] = []
                self.queue_length += 1
            else:
                job, added = await self._store.end(
                    job_id,
                    verdict.state,
                    followers=followers,
                    at_head=self.config.evaluation_position == "front",
                    exit_status=verdict.exit_status,
                    failed_step=verdict.failed_step,
                    failure=verdict.failure,
                    finished_at=verdict.finished_at or _now(),
                    steps=verdict.steps,
                    log=main_log(verdict.steps),
                    model=verdict.model,
                    progress=dict(verdict.progress),
                    warnings=(*(verdict.warnings or running.job.warnings), *warnings),
                )
                self.queue_length += len(added)
            self._running.pop(job_id, None)
        self._wake.set()
        self._tell("queued" if verdict.state is State.QUEUED else "finished", job)
        for follower in added:
            self._tell("queued", follower)
        self._tell("changed")

    async def _reconcile(self, job: Job) -> None:
        """Find out what became of a job that was running when the last service ended."""
        launcher = self._launchers.get(job.launcher, self._launcher)
        running = Running(job=job, launcher=launcher)
        status = await self._read(job, documents.STATUS)
        same = await self._same_instance(job, launcher)
        handle = job.handle
        if launcher.name != job.launcher and status is not None:
            # Its launcher cannot be reached any more; the runner may still be there.
            handle = json.dumps({"pid": status["pid"], "start": status["pid_start"]})
        if await launcher.attach(self._start_of(job), handle):
            self._running[job.id] = running
            if status is not None:
                running.status = status
            self._log.write(f"Job {job.id} goes on: {job.title}", journal.NOTICE)
            self._spawn(self._watch(running, announce=status is None))
            if job.kill_requested_at:
                await launcher.stop(job.id)
            return
        await launcher.clear(self._start_of(job))
        result = await self._read(job, documents.RESULT)
        if result is None and status is None and not job.kill_requested_at:
            # The last service fell between its decision and the start: nothing ran.
            await self._put_back(job)
            return
        await self._conclude(running, result, "", interrupted=not same)

    async def _same_instance(self, job: Job, launcher: Launcher) -> bool:
        if launcher.name == job.launcher:
            return job.instance == await launcher.instance()
        return job.instance.partition("/")[0] == boot_id()


def _now() -> int:
    return time.time_ns() // 1000
