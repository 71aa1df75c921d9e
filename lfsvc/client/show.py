"""`lfsvc status`, `lfsvc list` and `lfsvc show`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import Client
from lfsvc.client.output import print_json
from lfsvc.wording import duration, progress_text

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

RECENT = 5


def status_command(arguments: Namespace) -> int:
    """Print what runs, what waits and what ended lately."""
    client = Client.connect()
    status = client.call("Status")
    if arguments.json:
        print_json(status)
        return 0
    ended = ["succeeded", "failed", "killed", "interrupted", "cancelled"]
    recent = client.call("ListJobs", "a{sv}", {"state": ("as", ended), "limit": ("u", RECENT)})
    print("\n".join(status_lines(status, recent, time.time())))
    return 0


def status_lines(status: dict[str, Any], recent: list[dict[str, Any]], now: float) -> list[str]:
    """The screen of `lfsvc status`; `now` in seconds since the epoch."""
    waiting = status["queue_length"]
    lines = [f"lfsvc {status['version']}: {status['state']}, {waiting} waiting"]
    rows = [("running", job, _progress(job, now)) for job in status["running"]]
    rows += [("queued", job, f"position {place}") for place, job in enumerate(status["queued"], start=1)]
    rows += [(job["state"], job, _ended(job, now)) for job in recent]
    if not rows:
        lines.append("Nothing has been submitted yet. Try: lfsvc submit train:/abs/config.yaml@0,1")
    lines += table(rows)
    if waiting > len(status["queued"]):
        lines.append(f"and {waiting - len(status['queued'])} more waiting")
    return lines


def list_command(arguments: Namespace) -> int:
    """Print the newest jobs."""
    given: dict[str, Any] = {"limit": ("u", arguments.lines)}
    if arguments.state:
        given["state"] = ("as", arguments.state)
    client = Client.connect()
    jobs = client.call("ListJobs", "a{sv}", given)
    # A page is at most 500 jobs long.
    while jobs and len(jobs) < arguments.lines:
        given["before"] = ("t", jobs[-1]["id"])
        given["limit"] = ("u", arguments.lines - len(jobs))
        page = client.call("ListJobs", "a{sv}", given)
        if not page:
            break
        jobs += page
    if arguments.json:
        print_json(jobs)
        return 0
    now = time.time()
    for line in table([(job["state"], job, _ended(job, now)) for job in jobs]):
        print(line)
    return 0


def show_command(arguments: Namespace) -> int:
    """Print everything about one job."""
    client = Client.connect()
    job = client.call("GetJob", "t", arguments.id)
    if arguments.json:
        print_json(job)
        return 0
    evaluations = [client.call("GetJob", "t", number) for number in job.get("evaluations", ())]
    print("\n".join(show_lines(job, evaluations)))
    return 0


def show_lines(job: dict[str, Any], evaluations: Sequence[dict[str, Any]] = ()) -> list[str]:
    """The screen of `lfsvc show`; `evaluations` are the jobs that its end queued."""
    rows: list[tuple[str, str]] = [("job", str(job["id"]))]
    for key in (
        "name",
        "task",
        "state",
        "failure",
        "failed_step",
        "exit_status",
        "output_dir",
        "model",
        "log",
        "parent",
    ):
        if key in job:
            rows.append((key.replace("_", " "), str(job[key])))
    rows += [("evaluation", _evaluation(evaluation)) for evaluation in evaluations]
    if job.get("progress"):
        rows.append(_how_far(job))
    for key in ("queued_at", "started_at", "finished_at"):
        if key in job:
            rows.append((key.removesuffix("_at"), local_time(job[key])))
    if job.get("started_at") and job.get("finished_at"):
        rows.append(("took", duration((job["finished_at"] - job["started_at"]) / 1e6)))
    if job.get("attempts", 1) > 1:
        rows.append(("attempts", str(job["attempts"])))
    for step in job.get("steps", ()):
        text = step["state"]
        if step.get("started_at") and step.get("finished_at"):
            text += f" in {duration((step['finished_at'] - step['started_at']) / 1e6)}"
        if step.get("exit_status"):
            text += f", exit status {step['exit_status']}"
        if step.get("note"):
            text += f": {step['note']}"
        if step.get("log") and step["log"] != job.get("log"):
            text += f", log {step['log'].rsplit('/', 1)[-1]}"
        rows.append((f"step {step['name']}", text))
    rows += [("warning", warning) for warning in job.get("warnings", ())]
    width = max(len(key) for key, _ in rows)
    return [f"{key:>{width}}  {value}" for key, value in rows]


def _how_far(job: dict[str, Any]) -> tuple[str, str]:
    """What the trainer said last: of a job that has ended, that it was at 100 % tells nothing."""
    progress = job["progress"]
    if job["state"] != "succeeded":
        return "progress", progress_text(progress)
    words = [f"{progress['current_steps']} steps"] if progress.get("current_steps") else []
    words += [f"{key} {progress[key]:.4g}" for key in ("loss", "epoch") if key in progress]
    return "trained", ", ".join(words)


def _evaluation(job: dict[str, Any]) -> str:
    failure = f": {job['failure']}" if job.get("failure") else ""
    return f"job {job['id']}, {job['state']}{failure}"


def table(rows: list[tuple[str, dict[str, Any], str]]) -> list[str]:
    """Jobs in aligned columns: id, state, command, what, when and why."""
    cells = [
        (
            str(job["id"]),
            state,
            job["command"],
            job.get("name") or job["path"].rsplit("/", 1)[-1],
            _devices(job),
            when,
        )
        for state, job, when in rows
    ]
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(6)]
    lines = []
    for row, (_, job, _) in zip(cells, rows, strict=True):
        first, *others = row
        line = f"{first:>{widths[0]}}  " + "  ".join(
            f"{cell:{width}}" for cell, width in zip(others, widths[1:], strict=True)
        )
        lines.append(line.rstrip())
        if job.get("failure"):
            lines.append(" " * (widths[0] + 2) + job["failure"])
    return lines


def _devices(job: dict[str, Any]) -> str:
    return "@" + ",".join(map(str, job["devices"])) if job.get("devices") else ""


def _progress(job: dict[str, Any], now: float) -> str:
    step = f", {job['step']}" if job.get("step") not in (None, job["command"]) else ""
    progress = progress_text(job.get("progress", {}))
    return _since(job, now) + step + (f": {progress}" if progress else "")


def _since(job: dict[str, Any], now: float) -> str:
    return f"for {duration(now - job['started_at'] / 1e6)}" if job.get("started_at") else ""


def _ended(job: dict[str, Any], now: float) -> str:
    if not job.get("finished_at"):
        return _since(job, now)
    ago = f"{duration(now - job['finished_at'] / 1e6)} ago"
    return f"{ago}, exit status {job['exit_status']}" if job.get("exit_status", 0) > 0 else ago


def local_time(usec: int) -> str:
    """A time for people, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(usec / 1e6))
