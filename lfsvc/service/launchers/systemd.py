"""Every job in a transient unit of the user's systemd: nothing of it escapes, and it needs no service to go on.

Sources: org.freedesktop.systemd1(5), systemd.kill(5), systemd.service(5).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from lfsvc import paths, processes
from lfsvc.service.bus import Bus, BusError
from lfsvc.service.launchers.base import CannotStart, Refused, Start, boot_id

SYSTEMD = "org.freedesktop.systemd1"
MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = "org.freedesktop.systemd1.Manager"
UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"

# The unit is given this much longer than the runner's own grace time.
STOP_MARGIN_SECONDS = 5.0

# CLD_EXITED; anything else that is not 0 is a death by signal.
EXITED = 1

# Exit statuses by which systemd itself says what failed before the program ran. Source: systemd.exec(5).
FIRST_OWN_STATUS, LAST_OWN_STATUS = 200, 243


class _Watch:
    """What is known of a unit from its signals."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = unit_path(name)
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[str] = loop.create_future()
        self.ended = asyncio.Event()
        self.main_code = 0
        self.main_status = 0
        self.result = ""

    @property
    def rules(self) -> tuple[str, ...]:
        """The signals of this unit alone: an idle service is not woken by what others do."""
        manager = f"type='signal',sender='{SYSTEMD}',path='{MANAGER_PATH}',interface='{MANAGER}'"
        return (
            f"type='signal',sender='{SYSTEMD}',path='{self.path}'",
            f"{manager},member='JobRemoved',arg2='{self.name}'",
            f"{manager},member='UnitRemoved',arg0='{self.name}'",
        )

    def service_changed(self, changed: dict[str, Variant]) -> None:
        if "ExecMainCode" in changed:
            self.main_code = changed["ExecMainCode"].value
        if "ExecMainStatus" in changed:
            self.main_status = changed["ExecMainStatus"].value
        if "Result" in changed:
            self.result = changed["Result"].value

    def unit_changed(self, changed: dict[str, Variant]) -> None:
        state = changed.get("ActiveState")
        # The first signals after a start say "inactive", too: before anything has run.
        if state is not None and state.value in ("inactive", "failed") and self.main_code != 0:
            self.ended.set()

    def describe_end(self) -> str:
        """What happened to the runner, "" where it ended of itself with status 0."""
        if self.main_code == 0 or (self.main_code == EXITED and self.main_status == 0):
            return ""
        if self.main_code == EXITED:
            if FIRST_OWN_STATUS <= self.main_status <= LAST_OWN_STATUS:
                return f"could not be started by systemd (exit status {self.main_status}, see systemd.exec(5))"
            return f"ended with exit status {self.main_status}"
        return f"was killed by {processes.signal_name(self.main_status)}"


