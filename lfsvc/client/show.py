"""`lfsvc status`, `lfsvc list` and `lfsvc show`."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import Client
from lfsvc.client.output import emit, print_json, terminal_height, terminal_width
from lfsvc.client.screen import list_lines, positions, show_lines, status_lines
from lfsvc.errors import LfsvcError, WrongUse

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

RECENT = 5
ENDED = ["succeeded", "failed", "killed", "interrupted", "cancelled"]

# How many `list` shows unless told; a page of the service is at most 500 long.
DEFAULT_LINES = 100
PAGE = 500

AGO = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
DATES = ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S")


def status_command(arguments: Namespace) -> int:
    """Print what runs, what waits and what ended lately."""
    client = Client.connect()
    status = client.call("Status")
    if arguments.json:
        print_json(status)
        return 0
    lines = status_lines(
        status,
        recent_jobs(client),
        time.time(),
        width=terminal_width(sys.stdout),
        height=terminal_height(sys.stdout),
    )
    emit(lines, sys.stdout)
    return 0


def recent_jobs(client: Client, *, start: bool = True) -> list[dict[str, Any]]:
    """The jobs that ended lately."""
    given = {"state": ("as", ENDED), "limit": ("u", RECENT)}
    found: list[dict[str, Any]] = client.call("ListJobs", "a{sv}", given, start=start)
    return found


def list_command(arguments: Namespace) -> int:
    """Print the newest jobs."""
    since = since_usec(arguments.since, time.time()) if arguments.since else 0
    given: dict[str, Any] = {"state": ("as", arguments.state)} if arguments.state else {}
    client = Client.connect()
    jobs = newest(lambda page: client.call("ListJobs", "a{sv}", {**given, **page}), arguments.lines, since)
    if arguments.json:
        print_json(jobs)
    elif not jobs:
        print("No such job." if given or since else "Nothing has been submitted yet.", file=sys.stderr)
    else:
        emit(list_lines(jobs, time.time(), terminal_width(sys.stdout)), sys.stdout)
    return 0


def newest(
    ask: Callable[[dict[str, Any]], list[dict[str, Any]]], lines: int | None, since: int = 0
) -> list[dict[str, Any]]:
    """Collect jobs page by page: `lines` of them (None: DEFAULT_LINES, with `since` all).

    `since` (microseconds) keeps those that ended later or have not ended yet. A page on which all ended
    earlier is the last: jobs run in the order of their ids, nearly.
    """
    wanted = lines or (sys.maxsize if since else DEFAULT_LINES)
    jobs: list[dict[str, Any]] = []
    page: dict[str, Any] = {}
    while len(jobs) < wanted:
        limit = PAGE if since else min(PAGE, wanted - len(jobs))
        found = ask({**page, "limit": ("u", limit)})
        kept = [job for job in found if job.get("finished_at", since) >= since]
        jobs += kept
        if len(found) < limit or not kept:
            break
        page = {"before": ("t", found[-1]["id"])}
    return jobs[:wanted]


def since_usec(text: str, now: float) -> int:
    """Read --since into microseconds since the epoch: `2h`, `3d`, `today`, `yesterday`, an ISO date or time.

    Raises:
        WrongUse: it is none of these.
    """
    word = text.strip().lower()
    number = word.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = word[len(number) :].strip()
    if number.isascii() and number.isdigit() and len(number) < 7 and unit in AGO:
        return int((now - int(number) * AGO[unit]) * 1e6)
    today = time.localtime(now)[:3]
    if word in ("today", "yesterday"):
        # mktime takes the 0th of a month for the last of the one before.
        return int(time.mktime((today[0], today[1], today[2] - (word == "yesterday"), 0, 0, 0, 0, 0, -1)) * 1e6)
    for form in DATES:
        try:
            return int(time.mktime(time.strptime(text.strip().upper(), form)) * 1e6)
        except (ValueError, OverflowError):
            continue
    # What --json prints.
    stamp = text.strip().upper().removesuffix("Z").partition(".")[0]
    if text.strip().upper().endswith("Z"):
        import calendar

        try:
            return calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S")) * 1_000_000
        except ValueError:
            pass
    raise WrongUse(
        f"--since {text!r} is no time.", "give 30min, 2h, 3d, today, yesterday, 2026-03-01 or 2026-03-01T14:30"
    )


def show_command(arguments: Namespace) -> int:
    """Print everything about one job."""
    client = Client.connect()
    job = client.call("GetJob", "t", arguments.id)
    if arguments.json:
        print_json(job)
        return 0
    evaluations = [client.call("GetJob", "t", number) for number in job.get("evaluations", ())]
    details = {**job_details(job), "position": _position(client, job)}
    lines = show_lines(job, evaluations, details, now=time.time(), width=terminal_width(sys.stdout))
    emit(lines, sys.stdout)
    return 0


def _position(client: Client, job: dict[str, Any]) -> str:
    """`, position 2, about 14:35` of a waiting job; "" beyond the first 100."""
    if job["state"] != "queued":
        return ""
    status = client.call("Status")
    words = positions(status["running"], status["queued"], (), time.time())
    return next(
        (f", {text}" for text, other in zip(words, status["queued"], strict=True) if other["id"] == job["id"]), ""
    )


def job_details(job: dict[str, Any]) -> dict[str, Any]:
    """What the job's folder tells of it beside the bus: command lines, names of its environment, files; {} if nothing.

    A scheduler may run with another state folder than this shell's settings name: a spec of another task is none.
    """
    from lfsvc import config, documents

    try:
        folder = os.path.join(config.load().state_folder, "jobs", str(job["id"]))
        spec = documents.read(folder, documents.SPEC)
    except (LfsvcError, documents.Unreadable):
        return {}
    if spec is None or spec.get("task") != job["task"]:
        return {}
    files = {
        "working dir": spec.get("working_directory"),
        "submitted": spec.get("snapshot"),
        "job folder": folder,
    }
    return {
        "commands": command_lines(job, spec, os.path.exists),
        "environment": sorted(spec.get("environment", {})),
        "files": {what: path for what, path in files.items() if isinstance(path, str) and path},
    }


def command_lines(job: dict[str, Any], spec: dict[str, Any], exists: Callable[[str], bool]) -> dict[str, str]:
    """The command line of each step that ran a program, as it can be typed.

    The file that a step ran lies beside its log and has its time in its name; where it is not there, the
    step ran the snapshot (or its own file, for a script that was not edited).
    """
    import shlex

    found = {}
    for step in job.get("steps", ()):
        words = _words(step["name"], step.get("log", ""), job, spec, exists)
        if words:
            found[step["name"]] = shlex.join(words)
    return found


def _words(
    name: str, log: str, job: dict[str, Any], spec: dict[str, Any], exists: Callable[[str], bool]
) -> tuple[str, ...]:
    source, snapshot = str(spec.get("source", "")), str(spec.get("snapshot", ""))
    if name == "shell":
        edited = any(" since it was submitted: " in warning for warning in job.get("warnings", ()))
        return ("bash", snapshot if edited else source)
    if not log:
        return ()
    folder, stem = os.path.split(log.removesuffix(".log"))
    if name == "merge":
        return ("llamafactory-cli", "export", os.path.join(folder, f"{stem}.yaml"))
    if name not in ("train", "eval"):
        return ()
    stamp = stem.removeprefix(f"llamafactory_{name}")
    copy = os.path.join(folder, os.path.basename(source).removesuffix(".yaml") + f"{stamp}.yaml")
    # The launcher cannot take a path with a blank.
    usable = exists(copy) and len(copy.split()) == 1
    return ("llamafactory-cli", str(spec.get("llamafactory_command", name)), copy if usable else snapshot)
