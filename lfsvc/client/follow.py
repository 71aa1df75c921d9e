"""`lfsvc wait`, `lfsvc logs` and the waiting of `lfsvc submit --wait` and `--follow`.

All of it is told by signals and by the kernel, and goes on through a restart of the service.
"""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import NAME, BusGone, Client, reconnect
from lfsvc.errors import LfsvcError, NoService, NoSuchJob
from lfsvc.follow import Follower

if TYPE_CHECKING:
    from argparse import Namespace

LIVING = ("queued", "running")
TAIL_BYTES = 64 * 1024


def wait_command(arguments: Namespace) -> int:
    """Wait for jobs; exit with the status of the first that did not succeed."""
    client = Client.connect()
    if arguments.all:
        client.watch()
        status = client.call("Status")
        ids = [job["id"] for job in [*status["running"], *status["queued"]]]
        return wait_for(client, ids, output=False, watching=True)
    return wait_for(client, arguments.ids or [default_job(client)], output=False)


def logs_command(arguments: Namespace) -> int:
    """Print the output of a job; with -f until it ends."""
    client = Client.connect()
    job_id = arguments.id or default_job(client)
    if arguments.follow:
        _Follow(client, job_id, output=True, lines=arguments.lines).run()
        return 0
    job = client.call("GetJob", "t", job_id)
    logs = _logs(job)
    if not logs:
        reason = "it waits" if job["state"] == "queued" else f"it is {job['state']}"
        raise LfsvcError(f"Job {job_id} has no output: {reason}.", f"lfsvc show {job_id}")
    for log in logs if arguments.lines is None else logs[-1:]:
        _print_file(log, arguments.lines)
    return 0


def default_job(client: Client) -> int:
    """The job that runs, else the newest."""
    running = client.call("Status")["running"]
    jobs = running or client.call("ListJobs", "a{sv}", {"limit": ("u", 1)})
    if not jobs:
        raise NoSuchJob("There is no job yet.", "lfsvc submit TASK")
    return int(jobs[0]["id"])


def wait_for(client: Client, ids: list[int], *, output: bool, watching: bool = False) -> int:
    """Wait for jobs, one after another; give the exit status: that of the first that did not succeed."""
    status = 0
    for job_id in ids:
        follow = _Follow(client, job_id, output=output, watching=watching)
        try:
            job = follow.run()
        except KeyboardInterrupt:
            print(f"\nlfsvc: job {job_id} goes on; lfsvc kill {job_id} ends it", file=sys.stderr)
            raise
        client, watching = follow.client, True
        _print_end(job)
        status = status or exit_status(job)
    return status


def exit_status(job: dict[str, Any]) -> int:
    """0 only if the job succeeded, else its exit status if that is 1 to 255, else 1."""
    if job["state"] == "succeeded":
        return 0
    status = int(job.get("exit_status", 1))
    return status if 1 <= status <= 255 else 1


def _print_end(job: dict[str, Any]) -> None:
    if job["state"] == "succeeded":
        return
    print(
        f"lfsvc: job {job['id']} {job['state']}" + (f": {job['failure']}" if job.get("failure") else ""),
        file=sys.stderr,
    )


class _Follow:
    """Follows one job to its end, with or without its output."""

    def __init__(
        self, client: Client, job_id: int, *, output: bool, lines: int | None = None, watching: bool = False
    ) -> None:
        self.client = client
        self._job_id = job_id
        self._output = output
        self._lines = lines
        self._watching = watching
        self._away = False
        self._shown: set[str] = set()
        self._follower: Follower | None = None

    def run(self) -> dict[str, Any]:
        """Return the job when it has ended."""
        while True:
            try:
                return self._run()
            except BusGone:
                self._say_away()
                self.client = reconnect()
                self._watching = False

    def _run(self) -> dict[str, Any]:
        if not self._watching:
            # Signals first, then the present state: an end in between is seen twice, never missed.
            self.client.watch()
            self._watching = True
        job = self._look(start=True)
        while job is None or job["state"] in LIVING:
            self._wait()
            # Any word about this job, or of the service's coming and going, is a reason to look.
            if any(values[0] in (self._job_id, NAME) for _, values in self.client.take_signals()):
                job = self._look(start=False)
        self._finish(job)
        return job

    def _look(self, *, start: bool) -> dict[str, Any] | None:
        """Ask for the job; None while no service answers."""
        try:
            job: dict[str, Any] = self.client.call("GetJob", "t", self._job_id, start=start)
        except BusGone:
            raise
        except NoService:
            if start:
                raise
            self._say_away()
            return None
        if self._away:
            self._away = False
            print("lfsvc: the scheduler is back", file=sys.stderr)
        if self._output and job["state"] != "queued":
            self._show(job)
        return job

    def _say_away(self) -> None:
        if not self._away:
            self._away = True
            print("lfsvc: the scheduler is away; waiting for it (the job goes on)", file=sys.stderr)

    def _wait(self) -> None:
        """Wait for a message or for output, and print the output."""
        poll = select.poll()
        poll.register(self.client.fileno(), select.POLLIN)
        if self._follower is not None:
            poll.register(self._follower.fileno(), select.POLLIN)
        if not self.client.has_signals():
            poll.poll()
        self._print()

    def _print(self) -> None:
        while self._follower is not None and (data := self._follower.read()):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def _show(self, job: dict[str, Any]) -> None:
        """Go on to the newest log that is not shown yet, after the rest of the one before."""
        for log in _logs(job):
            if log in self._shown:
                continue
            self._shown.add(log)
            self._print()
            if self._follower is not None:
                self._follower.close()
                self._follower = None
            try:
                self._follower = Follower(log, _tail_offset(log, self._lines) if self._lines else 0)
            except OSError as error:
                print(f"lfsvc: {log} cannot be followed: {error.strerror}", file=sys.stderr)
            self._print()

    def _finish(self, job: dict[str, Any]) -> None:
        if self._output:
            self._show(job)
            self._print()
        if self._follower is not None:
            self._follower.close()
            self._follower = None


def _logs(job: dict[str, Any]) -> list[str]:
    return [step["log"] for step in job.get("steps", ()) if step.get("log")]


def _tail_offset(path: str, lines: int) -> int:
    """Where the last `lines` lines of a file begin (bytes); reads from its end, however large it is."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        position, missing = end, lines
        while position > 0:
            size = min(TAIL_BYTES, position)
            position -= size
            file.seek(position)
            piece = file.read(size)
            # The line end that closes the file begins no further line.
            cut = len(piece) - 1 if position + size == end else len(piece)
            while missing and (cut := piece.rfind(b"\n", 0, cut)) >= 0:
                missing -= 1
            if not missing:
                return position + cut + 1
    return 0


def _print_file(path: str, lines: int | None) -> None:
    try:
        offset = _tail_offset(path, lines) if lines else 0
        with open(path, "rb") as file:
            file.seek(offset)
            sys.stdout.flush()
            while data := file.read(1 << 20):
                sys.stdout.buffer.write(data)
    except FileNotFoundError:
        raise LfsvcError(f"{path} is no longer there.", "was the output folder moved or deleted?") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise LfsvcError(f"{path} cannot be read: {error.strerror}.") from error
