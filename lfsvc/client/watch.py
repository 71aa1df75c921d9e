"""`lfsvc watch`: the screen of `lfsvc status`, live: told by the bus, drawn with rich, left with q.

It survives a restart of the service and of the bus, and gives the terminal back as it was, however it ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import BusGone, Client
from lfsvc.client.output import Line, style_of
from lfsvc.client.screen import fitted, status_lines
from lfsvc.client.show import recent_jobs
from lfsvc.errors import LfsvcError, NoService, WrongUse
from lfsvc.llamafactory.progress import FILE, NewLines

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from lfsvc.client.screen import Job

# While something runs, its clocks go on; else only "3 min ago" grows old. No message tells of the time.
RUNNING_SECONDS, IDLE_SECONDS = 1.0, 30.0
LEAVE = b"qQ\x03\x04"
FOOTER = "q leaves; jobs go on"
AWAY = "The scheduler is away; jobs go on. Waiting for it ..."

# A training log of a week is smaller; of a longer one the newest part is drawn.
MAX_LOG_BYTES = 16 * 1024 * 1024
MAX_POINTS = 8192
# The curve is drawn higher where there is room: lines of the terminal at least → rows of the curve.
CURVE_ROWS = ((34, 8), (24, 4), (0, 1))
WIDEST_CURVE = 100


def watch_command(arguments: Namespace) -> int:
    """Show what runs, what waits and what ended until q is pressed."""
    del arguments
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise WrongUse("lfsvc watch needs a terminal.", "lfsvc status prints the same once")
    terminal = _Terminal()
    client = Client.connect()
    # Signals first, then the present state: nothing in between is missed.
    client.watch()
    view = View(client)
    view.ask(start=True)
    terminal.run(view)
    return 0


def rich_module(name: str) -> Any:
    """A module of rich, which is imported here alone: it takes longer than all of `lfsvc status`.

    Raises:
        LfsvcError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"rich.{name}")
    except ImportError as error:
        raise LfsvcError(
            f"lfsvc watch draws with rich, which cannot be used: {error}.", "pip install rich; lfsvc status needs none"
        ) from None


# -- the loss so far --------------------------------------------------------------------------------


