"""One pipe → log file and journal.

The main loop moves pipe → file and does nothing else for as long as there is something to move. The
journal's copy is read back from the file at its own pace: the file is the buffer, so memory stays
flat and a job never waits for journald. Source of the idea: measured, 200,000 lines in the time that
writing them straight into a file takes.
"""

from __future__ import annotations

import os
import time

from lfsvc import journal
from lfsvc.files import write_all

PIECE_BYTES = 64 * 1024

# Entries sent before the loop looks at the pipe again.
BATCH = 64

# A progress bar repaints its line by carriage returns, some ten times a second.
PROGRESS_SECONDS = 1.0


class Output:
    """The output of one step: drained from `pipe` into the log, copied from there into the journal."""

    def __init__(self, pipe: int, log: int, copy: JournalCopy | None) -> None:
        self.pipe = pipe
        self._log = log
        self.copy = copy
        self.open = True
        self.lost_bytes = 0
        self.lost_because = ""
        os.set_blocking(pipe, False)

    def pump(self) -> bool:
        """Move one piece; False where nothing was there. Never raises for a log that cannot be written."""
        try:
            data = os.read(self.pipe, PIECE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.open = False
            os.close(self.pipe)
            return False
        self.write(data)
        return True

    def write(self, data: bytes) -> None:
        """Append to the log; what a full or failing disk does not take is counted."""
        try:
            while data:
                data = data[os.write(self._log, data) :]
        except OSError as error:
            self.lost_bytes += len(data)
            self.lost_because = self.lost_because or (error.strerror or str(error))

    def drain(self) -> None:
        """Move all that lies in the pipe now: whoever still holds its other end is not waited for."""
        # A pipe holds 64 KiB unless somebody enlarged it; a leftover that writes on must not keep us.
        for _ in range(64):
            if not self.open or not self.pump():
                break

    def close(self) -> None:
        """Close pipe and log; a log on a disk that takes it is durable then."""
        if self.open:
            self.open = False
            os.close(self.pipe)
        try:
            os.fsync(self._log)
        except OSError:
            pass
        os.close(self._log)


class JournalCopy:
    """Reads a log back and sends it to the journal line by line, within the budget that all jobs share."""

    def __init__(self, path: str, target: journal.Journal, budget: journal.Budget, fields: dict[str, str]) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._journal = target
        self._budget = budget
        self._fields = fields
        self._rest = b""
        self._lines: list[bytes] = []
        self._progress_at = 0.0
        self._held_back = 0
        self.blocked = False
        self.missed_lines = 0

    def feed(self) -> bool:
        """Send a batch; False where nothing is left to send or journald has no room (`blocked`)."""
        self.blocked = False
        for _ in range(BATCH):
            if not self._lines and not self._read():
                return False
            if not self._lines:
                continue
            if not self._send(self._lines[0]):
                return False
            del self._lines[0]
        return True

    def _read(self) -> bool:
        """Read the next piece of the log into lines; False at its present end."""
        data = os.read(self._file, PIECE_BYTES)
        if not data:
            return False
        if self._held_back and self._budget.exhausted(journal.boot_seconds()):
            # Counting costs a fiftieth of splitting, and a job that prints this much needs the processor.
            self._hold_back(data.count(b"\n"))
            self._rest = (self._rest + data).rpartition(b"\n")[2][-journal.MAX_TEXT_BYTES :]
            return True
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            # Of a repainted line the last state counts; CR LF is a line end as well.
            self._split(line.removesuffix(b"\r").rpartition(b"\r")[2])
        self._repainted()
        while len(self._rest) > journal.MAX_TEXT_BYTES:
            self._lines.append(self._rest[: journal.MAX_TEXT_BYTES])
            self._rest = self._rest[journal.MAX_TEXT_BYTES :]
        return True

    def _split(self, line: bytes) -> None:
        while len(line) > journal.MAX_TEXT_BYTES:
            self._lines.append(line[: journal.MAX_TEXT_BYTES])
            line = line[journal.MAX_TEXT_BYTES :]
        self._lines.append(line)

    def _repainted(self) -> None:
        """Of a line that is being repainted, pass on the last whole state, once a second."""
        before, found, self._rest = self._rest.rpartition(b"\r")
        if not found:
            return
        if self._rest == b"":
            # It may be the CR of a CR LF whose LF comes with the next piece.
            before, found, last = before.rpartition(b"\r")
            self._rest = last + b"\r"
            if not found:
                return
        state = before.rpartition(b"\r")[2]
        now = time.monotonic()
        if state.strip() and now - self._progress_at >= PROGRESS_SECONDS:
            self._progress_at = now
            self._lines.append(state)

    def _send(self, line: bytes) -> bool:
        """Send one line; False where it has to be tried again later."""
        if not self._journal.available:
            self.missed_lines += 1
            return True
        now = journal.boot_seconds()
        if self._held_back and not self._budget.exhausted(now):
            # The count goes first, so that a reader sees the gap where it is.
            if self._tell(now, f"… {self._held_back:,} lines only in the log file") is None:
                return False
            self._held_back = 0
        if self._budget.exhausted(now):
            self._hold_back(1)
            return True
        sent = self._tell(now, readable(line))
        if sent is False:
            self.missed_lines += 1
        return sent is not None

    def _tell(self, now: int, message: str) -> bool | None:
        sent = self._journal.send(self._fields, message)
        if sent:
            self._budget.take(now)
        self.blocked = sent is None
        return sent

    def _hold_back(self, lines: int) -> None:
        self._held_back += lines
        self.missed_lines += lines

    def finish(self) -> None:
        """Take a last line without an end for a whole one; nothing is written to the log any more."""
        if self._rest.strip(b"\r"):
            self._split(self._rest.rstrip(b"\r").rpartition(b"\r")[2])
        self._rest = b""

    def close(self, deadline: float) -> None:
        """Count what is left until `deadline` (monotonic seconds), say how much that is, and close."""
        left = len(self._lines)
        while data := os.read(self._file, PIECE_BYTES):
            left += data.count(b"\n")
            if time.monotonic() > deadline:
                break
        self._hold_back(left)
        if self._held_back:
            # Beyond the budget by this one entry: the count must not get lost.
            self._journal.send(self._fields, f"… {self._held_back:,} lines only in the log file")
        os.close(self._file)


def readable(line: bytes) -> str:
    """A line as text: what is not UTF-8, and NUL, arrive escaped."""
    return line.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def note(log: int, text: str) -> None:
    """Append a line of our own to a log, marked as such; a log that takes nothing is no reason to fail."""
    try:
        write_all(log, f"[lfsvc] {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass
