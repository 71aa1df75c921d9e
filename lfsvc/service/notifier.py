"""Tells the targets of `notify:` how jobs end. A listener that neither blocks nor raises, whatever a server does."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dbus_next.signature import Variant

from lfsvc import journal
from lfsvc.delivery import (
    DESKTOP_SECONDS,
    NO_DAEMON,
    NOTIFICATIONS,
    NOTIFICATIONS_PATH,
    Children,
    Command,
    Outcome,
    desktop_arguments,
    post,
)
from lfsvc.job import Job
from lfsvc.llamafactory.environment import BOOKKEEPING
from lfsvc.notify import PRESETS, Message, Tally, Target, job_message
from lfsvc.service.bus import BUS, Bus, BusError, clean
from lfsvc.service.events import Listener, Log
from lfsvc.service.wire import job_dictionary
from lfsvc.wording import with_iso_times

# Between the tries of one message: a router that restarts is no reason to lose it.
DELAYS = (2.0, 8.0, 32.0, 128.0)
# How many messages may wait; where more come, the oldest gives way.
MOST_WAITING = 200
CLOSE_SECONDS = 1.5
STOPS = "the scheduler stops"

Try = Callable[[Target, Message], Outcome]
Say = Callable[[Target, Message, str], None]


@dataclass(order=True)
class _Entry:
    """A message on its way to a target. `due`: monotonic."""

    due: float
    number: int
    target: Target = field(compare=False)
    message: Message = field(compare=False)
    tries: int = field(default=0, compare=False)


class Outbox:
    """Messages that wait, and a thread of its own that delivers them, each when it is due.

    A try that failed waits among the others, so a dead server delays its own messages only, but for
    the time of one try. The thread begins with the first message and sleeps while nothing is due.
    """

    def __init__(self, attempt: Try, say: Say, delays: Sequence[float]) -> None:
        """`attempt` is called in the thread; `say` is told why a message was not delivered, in any thread."""
        self._attempt = attempt
        self._say = say
        self._delays = delays
        self._condition = threading.Condition()
        self._waiting: list[_Entry] = []
        self._busy: _Entry | None = None
        self._numbers = itertools.count()
        self._sent: dict[Target, deque[float]] = {}
        self._thread: threading.Thread | None = None
        self._closing = False
        self._abandoned = False

    def put(self, target: Target, message: Message) -> None:
        """Have a message delivered."""
        with self._condition:
            self._push(_Entry(time.monotonic(), next(self._numbers), target, message))
            if self._thread is None:
                # A daemon: the service's end does not wait for a server.
                thread = threading.Thread(target=self._run, name="notifications", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    # No more threads for this user; the next message tries again.
                    self._say(target, message, str(error))
                    return
                self._thread = thread

    def _push(self, entry: _Entry) -> None:
        if len(self._waiting) >= MOST_WAITING:
            oldest = min(self._waiting, key=lambda waiting: waiting.number)
            self._waiting.remove(oldest)
            heapq.heapify(self._waiting)
            self._say(oldest.target, oldest.message, f"more than {MOST_WAITING} messages wait")
        heapq.heappush(self._waiting, entry)
        self._condition.notify_all()

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            try:
                outcome = self._attempt(entry.target, entry.message)
            except Exception as error:
                # Whatever one target provokes, the others are told.
                outcome = Outcome(problem=f"{type(error).__name__}: {error}")
            with self._condition:
                self._busy = None
                if self._abandoned:
                    return
                self._conclude(entry, outcome)

    def _next(self) -> _Entry | None:
        """Wait for what is due; None at the end."""
        with self._condition:
            while not self._abandoned:
                now = time.monotonic()
                if self._waiting and self._waiting[0].due <= now:
                    entry = heapq.heappop(self._waiting)
                    entry.due = self._free_at(entry.target, now)
                    if entry.due > now:
                        heapq.heappush(self._waiting, entry)
                        continue
                    self._busy = entry
                    return entry
                if self._closing:
                    return None
                self._condition.wait(self._waiting[0].due - now if self._waiting else None)
        return None

    def _free_at(self, target: Target, now: float) -> float:
        """When the server may be posted to again; a group's robot that is asked too often falls silent."""
        if target.kind != "webhook":
            return now
        sent = self._sent.setdefault(target, deque(maxlen=PRESETS[target.preset].per_minute))
        if len(sent) == sent.maxlen and sent[0] + 60 > now:
            return sent[0] + 60
        sent.append(now)
        return now

    def _conclude(self, entry: _Entry, outcome: Outcome) -> None:
        if not outcome.problem:
            return
        if not outcome.again or entry.tries >= len(self._delays):
            tries = f" (after {entry.tries + 1} tries)" if entry.tries else ""
            self._say(entry.target, entry.message, outcome.problem + tries)
            return
        delay = max(self._delays[entry.tries], outcome.wait_seconds)
        self._push(_Entry(time.monotonic() + delay, entry.number, entry.target, entry.message, entry.tries + 1))

    def close(self, seconds: float) -> None:
        """Deliver what is due, for so many seconds at most; say what is left. Blocks."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
        with self._condition:
            self._abandoned = True
            left = [*([self._busy] if self._busy else []), *sorted(self._waiting)]
            self._waiting.clear()
        for entry in left:
            self._say(entry.target, entry.message, STOPS)


class Notifier(Listener):
    """Attached with `scheduler.listen(notifier)`; a reload sets `targets`. Made and used in the event loop."""

    def __init__(
        self,
        *,
        targets: tuple[Target, ...],
        bus: Bus,
        log: Log,
        idle: Callable[[], bool],
        environment: Callable[[], Mapping[str, str]],
        children: Children,
        delays: Sequence[float] = DELAYS,
    ) -> None:
        """Make one.

        Args:
            targets: whom to tell.
            bus: where a notification daemon may be.
            log: is told what could not be delivered.
            idle: whether nothing runs and nothing waits.
            environment: where proxies are looked up; called in a thread.
            children: whom the process launcher spares.
            delays: seconds between the tries of one message.
        """
        self.targets = targets
        self._bus = bus
        self._log = log
        self._idle = idle
        self._environment = environment
        self._host = socket.gethostname()
        self._loop = asyncio.get_running_loop()
        self._tally = Tally()
        self._desktop: set[asyncio.Task[None]] = set()
        self._told_no_daemon = False
        self._command = Command(children)
        self._outbox = Outbox(self._attempt, self._say_from_thread, delays)

    def finished(self, job: Job) -> None:
        """Tell of a job's end, and count it."""
        self._tally.add(job)
        if any(job.state.value in target.on for target in self.targets):
            self._tell(job_message(job, with_iso_times(plain(job_dictionary(job))), self._host))

    def changed(self) -> None:
        """Tell when the queue has become empty."""
        if self._tally.counts and self._idle():
            tally, self._tally = self._tally, Tally()
            self._tell(tally.message(self._host))

    def _tell(self, message: Message) -> None:
        for target in self.targets:
            if message.event not in target.on:
                continue
            if target.kind != "desktop":
                self._outbox.put(target, message)
            elif len(self._desktop) < MOST_WAITING:
                task = asyncio.ensure_future(self._show(target, message))
                self._desktop.add(task)
                task.add_done_callback(self._desktop.discard)
            else:
                self._say(target, message, f"more than {MOST_WAITING} messages wait")

    async def close(self) -> None:
        """Deliver what is due, for CLOSE_SECONDS at most; say what is left."""
        closing = asyncio.ensure_future(asyncio.to_thread(self._outbox.close, CLOSE_SECONDS))
        if self._desktop:
            await asyncio.wait(self._desktop, timeout=CLOSE_SECONDS)
        for task in list(self._desktop):
            task.cancel()
        await asyncio.gather(closing, *self._desktop, return_exceptions=True)
        self._command.kill()

    # -- in the thread ---------------------------------------------------------------------------

    def _attempt(self, target: Target, message: Message) -> Outcome:
        if target.kind == "command":
            own = {name: value for name, value in os.environ.items() if name not in BOOKKEEPING}
            return self._command.run(target, message, own)
        try:
            environment = self._environment()
        except Exception:
            # The file of the jobs' environment cannot be read; their start says so.
            environment = os.environ
        return post(target, message, environment)

    def _say_from_thread(self, target: Target, message: Message, problem: str) -> None:
        self._loop.call_soon_threadsafe(self._say, target, message, problem)

    # -- in the loop -----------------------------------------------------------------------------

    def _say(self, target: Target, message: Message, problem: str) -> None:
        fields = {"JOB_ID": str(message.job["id"])} if message.job else {}
        self._log.write(
            f"Entry {target.number} of notify ({target.label}) was not told {message.title!r}: {problem}",
            journal.WARNING,
            fields,
        )

    async def _show(self, target: Target, message: Message) -> None:
        try:
            shown = await show(self._bus, message)
        except asyncio.CancelledError:
            self._say(target, message, STOPS)
            raise
        except BusError as error:
            self._say(target, message, str(error))
            return
        if not shown and not self._told_no_daemon:
            # Every night without a desktop would say it again.
            self._log.write(f"Entry {target.number} of notify (desktop): {NO_DAEMON}", journal.NOTICE)
        self._told_no_daemon = not shown


async def show(bus: Bus, message: Message) -> bool:
    """Show a message on the desktop; False where no notification daemon is.

    It is asked by its unique name, which the bus activates nobody for: on a machine without a screen
    an activation hangs.

    Raises:
        BusError: the daemon did not take it, or not in time.
    """
    try:
        (owner,) = await bus.call(BUS, "/org/freedesktop/DBus", BUS, "GetNameOwner", "s", [NOTIFICATIONS])
    except BusError as error:
        if error.name == "org.freedesktop.DBus.Error.NameHasNoOwner":
            return False
        raise
    daemon = (str(owner), NOTIFICATIONS_PATH, NOTIFICATIONS)
    (capabilities,) = await bus.call(*daemon, "GetCapabilities", timeout=DESKTOP_SECONDS)
    *texts, urgency = desktop_arguments(message, markup="body-markup" in capabilities)
    body = [*clean(texts), [], {"urgency": Variant("y", urgency)}, -1]
    await bus.call(*daemon, "Notify", "susssasa{sv}i", body, timeout=DESKTOP_SECONDS)
    return True


def plain(value: Any) -> Any:
    """A value of the bus without its variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
