"""What the commands print: JSON for programs in one schema, lines for people as their terminal takes them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from lfsvc.wording import printable, with_iso_times, wrap

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

# The schema of --json: key → (JSON type, meaning). A key without a value is left out; a number that JSON
# lacks (NaN, infinity) is null; `time` is a string, ISO 8601 in UTC with microseconds. A key is added, never
# taken away or given another meaning. submit, list and wait print an array of jobs, show a job.
JOB: dict[str, tuple[str, str]] = {
    "id": ("integer", "its number, never used again"),
    "task": ("string", "as it was submitted, with an absolute path"),
    "name": ("string", "what --name gave it"),
    "command": ("string", "train, eval or shell"),
    "path": ("string", "the file of the task"),
    "devices": ("array of integer", "the devices of the task"),
    "evaluate": ("boolean", "whether its end queues an evaluation; always there"),
    "state": ("string", "queued, running, succeeded, failed, killed, interrupted or cancelled"),
    "step": ("string", "the step that runs"),
    "steps": ("array of step", "the steps so far, in their order"),
    "exit_status": ("integer", "0 to 255; 128+N for signal N; -1 where nothing ran"),
    "failed_step": ("string", "the step that failed"),
    "failure": ("string", "one sentence: the cause and what to do"),
    "output_dir": ("string", "where its results go"),
    "log": ("string", "the log to look at first: of the step that runs or failed, else of the first"),
    "model": ("string", "the folder of the merged model"),
    "progress": ("progress", "what the trainer said last"),
    "queued_at": ("time", "when it was submitted"),
    "started_at": ("time", "when its first step began"),
    "finished_at": ("time", "when it ended"),
    "parent": ("integer", "the training that this evaluation is of"),
    "evaluations": ("array of integer", "the evaluations that its end queued"),
    "attempts": ("integer", "how often it was started"),
    "warnings": ("array of string", "what was unusual"),
}
STEP: dict[str, tuple[str, str]] = {
    "name": ("string", "train, merge, eval, collect or shell"),
    "state": ("string", "pending, running, succeeded, failed, killed or skipped"),
    "started_at": ("time", "when it began"),
    "finished_at": ("time", "when it ended"),
    "exit_status": ("integer", "of its process"),
    "log": ("string", "the file with its output"),
    "note": ("string", "why it was skipped, and the like"),
}
PROGRESS: dict[str, tuple[str, str]] = {
    "current_steps": ("integer", "steps done"),
    "total_steps": ("integer", "steps in all"),
    "percentage": ("number", "0 to 100"),
    "loss": ("number", "null where it is no number"),
    "lr": ("number", "learning rate"),
    "epoch": ("number", "epochs done"),
    "elapsed_time": ("integer", "seconds"),
    "remaining_time": ("integer", "seconds"),
}
STATUS: dict[str, tuple[str, str]] = {
    "version": ("string", "of the scheduler"),
    "state": ("string", "idle or running"),
    "running": ("array of job", "what runs"),
    "queued": ("array of job", "what waits, next first; at most 100"),
    "queue_length": ("integer", "how many wait"),
    "started_at": ("time", "when the scheduler started"),
    "llamafactory_cli": ("string", "the program that jobs run"),
}
CHECK: dict[str, tuple[str, str]] = {"warnings": ("array of string", "what submit would warn of")}
SCHEMA = {"status": STATUS, "job": JOB, "step": STEP, "progress": PROGRESS, "check": CHECK}

# For a terminal whose encoding lacks them.
ASCII = str.maketrans("━─╸…▁▂▃▄▅▆▇█", "#--~__..--==")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    import json

    document = with_iso_times(value)
    ascii_only = not _is_utf8(sys.stdout)
    print(json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False))


# -- lines for people ------------------------------------------------------------------------------

# A line is its pieces, each with the name of a style.
Span = tuple[str, str]
Line = list[Span]

# Style → what a terminal calls it (ECMA-48 SGR), and what rich calls it. States and words are told apart
# without them, too. No blue: it is hard to read on black.
STYLES: dict[str, tuple[str, str]] = {
    "title": ("1", "bold"),
    "dim": ("2", "dim"),
    "running": ("1;36", "bold cyan"),
    "queued": ("", ""),
    "succeeded": ("32", "green"),
    "failed": ("31", "red"),
    "killed": ("35", "magenta"),
    "interrupted": ("33", "yellow"),
    "cancelled": ("2", "dim"),
    "skipped": ("2", "dim"),
    "pending": ("2", "dim"),
    "warning": ("33", "yellow"),
    "bar": ("36", "cyan"),
}


def plain(line: Line) -> str:
    """A line without colours."""
    return "".join(text for text, _ in line).rstrip()


def ansi(line: Line) -> str:
    """A line with colours for a terminal."""
    return "".join(f"\x1b[{code}m{text}\x1b[0m" if (code := style_of(style)[0]) else text for text, style in line)


def style_of(name: str) -> tuple[str, str]:
    """The row of STYLES; a state that a newer service has, and this client does not know, is plain."""
    return STYLES.get(name, ("", ""))


def terminal_width(file: TextIO) -> int:
    """The width of the terminal that a stream goes to, in columns; 0 for a pipe or a file, in which nothing is cut."""
    if not file.isatty():
        return 0
    from shutil import get_terminal_size

    return get_terminal_size().columns


def terminal_height(file: TextIO) -> int:
    """The height of the terminal that a stream goes to, in lines; 0 for a pipe or a file."""
    if not file.isatty():
        return 0
    from shutil import get_terminal_size

    return get_terminal_size().lines


def has_colour(file: TextIO) -> bool:
    """Whether a stream takes colours. Source: https://no-color.org"""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def emit(lines: Iterable[Line], file: TextIO) -> None:
    """Print lines in colour or without, whatever the stream's encoding can write."""
    text = "".join(f"{line}\n" for line in map(ansi if has_colour(file) else plain, lines))
    if not _is_utf8(file):
        encoding = file.encoding or "ascii"
        text = text.translate(ASCII).encode(encoding, "replace").decode(encoding)
    file.write(text)


def error_lines(text: str, width: int = 0) -> list[Line]:
    """An error as people see it: the fact, and from a second line on what to do."""
    fact, *hints = [printable(line) for line in text.split("\n")]
    first, *rest = wrap(f"lfsvc: {fact}", width)
    lines: list[Line] = [[("lfsvc:", "failed"), (first.removeprefix("lfsvc:"), "title")]]
    lines += [[(line, "title")] for line in rest]
    for hint in hints:
        lines += [[(line, "")] for line in wrap(hint, width)]
    return lines


def _is_utf8(file: TextIO) -> bool:
    return (file.encoding or "").lower().replace("-", "").replace("_", "") == "utf8"