class SystemdLauncher:
    """See `base.Launcher`."""

    name = "systemd"

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._watches: dict[str, _Watch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Ask systemd for its signals.

        Raises:
            BusError: no systemd on this bus.
        """
        # A plain bus would try to activate systemd, in vain and with noise. Where it does run, a bus that
        # this very connection has started waits until systemd has joined it.
        if not paths.has_user_manager() and not await self._bus.has_owner(SYSTEMD):
            raise BusError("org.freedesktop.DBus.Error.NameHasNoOwner", "there is no systemd on this bus")
        self._bus.add_handler(self._on_message)
        await self._manager("Subscribe")

    async def _manager(self, member: str, signature: str = "", body: list[Any] | None = None) -> list[Any]:
        return await self._bus.call(SYSTEMD, MANAGER_PATH, MANAGER, member, signature, body)

    def _on_message(self, message: Message) -> bool:
        if message.message_type is not MessageType.SIGNAL:
            return False
        if message.member == "PropertiesChanged" and message.signature == "sa{sv}as":
            watch = next((w for w in self._watches.values() if w.path == message.path), None)
            if watch is not None:
                interface, changed, _ = message.body
                if interface == SERVICE:
                    watch.service_changed(changed)
                elif interface == UNIT:
                    watch.unit_changed(changed)
                return True
        elif message.interface == MANAGER and message.member == "JobRemoved":
            _, _, unit, result = message.body
            watch = self._watches.get(unit)
            if watch is not None and not watch.started.done():
                watch.started.set_result(result)
        elif message.interface == MANAGER and message.member == "UnitRemoved":
            watch = self._watches.get(message.body[0])
            # Before it has run, a unit can be loaded and dropped again.
            if watch is not None and watch.started.done():
                task = asyncio.ensure_future(self._removed(watch))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return False

    async def _removed(self, watch: _Watch) -> None:
        """Find out whether a unit that was removed is gone: a daemon-reload removes and adds every unit."""
        try:
            await self._manager("GetUnit", "s", [watch.name])
        except BusError as error:
            if error.name == "org.freedesktop.systemd1.NoSuchUnit":
                watch.ended.set()

    async def instance(self) -> str:
        started = await self._bus.get_property(SYSTEMD, MANAGER_PATH, MANAGER, "UserspaceTimestampMonotonic")
        return f"{boot_id()}/{started}"

    async def going_down(self) -> bool:
        try:
            state = await self._bus.get_property(SYSTEMD, MANAGER_PATH, MANAGER, "SystemState")
        except BusError:
            # A manager that does not answer any more is going down or has gone.
            return True
        return bool(state == "stopping")

    async def start(self, start: Start) -> str:
        name = unit_name(start.job_id)
        watch = await self._watch(name)
        try:
            await self._start_unit(name, start)
            result = await watch.started
        except BusError as error:
            await self._unwatch(name)
            if await self.going_down():
                raise Refused(str(error)) from error
            raise CannotStart(f"systemd does not start {name}: {error}.") from error
        if result != "done":
            await self._unwatch(name)
            if await self.going_down():
                raise Refused(f"the start of {name} ended as {result}")
            reason = watch.describe_end() or f"its start ended as {result}"
            raise CannotStart(f"systemd could not start {name}: {reason}. See journalctl --user -u {name}.")
        return f"{name} {await self._invocation(watch)}".strip()

    async def _start_unit(self, name: str, start: Start) -> None:
        body = [name, "fail", properties(start), []]
        try:
            await self._manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        except BusError as error:
            if error.name != "org.freedesktop.systemd1.UnitExists":
                raise
            # A unit that failed and was never looked at keeps its name until it is reset.
            await self._manager("ResetFailedUnit", "s", [name])
            await self._manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)

    async def _invocation(self, watch: _Watch) -> str:
        """The id of this run of the unit; "" where it has ended already."""
        with suppress(BusError):
            return bytes(await self._bus.get_property(SYSTEMD, watch.path, UNIT, "InvocationID")).hex()
        return ""

    async def attach(self, start: Start, handle: str) -> bool:
        name = unit_name(start.job_id)
        # Signals first, then the present state: an end in between is seen twice, never missed.
        watch = await self._watch(name)
        watch.started.set_result("done")
        try:
            await self._manager("GetUnit", "s", [name])
            interface = "org.freedesktop.DBus.Properties"
            (unit,) = await self._bus.call(SYSTEMD, watch.path, interface, "GetAll", "s", [UNIT])
            (service,) = await self._bus.call(SYSTEMD, watch.path, interface, "GetAll", "s", [SERVICE])
        except BusError:
            await self._unwatch(name)
            return False
        _, _, invocation = handle.partition(" ")
        other = invocation and bytes(unit["InvocationID"].value).hex() != invocation
        watch.service_changed(service)
        watch.unit_changed(unit)
        if other or unit["LoadState"].value == "not-found" or watch.ended.is_set():
            await self._unwatch(name)
            return False
        return True

    async def wait(self, job_id: int) -> str:
        name = unit_name(job_id)
        watch = self._watches[name]
        await watch.ended.wait()
        await self._unwatch(name)
        return watch.describe_end()

    async def stop(self, job_id: int) -> None:
        # NoSuchUnit: it has just ended by itself.
        with suppress(BusError):
            await self._manager("StopUnit", "ss", [unit_name(job_id), "replace"])

    async def clear(self, start: Start) -> None:
        await self.stop(start.job_id)

    async def _watch(self, name: str) -> _Watch:
        watch = self._watches[name] = _Watch(name)
        for rule in watch.rules:
            await self._bus.add_match(rule)
        return watch

    async def _unwatch(self, name: str) -> None:
        watch = self._watches.pop(name)
        watch.started.cancel()
        for rule in watch.rules:
            await self._bus.remove_match(rule)


def unit_name(job_id: int) -> str:
    """The unit of a job."""
    return f"lfsvc-job-{job_id}.service"


def unit_path(name: str) -> str:
    """The object of a unit: every character but ASCII letters and digits is written as _xx."""
    escaped = "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):02x}" for c in name)
    return f"{MANAGER_PATH}/unit/{escaped}"


def properties(start: Start) -> list[list[Any]]:
    """The unit's properties. It neither requires nor is part of lfsched.service, so it outlives it."""
    arguments = start.runner_arguments
    stop_usec = round((start.grace_seconds + STOP_MARGIN_SECONDS) * 1_000_000)
    return [
        ["Description", Variant("s", f"lfsvc job {start.job_id}: {start.title}")],
        # exec: a runner that cannot be executed fails the start, instead of a unit that is already up.
        ["Type", Variant("s", "exec")],
        # Ex: the plain ExecStart would expand $VAR in the arguments.
        ["ExecStartEx", Variant("a(sasas)", [[arguments[0], arguments, ["no-env-expand"]]])],
        ["Slice", Variant("s", "app-lfsvc.slice")],
        # SIGTERM to the runner alone, which passes it on; when it has exited, SIGKILL to all that is left.
        ["KillMode", Variant("s", "mixed")],
        ["TimeoutStopUSec", Variant("t", stop_usec)],
        # One rank out of memory is a failed job with a sentence, not a unit that is gone.
        ["OOMPolicy", Variant("s", "continue")],
        # Core dumps of a training are as large as its memory.
        ["LimitCORE", Variant("t", 0)],
        ["TasksMax", Variant("t", 2**64 - 1)],
        ["CollectMode", Variant("s", "inactive-or-failed")],
        ["SyslogIdentifier", Variant("s", "lfsvc-job")],
    ]
