"""Writing to a terminal from a thread: one that was stopped (Ctrl-S) must not stop the service."""

from __future__ import annotations

import os
import threading
from collections import deque

# What waits for a terminal that takes nothing. Beyond it nothing more is kept: the log files have it all.
MOST_BYTES = 1024 * 1024


class Writer:
    """Writes to a descriptor in the order given, without ever making its caller wait."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._condition = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._left_out = 0
        self._thread: threading.Thread | None = None
        self.gone = False
        """Whether the terminal is no longer there."""

    def write(self, data: bytes) -> None:
        """Have something written; what finds no room is counted, and said where it is missing."""
        with self._condition:
            if self.gone:
                return
            if self._bytes + len(data) > MOST_BYTES:
                self._left_out += len(data)
                return
            self._put(data)
            if self._thread is None:
                # A daemon: a stopped terminal must not keep the service's end.
                thread = threading.Thread(target=self._run, name="terminal", daemon=True)
                thread.start()
                self._thread = thread

    def _put(self, data: bytes) -> None:
        if self._left_out:
            note = f"\n[lfsvc] {self._left_out:,} bytes are not shown here; the log files have them\n".encode()
            self._left_out = 0
            self._waiting.append(note)
            self._bytes += len(note)
        self._waiting.append(data)
        self._bytes += len(data)
        self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting:
                    self._condition.wait()
                data = self._waiting[0]
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                with self._condition:
                    self.gone = True
                    self._waiting.clear()
                    self._bytes = 0
                    self._condition.notify_all()
                return
            with self._condition:
                self._bytes -= len(self._waiting.popleft())
                self._condition.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait until all is written, for so many seconds at most."""
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting, seconds)
