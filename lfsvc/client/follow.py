"""`lfsvc wait`, `lfsvc logs` and the waiting of `lfsvc submit --wait` and `--follow`.

All of it is told by signals and by the kernel, and goes on through a restart of the service.
"""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import NAME, BusGone, Client, reconnect
from lfsvc.client.output import print_json
from lfsvc.errors import LfsvcError, NoService, NoSuchJob, WrongUse
from lfsvc.follow import Follower
from lfsvc.wording import printable

if TYPE_CHECKING:
    from argparse import Namespace

AWAY_SECONDS = 2.0
LIVING = ("queued", "running")
TAIL_BYTES = 64 * 1024


def wait_command(arguments: Namespace) -> int:
    """Wait for jobs; exit with the status of the first that did not succeed."""
    client = Client.connect()
    ended: list[dict[str, Any]] = []
    if arguments.all:
        status = 0
        client.watch()
        # The end of a training queues its evaluation, so it is asked again until nothing is left.
        while ids := _living(client):
            status = wait_for(client, ids, output=False, watching=True, ended=ended) or status
            client = Client.connect()
            client.watch()
    else:
        status = wait_for(client, arguments.ids or [default_job(client)], output=False, ended=ended)
    if arguments.json:
        print_json(ended)
    return status


def _living(client: Client) -> list[int]:
    """All jobs that run or wait, oldest first."""
    from lfsvc.client.show import newest

    living = {"state": ("as", list(LIVING))}
    jobs = newest(lambda page: client.call("ListJobs", "a{sv}", {**living, **page}), sys.maxsize)
    return sorted(job["id"] for job in jobs)


def logs_command(arguments: Namespace) -> int:
    """Print the output of a job; with -f until it ends."""
    client = Client.connect()
    job_id = arguments.id or default_job(client)
    job = client.call("GetJob", "t", job_id)
    if arguments.journal:
        return _run_journalctl(journal_command(job, arguments))
    _check_step(job, arguments.step)
    if arguments.follow:
        if job["state"] == "queued":
            print(f"lfsvc: job {job_id} waits; its output follows when it runs", file=sys.stderr)
        _Follow(client, job_id, output=True, lines=arguments.lines, step=arguments.step).run()
        return 0
    logs = _logs(job, arguments.step)
    if not logs:
        reason = "it waits" if job["state"] == "queued" else f"it is {job['state']}"
        what = f"The step {arguments.step} of job" if arguments.step else "Job"
        raise LfsvcError(f"{what} {job_id} has no output: {reason}.", f"lfsvc show {job_id}")
    for log, offset in _tail(logs, arguments.lines):
        _print_file(log, offset)
    return 0


def _check_step(job: dict[str, Any], step: str | None) -> None:
    steps = [item["name"] for item in job.get("steps", ())]
    # A job that waits has no steps yet, and one that runs says all of its own at its first.
    if step and steps and step not in steps:
        raise WrongUse(f"Job {job['id']} has no step {step!r}.", f"its steps are {', '.join(steps)}")


def journal_command(job: dict[str, Any], arguments: Namespace) -> list[str]:
    """The argument vector of journalctl for a job. With -f it goes on until Ctrl-C: the journal knows no end."""
    # A few lines need no pager.
    words = ["journalctl", "--user", "--unit=lfsched", *(["--no-pager"] if arguments.lines else [])]
    if arguments.lines:
        # Not beside --since: journalctl of systemd 252 takes the first lines then, not the last.
        words.append(f"--lines={arguments.lines}")
    else:
        # Ids begin anew with a new state folder, and the journal keeps the jobs of the old one.
        words.append(f"--since=@{job['queued_at'] // 1_000_000}")
    if arguments.follow:
        # Else it begins 10 lines before the end.
        words += ["--follow"] if arguments.lines else ["--follow", "--no-tail"]
    words.append(f"JOB_ID={job['id']}")
    return [*words, f"JOB_STEP={arguments.step}"] if arguments.step else words


def _run_journalctl(command: list[str]) -> int:
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)  # noqa: S606 - journalctl takes the place of this process, no shell
    except OSError as error:
        raise LfsvcError(f"journalctl cannot be run: {error.strerror}.", "without --journal, the log files") from error


