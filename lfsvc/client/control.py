"""`lfsvc kill`, `lfsvc start` and `lfsvc stop`."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import Client
from lfsvc.client.output import print_json
from lfsvc.errors import LfsvcError, NoService
from lfsvc.wording import printable

if TYPE_CHECKING:
    from argparse import Namespace


def kill_command(arguments: Namespace) -> int:
    """End a running job or cancel a waiting one; returns when that is certain, not when it is done."""
    client = Client.connect()
    if arguments.id is None:
        job_id = client.call("Kill")
    else:
        job_id = arguments.id
        client.call("KillJob", "t", job_id)
    job = client.call("GetJob", "t", job_id)
    if arguments.json:
        print_json(job)
        return 0
    what = _what(job)
    if job["state"] == "running":
        print(f"job {job_id} is being killed: {what}")
    else:
        print(f"job {job_id} {job['state']}: {what}")
    return 0


def _what(job: dict[str, Any]) -> str:
    return f"{job['command']} {printable(job.get('name') or job['path'])}"


def start_command(arguments: Namespace) -> int:
    """Start the scheduler."""
    del arguments
    client = Client.connect()
    if client.service_pid():
        print("The scheduler runs already.")
        return 0
    client.start_service()
    print("The scheduler runs.")
    return 0


def stop_command(arguments: Namespace) -> int:
    """Stop the scheduler. Jobs go on; what waits is kept."""
    del arguments
    client = Client.connect()
    pid = client.service_pid()
    if not pid and not client.stop_service():
        print("The scheduler does not run.", file=sys.stderr)
        return 0
    running = []
    if pid:
        try:
            running = client.call("Status", start=False)["running"]
        except (LfsvcError, NoService):
            pass
        if not client.stop_service():
            _terminate(pid)
    print("The scheduler is stopped until the next lfsvc command or login; what waits stays queued.")
    for job in running:
        print(f"job {job['id']} goes on: {_what(job)}")
    return 0


def _terminate(pid: int) -> None:
    """End a scheduler that systemd did not start, and wait until it is gone."""
    import select

    try:
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGTERM)
    except ProcessLookupError:
        return
    except OSError as error:
        raise LfsvcError(f"The scheduler (pid {pid}) cannot be stopped: {error.strerror}.") from error
    if not select.select([fd], [], [], 30)[0]:
        raise LfsvcError(f"The scheduler (pid {pid}) has not ended within 30 s.", f"look at it: ps {pid}")
