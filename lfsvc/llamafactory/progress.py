"""trainer_log.jsonl → progress: read on from where the step began, never twice.

Standard library only and cheap: the runner reads it while a training prints.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILE = "trainer_log.jsonl"

# An hour of training writes some kilobytes. A reader that is further behind skips to the newest part.
MAX_BYTES = 256 * 1024

# A number beyond it is no measurement, and may not fit a float at all.
MOST = 1e300

COUNTS = ("current_steps", "total_steps")
NUMBERS = ("percentage", "loss", "lr", "epoch")
TIMES = ("elapsed_time", "remaining_time")


class NewLines:
    """The lines that are added to the trainer_log.jsonl of one output_dir.

    LLaMA-Factory appends to it across runs, and removes it first where the output folder is
    overwritten; so the file is held open, and another one under its name is read from its beginning.
    """

    def __init__(self, folder: str, *, most_bytes: int) -> None:
        """A reader that is further behind than `most_bytes` skips to the newest part."""
        self._path = os.path.join(folder, FILE)
        self._most_bytes = most_bytes
        self._file = -1
        self._rest = b""

    def skip(self) -> None:
        """Pass over what is there already."""
        if self._open():
            os.lseek(self._file, 0, os.SEEK_END)

    def _open(self) -> bool:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        return True

    def read(self) -> tuple[list[bytes], bool]:
        """Give the lines since the last look, and whether they begin anew: in another file, or in one cut short."""
        if self._file >= 0 and self._replaced():
            self.close()
        anew = self._file < 0
        if anew and not self._open():
            return [], False
        try:
            size = os.fstat(self._file).st_size
            offset = os.lseek(self._file, 0, os.SEEK_CUR)
            if size < offset:
                # Truncated in its place.
                anew = True
                offset = os.lseek(self._file, 0, os.SEEK_SET)
                self._rest = b""
            if size - offset > self._most_bytes:
                os.lseek(self._file, size - self._most_bytes, os.SEEK_SET)
                self._rest = b""
            data = self._rest + os.read(self._file, self._most_bytes)
        except OSError:
            return [], False
        *lines, self._rest = data.split(b"\n")
        self._rest = self._rest[-self._most_bytes :]
        return lines, anew

    def _replaced(self) -> bool:
        try:
            there, ours = os.stat(self._path), os.fstat(self._file)
        except OSError:
            # Removed, and not yet there again.
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def close(self) -> None:
        """Stop following."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        self._rest = b""


class TrainerLog:
    """The progress of the run that writes the trainer_log.jsonl of one output_dir from now on."""

    def __init__(self, folder: str) -> None:
        self._lines = NewLines(folder, most_bytes=MAX_BYTES)
        self._lines.skip()
        self.progress: dict[str, Any] = {}

    def read(self) -> bool:
        """Take in what was added; True where that changed the progress."""
        before = self.progress
        for line in self._lines.read()[0]:
            self.progress = {**self.progress, **progress_of(line)}
        return self.progress != before

    def close(self) -> None:
        """Stop following."""
        self._lines.close()


def progress_of(line: bytes) -> dict[str, Any]:
    """The progress in one line, in the trainer's own words; {} where it is none.

    Steps are whole numbers, percentage is 0 to 100, times are seconds; a key that the trainer left out
    is left out. A loss that is no number (NaN) is one all the same: it is what the user has to see.
    """
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(entry, dict):
        return {}
    found: dict[str, Any] = {}
    for key in COUNTS:
        value = entry.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
            found[key] = value
    for key in NUMBERS:
        value = entry.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST:
            found[key] = float(value)
        elif isinstance(value, float) and key != "percentage":
            # A loss that is no number, or without end.
            found[key] = value
    for key in TIMES:
        seconds = seconds_of(entry.get(key))
        if seconds is not None:
            found[key] = seconds
    return found


def seconds_of(value: object) -> int | None:
    """Read a duration as Python prints a timedelta: `0:12:03`, `1 day, 2:03:04`, `2 days, 0:00:01`."""
    if not isinstance(value, str):
        return None
    days, comma, clock = value.rpartition(", ")
    fields = clock.split(":")
    count = days.split(" ")[0] if comma else "0"
    if len(fields) != 3 or not all(word.isascii() and word.isdigit() and len(word) < 9 for word in [count, *fields]):
        return None
    hours, minutes, seconds = map(int, fields)
    return ((int(count) * 24 + hours) * 60 + minutes) * 60 + seconds