class LossHistory:
    """The losses of one training, read on from where the last look ended; thinned where they are many."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, FILE)
        self._lines = NewLines(folder, most_bytes=MAX_LOG_BYTES)
        self._step = 0
        self.values: list[float] = []

    def read(self, since: float = 0.0) -> None:
        """Take in what was added. A file not written since `since` (seconds since the epoch) is of an older run."""
        try:
            if os.stat(self._path).st_mtime < since:
                return
        except OSError:
            # Not there yet, or no longer.
            return
        lines, anew = self._lines.read()
        if anew:
            self._step, self.values = 0, []
        for line in lines:
            self._add(line)

    def close(self) -> None:
        """Stop following."""
        self._lines.close()

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            step, loss = int(entry["current_steps"]), entry["loss"]
        except (ValueError, TypeError, KeyError, OverflowError):
            return
        if isinstance(loss, bool) or not isinstance(loss, int | float):
            return
        try:
            value = float(loss)
        except OverflowError:
            return
        if step <= self._step:
            # LLaMA-Factory appends: the next run of the same folder begins here.
            self.values = []
        self._step = step
        self.values.append(value)
        if len(self.values) > MAX_POINTS:
            self.values = self.values[::2]


def curve_rows(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """Values as columns of blocks, `height` rows high, the highest value at the top; x is a value that is no number.

    Where there are more values than columns, each column is the mean of its part.
    """
    columns = min(width, len(values))
    means: list[float | None] = []
    for place in range(columns):
        part = values[place * len(values) // columns : (place + 1) * len(values) // columns]
        finite = [value for value in part if value - value == 0]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    steps = 8 * height - 1
    levels = [
        None if mean is None else 1 + round((mean - low) / (high - low) * steps if high > low else steps / 2)
        for mean in means
    ]
    rows = []
    for row in reversed(range(height)):
        filled = [None if level is None else min(max(level - 8 * row, 0), 8) for level in levels]
        rows.append("".join(("x" if row == 0 else " ") if part is None else " ▁▂▃▄▅▆▇█"[part] for part in filled))
    return rows


def curve_lines(values: Sequence[float], width: int, height: int) -> list[Line]:
    """The losses so far as a curve between its first and its last value; [] where there are too few."""
    if len(values) < 2:
        return []
    first, last = f"loss {values[0]:.4g} ", f" {values[-1]:.4g}"
    rows = curve_rows(values, max(width - len(first) - len(last), 1), height)
    # A loss falls: the first value stands beside the top, the last one at the bottom.
    left = [first] + [" " * len(first)] * (height - 1)
    right = [""] * (height - 1) + [last]
    return [[(a, "dim"), (row, "bar"), (b, "")] for a, row, b in zip(left, rows, right, strict=True)]


# -- what is shown ----------------------------------------------------------------------------------


class View:
    """The latest that the service said. Without a client while the bus is away."""

    def __init__(self, client: Client | None = None) -> None:
        self.client = client
        self.away = False
        self.status: dict[str, Any] = {}
        self.recent: list[Job] = []
        self.histories: dict[int, LossHistory] = {}

    def ask(self, *, start: bool = False) -> None:
        """Ask for everything anew. Without `start`, a service that is away is waited for, not started."""
        assert self.client is not None
        try:
            self.status = self.client.call("Status", start=start)
            self.recent = recent_jobs(self.client, start=start)
            self.away = False
        except BusGone:
            raise
        except LfsvcError:
            if start:
                raise
            # Its next start is told, and asked then.
            self.away = True
        self._read_losses()

    def _read_losses(self) -> None:
        running = {job["id"]: job for job in self.status["running"] if job.get("output_dir")}
        for number in self.histories.keys() - running.keys():
            self.histories.pop(number).close()
        for number, job in running.items():
            self.histories.setdefault(number, LossHistory(job["output_dir"]))
        for number, history in self.histories.items():
            history.read(running[number].get("started_at", 0) / 1e6)

    def take_messages(self) -> None:
        """Take in what the bus tells."""
        if self.client is None:
            self._reconnect()
            return
        try:
            if self.client.take_signals() or self.away:
                self.ask()
        except BusGone:
            self.client, self.away = None, True

    def has_messages(self) -> bool:
        """Whether the bus has told something that its descriptor says nothing of."""
        try:
            return self.client is not None and self.client.has_signals()
        except BusGone:
            self.client, self.away = None, True
            return False

    def _reconnect(self) -> None:
        # Nothing tells of a bus that is not there: this is tried at each redraw.
        try:
            self.client = Client.connect()
            self.client.watch()
            self.ask()
        except NoService:
            self.client = None

    def lines(self, now: float, width: int, height: int) -> list[Line]:
        """The screen at `now` (seconds since the epoch), filled to its height."""
        high = next(rows for least, rows in CURVE_ROWS if height >= least)
        indent = max((len(str(job["id"])) for job in self._jobs()), default=0) + 2
        below: dict[int, list[Line]] = {}
        for number, history in self.histories.items():
            curve = curve_lines(history.values, min(width - indent, WIDEST_CURVE), high)
            below[number] = [[], *curve] if high > 1 and curve else curve
        body = max(height - 2, 0)
        shown = status_lines(self.status, self.recent, now, width=width, height=body, below=below)[:body]
        shown += [[]] * (body - len(shown))
        last: Line = [(AWAY, "warning") if self.away else (FOOTER, "dim")]
        return [*shown, [], fitted(last, width)][-height:]

    def _jobs(self) -> list[Job]:
        return [*self.status["running"], *self.status["queued"], *self.recent]

    def timeout(self) -> float:
        """After how many seconds the screen is drawn again, though nothing was told."""
        return RUNNING_SECONDS if self.status["running"] or self.away else IDLE_SECONDS


def to_text(lines: Sequence[Line], text_class: Any) -> Any:
    """The lines as one text of rich, without a line end behind the last: that would scroll the screen."""
    text = text_class(no_wrap=True, overflow="crop", end="")
    for number, line in enumerate(lines):
        text.append("\n" if number else "")
        for words, style in line:
            text.append(words, style_of(style)[1])
    return text


# -- the terminal -----------------------------------------------------------------------------------


ENDING = (
    signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGABRT,
)  # fmt: skip


class _Leave(BaseException):
    """A signal that ends the program came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _leave(number: int, frame: object) -> None:
    del frame  # part of the interface
    raise _Leave(number)


