"""Processes of this machine by PID and start time, so that a PID used again is never taken for the old one.

Source: proc(5), prctl(2) PR_SET_CHILD_SUBREAPER, pidfd_open(2).
"""

from __future__ import annotations

import os
import signal

PR_SET_CHILD_SUBREAPER = 36


class Process:
    """A process as it was seen. `start` is in clock ticks since the boot."""

    __slots__ = ("command", "parent", "pid", "start", "state")

    def __init__(self, pid: int, parent: int, start: int, state: str, command: str) -> None:
        self.pid = pid
        self.parent = parent
        self.start = start
        self.state = state
        self.command = command

    def signal(self, number: int) -> bool:
        """Send a signal to this very process; False where it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            # With the descriptor open the PID cannot be used again; is it still the one that was seen?
            now = find(self.pid)
            if now is None or now.start != self.start:
                return False
            signal.pidfd_send_signal(fd, number)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def describe(self) -> str:
        """The process for a message: `sleep 1000 (pid 123)`."""
        words = b" ".join(arguments(self.pid)).decode("utf-8", "backslashreplace").strip()
        return f"{words[:80] or self.command} (pid {self.pid})"


def find(pid: int) -> Process | None:
    """Look a process up; None where there is none, also where only its zombie is left."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # The command stands in parentheses and may itself contain some.
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    state = fields[0].decode()
    if state in ("Z", "X"):
        return None
    command = head.partition(b"(")[2].decode("utf-8", "backslashreplace")
    return Process(pid, int(fields[1]), int(fields[19]), state, command)


def arguments(pid: int) -> list[bytes]:
    """The argument vector of a process; [] where it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().removesuffix(b"\0").split(b"\0")
    except OSError:
        return []


def everyone() -> list[Process]:
    """All living processes that can be seen."""
    found = (find(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def descendants(pid: int) -> list[Process]:
    """The living descendants of a process. Complete where it is a subreaper: then no orphan leaves its tree.

    A zombie's children have been handed on already, so a chain is never broken by one.
    """
    children: dict[int, list[Process]] = {}
    for process in everyone():
        children.setdefault(process.parent, []).append(process)
    result: list[Process] = []
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), ()):
            result.append(child)
            todo.append(child.pid)
    return result


def carrying(variable: str, value: str) -> list[Process]:
    """The living processes of this user that were started with `variable=value` in their environment."""
    wanted = f"{variable}={value}".encode()
    result = []
    for process in everyone():
        if wanted in _environment(process):
            result.append(process)
    return result


def _environment(process: Process) -> list[bytes]:
    """The `NAME=value` that a process was started with; [] where they cannot be read."""
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def signal_name(number: int) -> str:
    """The name of a signal: SIGTERM, or `signal 40` for one of the real-time signals, which have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_marked(process: Process, variable: str) -> bool:
    """Whether a process was started with a variable in its environment; false where that cannot be read."""
    return any(entry.startswith(f"{variable}=".encode()) for entry in _environment(process))


def become_subreaper() -> None:
    """Let orphaned descendants become children of this process, instead of init's.

    Raises:
        OSError: the kernel refuses.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