def default_job(client: Client) -> int:
    """The job that runs, else the newest that has begun, else the newest."""
    running = client.call("Status")["running"]
    jobs = running or client.call("ListJobs", "a{sv}", {"limit": ("u", 100)})
    if not jobs:
        raise NoSuchJob("There is no job yet.", "lfsvc submit TASK")
    return int(next((job for job in jobs if job.get("started_at")), jobs[0])["id"])


def wait_for(
    client: Client,
    ids: list[int],
    *,
    output: bool,
    watching: bool = False,
    ended: list[dict[str, Any]] | None = None,
) -> int:
    """Wait for jobs, one after another; give the exit status: that of the first that did not succeed.

    The jobs as they ended are added to `ended`.
    """
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
        if ended is not None:
            ended.append(job)
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
    failure = f": {printable(job['failure'])}" if job.get("failure") else ""
    print(f"lfsvc: job {job['id']} {job['state']}{failure}", file=sys.stderr)


class _Follow:
    """Follows one job to its end, with or without its output (of one step where `step` names it)."""

    def __init__(
        self,
        client: Client,
        job_id: int,
        *,
        output: bool,
        lines: int | None = None,
        step: str | None = None,
        watching: bool = False,
    ) -> None:
        self.client = client
        self._job_id = job_id
        self._output = output
        self._lines = lines
        self._step = step
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
            told = any(values[0] in (self._job_id, NAME) for _, values in self.client.take_signals())
            if told or self._away:
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
            _check_step(job, self._step)
            self._show(job)
        # -n is about what was there at the beginning; all that comes later is shown.
        self._lines = None
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
        if self._output:
            # `| head` has enough: that is told as an error of the pipe, whatever is asked for.
            poll.register(sys.stdout.fileno(), 0)
        if not self.client.has_signals():
            # An answer that did not come in time may have been the last word: then it asks again by itself.
            events = dict(poll.poll(AWAY_SECONDS * 1000 if self._away else None))
            if self._output and events.get(sys.stdout.fileno(), 0) & (
                select.POLLERR | select.POLLHUP | select.POLLNVAL
            ):
                raise BrokenPipeError
        self._print()

    def _print(self) -> None:
        while self._follower is not None and (data := self._follower.read()):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def _show(self, job: dict[str, Any]) -> None:
        """Go on to the newest log that is not shown yet, after the rest of the one before."""
        logs = _logs(job, self._step)
        begin = dict(_tail(logs, self._lines))
        for log in logs:
            if log in self._shown:
                continue
            self._shown.add(log)
            if log not in begin:
                # Before the last N lines.
                continue
            self._print()
            self._close()
            try:
                self._follower = Follower(log, begin[log])
            except OSError as error:
                print(f"lfsvc: {printable(log)} cannot be followed: {error.strerror}", file=sys.stderr)
            self._print()

    def _finish(self, job: dict[str, Any]) -> None:
        if self._output:
            self._show(job)
            self._print()
        self._close()

    def _close(self) -> None:
        if self._follower is not None:
            self._follower.close()
            self._follower = None


def _logs(job: dict[str, Any], step: str | None = None) -> list[str]:
    return [item["log"] for item in job.get("steps", ()) if item.get("log") and step in (None, item["name"])]


def _tail(logs: list[str], lines: int | None) -> list[tuple[str, int]]:
    """Where the last `lines` lines of all logs together begin: the logs that have some of them, and offsets (bytes)."""
    if lines is None:
        return [(log, 0) for log in logs]
    found: list[tuple[str, int]] = []
    missing = lines
    for log in reversed(logs):
        try:
            offset, missing = _tail_offset(log, missing)
        except OSError:
            # Whoever prints it says that it is gone.
            offset = 0
        found.insert(0, (log, offset))
        if not missing:
            break
    return found


def _tail_offset(path: str, lines: int) -> tuple[int, int]:
    """Where the last `lines` lines of a file begin (bytes), and how many it lacks; reads from its end.

    So it takes no longer for a large file.
    """
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
                return position + cut + 1, 0
    # The first line has no line end before it.
    return 0, missing - 1 if end else missing


def _print_file(path: str, offset: int) -> None:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            sys.stdout.flush()
            while data := file.read(1 << 20):
                sys.stdout.buffer.write(data)
    except FileNotFoundError:
        raise LfsvcError(f"{printable(path)} is no longer there.", "was the output folder moved or deleted?") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise LfsvcError(f"{printable(path)} cannot be read: {error.strerror}.") from error