def _wake(number: int, frame: object) -> None:
    """Nothing: the number arrives on the wake-up descriptor."""


class _Terminal:
    """The terminal while it is ours: a screen of its own, keys one by one, told of its size."""

    def __init__(self) -> None:
        self._text = rich_module("text").Text
        self._screen = rich_module("screen").Screen
        self._home = rich_module("control").Control.home()
        self._console = rich_module("console").Console(highlight=False)
        if self._console.is_dumb_terminal:
            raise WrongUse("lfsvc watch needs a terminal that can be drawn on.", "lfsvc status prints the same once")

    def run(self, view: View) -> None:
        """Show the view until a key or a signal ends it; the terminal is then as it was."""
        import termios

        wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = termios.tcgetattr(sys.stdin)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        ended_by = 0
        try:
            for number in ENDING:
                signal.signal(number, _leave)
            for number in (signal.SIGWINCH, signal.SIGTSTP):
                signal.signal(number, _wake)
            while self._show(view, wakeup, before):
                # Ctrl-Z: the terminal is the shell's until `fg`.
                os.kill(os.getpid(), signal.SIGSTOP)
        except _Leave as leave:
            ended_by = leave.number
        finally:
            # A second Ctrl-C must not leave the terminal half restored.
            for number in ENDING:
                signal.signal(number, signal.SIG_IGN)
            self._restore(before)
        if ended_by not in (0, signal.SIGINT):
            signal.signal(ended_by, signal.SIG_DFL)
            os.kill(os.getpid(), ended_by)

    def _show(self, view: View, wakeup: int, before: list[Any]) -> bool:
        """Draw and wait in turn; True where Ctrl-Z was pressed, False where it is to end."""
        import tty

        try:
            tty.setcbreak(sys.stdin)
            self._console.set_alt_screen(True)
            self._console.show_cursor(False)
            while True:
                self._draw(view)
                ready = self._wait(view, wakeup)
                if sys.stdin.fileno() in ready and _is_leave(_read_key()):
                    return False
                if wakeup in ready and signal.SIGTSTP in os.read(wakeup, 64):
                    return True
                view.take_messages()
        finally:
            self._restore(before)

    def _wait(self, view: View, wakeup: int) -> set[int]:
        """Wait for a key, a signal, a message or the next second; give the descriptors that have something."""
        if view.has_messages():
            return set()
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        poll.register(wakeup, select.POLLIN)
        if view.client is not None:
            poll.register(view.client.fileno(), select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(view.timeout() * 1000)}

    def _draw(self, view: View) -> None:
        width, height = self._console.size
        text = to_text(view.lines(time.time(), width, height), self._text)
        # As one write: no half of a screen is ever seen.
        with self._console:
            self._console.control(self._home)
            self._console.print(self._screen(text), end="")

    def _restore(self, before: list[Any]) -> None:
        import termios

        try:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
        except (OSError, termios.error):
            # The terminal itself is gone.
            pass


def _read_key() -> bytes:
    # os.read, since the buffer of sys.stdin hides from poll() what it has taken.
    try:
        return os.read(sys.stdin.fileno(), 64)
    except OSError:
        return b""


def _is_leave(keys: bytes) -> bool:
    """Whether what was typed ends it; b"" is a terminal that is gone. Arrow keys, Alt-q and their like do not."""
    import re

    # Escape with what belongs to it. Source: ECMA-48, 5.4
    return not keys or any(key in LEAVE for key in re.sub(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O?.)?", b"", keys))
