"""Entries of the systemd journal with fields of their own, without ever waiting for journald.

systemd-python's journal.send() was measured to hold the interpreter's lock in a blocking sendmsg():
with journald stopped, a thread that logs stops the whole process, so neither a runner that must move
its job's output nor an event loop may call it. The native protocol is small and stable.
Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import errno
import socket

SOCKET = "/run/systemd/journal/socket"

# A datagram stays well below net.core.wmem_default (208 KiB), so it never needs a memfd.
MAX_TEXT_BYTES = 32 * 1024

# Syslog's priorities; journald keeps one rate limit for 5 and 6 together.
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6


class Journal:
    """A connection to journald. `send` says whether the entry was taken, and never blocks."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self.available = self._connect()

    def _connect(self) -> bool:
        self.close()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # Connected, so that poll() tells when journald's queue has room again.
            connection.connect(self._path)
        except OSError:
            connection.close()
            return False
        self._socket = connection
        return True

    def fileno(self) -> int:
        """The descriptor to poll for POLLOUT after `send` gave None; -1 where there is no journal."""
        return self._socket.fileno() if self._socket is not None else -1

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, fields: dict[str, str], message: str, priority: int = INFO) -> bool | None:
        """Send an entry: True, it was taken; None, journald has no room now; False, there is no journal."""
        entry = encode({**fields, "PRIORITY": str(priority), "MESSAGE": message})
        for last in (False, True):
            if self._socket is None and not self._connect():
                self.available = False
                return False
            assert self._socket is not None
            try:
                self._socket.send(entry)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return None
                # journald was started anew, with a new socket: once more, then give up.
                self.close()
                if last:
                    break
            else:
                self.available = True
                return True
        self.available = False
        return False


def encode(fields: dict[str, str]) -> bytes:
    """Put fields into the native protocol; a value with a line break goes in with its length."""
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            parts.append(name.encode("ascii") + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode("ascii") + b"=" + data + b"\n")
    return b"".join(parts)


def job_fields(*, job_id: int, name: str, command: str, task: str, step: str, log: str) -> dict[str, str]:
    """The fields by which a job's entries are found; `journalctl --user -u lfsched JOB_ID=42` shows a job."""
    fields = {
        "JOB_ID": str(job_id),
        "JOB_NAME": name,
        "JOB_COMMAND": command,
        "JOB_STEP": step,
        "JOB_TASK": task,
        "JOB_LOG": log,
        # journald takes this from a unit of the same user, and then -u lfsched finds the entry.
        "USER_UNIT": "lfsched.service",
        "SYSLOG_IDENTIFIER": "lfsvc-job",
    }
    return {key: value for key, value in fields.items() if value}


def boot_seconds() -> int:
    """Seconds since the boot, suspended ones included: the clock of the journal's budget, shared by all jobs."""
    import time

    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


class Budget:
    """At most `lines` entries in any `seconds`: strict over a sliding window, in steps of a second.

    A token bucket would let twice as many through at its start.
    """

    def __init__(self, lines: int, seconds: int, spent: list[list[int]]) -> None:
        self._lines = lines
        self._seconds = seconds
        self._spent = [[int(second), int(count)] for second, count in spent]

    def exhausted(self, now: int) -> bool:
        """Whether nothing may be sent now. `now`: boot_seconds()."""
        self._forget(now)
        return sum(count for _, count in self._spent) >= self._lines

    def take(self, now: int) -> None:
        """Book one entry that was sent."""
        if self._spent and self._spent[-1][0] == now:
            self._spent[-1][1] += 1
        else:
            self._spent.append([now, 1])

    def spent(self, now: int) -> list[list[int]]:
        """What the next job must know: [second, entries] of the last `seconds`."""
        self._forget(now)
        return [list(pair) for pair in self._spent]

    def _forget(self, now: int) -> None:
        while self._spent and not now - self._seconds - 1 < self._spent[0][0] <= now:
            del self._spent[0]
