"""What the scheduler tells the world: one interface, and the journal and the terminal as two who listen."""

from __future__ import annotations

import sys
import traceback

from lfsvc import journal
from lfsvc.job import Job, State
from lfsvc.service.writer import Writer
from lfsvc.wording import printable

# A terminal that was stopped does not keep the end of the service.
FINISH_SECONDS = 1.0


class Listener:
    """Told of each change after it is durable; does nothing unless overridden. Must neither block nor raise."""

    def queued(self, job: Job) -> None:
        """A job has joined the queue, for the first time or again."""

    def started(self, job: Job) -> None:
        """The first step of a job has begun."""

    def kill_requested(self, job: Job) -> None:
        """Somebody asked for the end of a running job."""

    def finished(self, job: Job) -> None:
        """A job has ended, or was cancelled."""

    def progressed(self, job: Job) -> None:
        """A running job has come further, or to its next step; at most about once a second."""

    def changed(self) -> None:
        """The number of waiting or running jobs, or a running job's status, is another one."""


class Held(Listener):
    """Holds back what happens until somebody can be told: ends that were missed are taken in before the bus answers."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Job]] | None = []

    def queued(self, job: Job) -> None:
        self._hold("queued", job)

    def finished(self, job: Job) -> None:
        self._hold("finished", job)

    def _hold(self, event: str, job: Job) -> None:
        if self._events is not None:
            self._events.append((event, job))

    def release(self, listener: Listener) -> None:
        """Tell it of all that was held; nothing is held from now on."""
        events, self._events = self._events or [], None
        for event, job in events:
            getattr(listener, event)(job)


# Kept for ever: the documentation and the message catalog name them.
MESSAGE_IDS: dict[str, str] = {
    "queued": "28034b905bd444f8bac22c10147d1859",
    "requeued": "fe6d9c547a374d8ba5ee5680d024ce8b",
    "started": "1f2f4ba7014c44e58af0abb4d688328f",
    "kill_requested": "e7612612cd6e4b7da7cb6276d34a9fce",
    "succeeded": "b2c0d53b72104e759a226a223169f62a",
    "failed": "dbe958effa554c498179f57b9f555339",
    "killed": "5933e097ee2c4fed968d9bf1a2397ef4",
    "interrupted": "e0d4259884594e31979812c3be5f0c26",
    "cancelled": "ca888949168142d18b640ce7e643b4cb",
}


class JournalListener(Listener):
    """Writes the service's own entries, so that JOB_ID=42 shows a job from its submission to its end."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def queued(self, job: Job) -> None:
        if job.interruptions:
            self._job(job, "requeued", f"Job {job.id} queued again after an interruption: {job.title}")
        else:
            self._job(job, "queued", f"Job {job.id} queued: {job.text}")

    def started(self, job: Job) -> None:
        self._job(job, "started", f"Job {job.id} started: {job.title}")

    def kill_requested(self, job: Job) -> None:
        self._job(job, "kill_requested", f"Job {job.id} is being killed: {job.title}")

    def finished(self, job: Job) -> None:
        priority = journal.WARNING if job.state in (State.FAILED, State.INTERRUPTED) else journal.NOTICE
        status = f", exit status {job.exit_status}" if job.exit_status not in (None, 0, -1) else ""
        failure = f": {job.failure}" if job.failure else ""
        self._job(job, job.state.value, f"Job {job.id} {job.state.value}{status}{failure}", priority)

    def _job(self, job: Job, event: str, message: str, priority: int = journal.NOTICE) -> None:
        fields = journal.job_fields(
            job_id=job.id,
            name=job.name,
            command=job.task.command.value,
            task=job.text,
            step=job.failed_step,
            log=job.log,
        )
        self._log.write(message, priority, {**fields, "MESSAGE_ID": MESSAGE_IDS[event], "JOB_STATE": job.state.value})


class Log:
    """The service's own messages: into the journal with fields, and on a terminal to stderr.

    As a unit, stderr is the journal as well; then each goes there once.
    """

    def __init__(self, *, print_too: bool) -> None:
        self._journal = journal.Journal()
        self._print = print_too or not self._journal.available
        self._writer = Writer(sys.stderr.fileno())
        self.missed = 0

    def write(self, message: str, priority: int = journal.INFO, fields: dict[str, str] | None = None) -> None:
        """Write a message; one that journald has no room for is counted, never waited for."""
        entry = {"USER_UNIT": "lfsched.service", **(fields or {}), "SYSLOG_IDENTIFIER": "lfsched"}
        if self._journal.send(entry, message, priority) is not True:
            self.missed += 1
        if self._print:
            # A name may hold what a terminal obeys.
            text = "\n".join(map(printable, message.split("\n")))
            self._writer.write(text.encode("utf-8", "replace") + b"\n")

    def fault(self, error: BaseException) -> None:
        """Write where a fault of lfsvc's own comes from, for whoever mends it."""
        text = "".join(traceback.format_exception(error))
        self.write(f"A fault in lfsvc, please report it:\n{text}", journal.ERROR)

    def finish(self) -> None:
        """Let what was written last reach the terminal."""
        self._writer.finish(FINISH_SECONDS)

    @property
    def has_journal(self) -> bool:
        """Whether there is a journal."""
        return self._journal.available
