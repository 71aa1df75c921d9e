"""`lfsvc serve --detach`: the service in the background; returns when it is ready or has said why not."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Callable

from lfsvc import config as settings
from lfsvc.errors import Internal
from lfsvc.service.lock import make_private_state

LOG = "serve.log"
LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC

# Longer than a start takes on a machine under load; a queue of 100,000 jobs is loaded in a second.
READY_SECONDS = 100.0


def detach(serve: Callable[[], int]) -> int:
    """Run `serve` in a process of its own, without this terminal; give the exit status.

    Raises:
        LfsvcError: the config does not hold, or the state folder takes no log.
    """
    config = settings.load()
    make_private_state(config)
    log = os.path.join(config.state_folder, LOG)
    try:
        os.close(os.open(log, LOG_FLAGS, 0o600))
    except OSError as error:
        raise Internal(f"{log} cannot be written: {error.strerror}.", "move it away") from error
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    with told:
        # As systemd would: the service tells of its start by sd_notify(3). An abstract name, chosen by the kernel.
        told.bind("")
        os.environ["NOTIFY_SOCKET"] = "@" + told.getsockname()[1:].decode("ascii")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            told.close()
            status = 1
            try:
                _leave_the_terminal(log)
                status = serve()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        problem = _wait_until_ready(told, pid)
    if problem is None:
        print(f"The scheduler runs in the background (pid {pid}); its messages are in {log}.")
        print("next: lfsvc submit TASK (lfsvc stop ends it, jobs go on)")
        return 0
    sentence, _, hint = problem.partition(" hint: ")
    print(f"lfsvc: {sentence or 'The scheduler does not start.'}\nhint: {hint or f'see {log}'}", file=sys.stderr)
    return 1


def _leave_the_terminal(log: str) -> None:
    os.setsid()
    os.chdir("/")
    for path, flags, fd in (
        ("/dev/null", os.O_RDONLY, 0),
        (log, LOG_FLAGS, 1),
        (log, LOG_FLAGS, 2),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    # Of whoever called: a lock or a pipe that would stay open as long as the service runs.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _wait_until_ready(told: socket.socket, pid: int) -> str | None:
    """None when the service is ready, else what it said before it ended ("" for nothing)."""
    ended = os.pidfd_open(pid)
    problem = ""
    try:
        while True:
            ready, _, _ = select.select([told.fileno(), ended], [], [], READY_SECONDS)
            if told.fileno() in ready:
                for line in told.recv(65536).decode("utf-8", "replace").splitlines():
                    if line == "READY=1":
                        return None
                    if line.startswith("STATUS=Failed: "):
                        problem = line.removeprefix("STATUS=Failed: ")
            elif ended in ready:
                os.waitpid(pid, 0)
                return problem
            elif not ready:
                return f"The scheduler (pid {pid}) is not ready after {READY_SECONDS:g} s."
    finally:
        os.close(ended)
