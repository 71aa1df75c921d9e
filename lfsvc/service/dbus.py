"""org.lfsvc1 on the session bus, from one table of methods: dispatch, introspection and checks all read it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

import lfsvc
from lfsvc.errors import Internal, LfsvcError
from lfsvc.job import Job
from lfsvc.service import wire
from lfsvc.service.admission import Options
from lfsvc.service.bus import Bus, BusError, clean
from lfsvc.service.events import Listener, Log
from lfsvc.service.scheduler import Scheduler

NAME = "org.lfsvc1"
PATH = "/org/lfsvc1"
INTERFACE = "org.lfsvc1.Scheduler"
PROPERTIES = "org.freedesktop.DBus.Properties"
STANDARD_ERROR = "org.freedesktop.DBus.Error."

# Status shows this many of those that wait; queue_length has them all.
STATUS_QUEUED = 100

Arguments = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: its arguments and results as (name, D-Bus type), and what answers it."""

    name: str
    arguments: Arguments
    results: Arguments
    answer: Callable[..., Awaitable[list[Any]]]

    @property
    def signature(self) -> str:
        """The D-Bus signature of its arguments."""
        return "".join(kind for _, kind in self.arguments)


SIGNALS: dict[str, Arguments] = {
    "JobQueued": (("job_id", "t"), ("task", "s")),
    "JobStarted": (("job_id", "t"), ("task", "s")),
    "JobProgress": (("job_id", "t"), ("progress", "a{sv}")),
    "JobFinished": (("job_id", "t"), ("state", "s"), ("exit_status", "i")),
}
PROPERTY_TYPES: dict[str, str] = {"Version": "s", "State": "s", "RunningJobs": "at", "QueueLength": "u"}


class SchedulerObject(Listener):
    """The object /org/lfsvc1. Also a Listener: what the scheduler tells becomes signals."""

    def __init__(self, bus: Bus, scheduler: Scheduler, log: Log, *, started_at: int, llamafactory_cli: str) -> None:
        self._bus = bus
        self._scheduler = scheduler
        self._log = log
        self._started_at = started_at
        self._llamafactory_cli = llamafactory_cli
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: dict[str, Any] = {}
        job_id = (("job_id", "t"),)
        task = ("task", "s")
        methods = (
            Method(name="Submit", arguments=(task,), results=job_id, answer=self._submit),
            Method(
                name="SubmitWithOptions",
                arguments=(task, ("options", "a{sv}")),
                results=job_id,
                answer=self._submit_with_options,
            ),
            Method(name="Check", arguments=(task,), results=(("warnings", "as"),), answer=self._check),
            Method(
                name="CheckWithOptions",
                arguments=(task, ("options", "a{sv}")),
                results=(("warnings", "as"),),
                answer=self._check_with_options,
            ),
            Method(name="Status", arguments=(), results=(("status", "a{sv}"),), answer=self._status),
            Method(name="Kill", arguments=(), results=job_id, answer=self._kill),
            Method(name="KillJob", arguments=job_id, results=(), answer=self._kill_job),
            Method(name="GetJob", arguments=job_id, results=(("job", "a{sv}"),), answer=self._get_job),
            Method(
                name="ListJobs",
                arguments=(("filter", "a{sv}"),),
                results=(("jobs", "aa{sv}"),),
                answer=self._list_jobs,
            ),
        )
        self._methods = {method.name: method for method in methods}
        self.introspection = introspection(methods)

    def export(self) -> None:
        """Answer calls from now on."""
        self._told = self._properties()
        self._bus.add_handler(self._on_message)

    # -- calls -----------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> bool:
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        if message.interface == "org.freedesktop.DBus.Peer":
            return False
        if message.member == "Introspect" and message.interface in (
            None,
            "org.freedesktop.DBus.Introspectable",
        ):
            xml = self.introspection if message.path == PATH else _parent(str(message.path))
            self._reply(message, "s", [xml])
            return True
        if message.path != PATH:
            self._error(message, STANDARD_ERROR + "UnknownObject", f"There is no object {message.path} here.")
        elif message.interface == PROPERTIES:
            self._answer_properties(message)
        elif message.interface not in (None, "", INTERFACE):
            self._error(message, STANDARD_ERROR + "UnknownInterface", f"There is no interface {message.interface}.")
        else:
            self._call(message)
        return True

    def _call(self, message: Message) -> None:
        method = self._methods.get(str(message.member))
        if method is None:
            known = ", ".join(self._methods)
            text = f"{INTERFACE} has no method {message.member}; it has {known}."
            self._error(message, STANDARD_ERROR + "UnknownMethod", text)
        elif message.signature != method.signature:
            takes = ", ".join(f"{kind} {name}" for name, kind in method.arguments) or "nothing"
            text = f"{method.name} takes {takes}; the call has the signature {message.signature!r}."
            self._error(message, STANDARD_ERROR + "InvalidArgs", text)
        else:
            task = asyncio.ensure_future(self._answer(message, method))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Message, method: Method) -> None:
        try:
            results = await method.answer(*message.body)
            self._reply(message, "".join(kind for _, kind in method.results), results)
        except LfsvcError as error:
            self._error(message, error.dbus_name, error.text)
        except asyncio.CancelledError:
            self._error(message, Internal("").dbus_name, "The scheduler stopped before it could answer.")
            raise
        except Exception as error:
            # A client gets a sentence; what happened is for whoever mends it.
            self._log.fault(error)
            fault = Internal(f"{method.name} met a fault in lfsvc.", "journalctl --user -u lfsched shows it")
            self._error(message, fault.dbus_name, fault.text)

    async def close(self) -> None:
        """Wait for the answers under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reply(self, message: Message, signature: str, body: list[Any]) -> None:
        if not message.flags & MessageFlag.NO_REPLY_EXPECTED:
            self._bus.send(Message.new_method_return(message, signature, clean(body)))

    def _error(self, message: Message, name: str, text: str) -> None:
        if not message.flags & MessageFlag.NO_REPLY_EXPECTED:
            self._bus.send(Message.new_error(message, name, clean(text)))

    # -- methods ---------------------------------------------------------------------------------

    async def _submit(self, task: str) -> list[Any]:
        return [(await self._scheduler.submit(task, Options())).id]

    async def _submit_with_options(self, task: str, options: dict[str, Variant]) -> list[Any]:
        return [(await self._scheduler.submit(task, wire.options_of(options))).id]

    async def _check(self, task: str) -> list[Any]:
        return [list(await self._scheduler.check(task, Options()))]

    async def _check_with_options(self, task: str, options: dict[str, Variant]) -> list[Any]:
        return [list(await self._scheduler.check(task, wire.options_of(options)))]

    async def _status(self) -> list[Any]:
        queued = await self._scheduler.queued(STATUS_QUEUED)
        status = {
            "version": Variant("s", lfsvc.__version__),
            "state": Variant("s", self._state),
            "running": Variant("aa{sv}", [wire.job_dictionary(job) for job in self._scheduler.running()]),
            "queued": Variant("aa{sv}", [wire.job_dictionary(job) for job in queued]),
            "queue_length": Variant("u", self._scheduler.queue_length),
            "started_at": Variant("t", self._started_at),
        }
        if self._llamafactory_cli:
            status["llamafactory_cli"] = Variant("s", clean(self._llamafactory_cli))
        return [status]

    async def _kill(self) -> list[Any]:
        return [(await self._scheduler.kill_running()).id]

    async def _kill_job(self, job_id: int) -> list[Any]:
        await self._scheduler.kill(job_id)
        return []

    async def _get_job(self, job_id: int) -> list[Any]:
        return [wire.job_dictionary(await self._scheduler.get(job_id))]

    async def _list_jobs(self, given: dict[str, Variant]) -> list[Any]:
        states, limit, before = wire.filter_of(given)
        jobs = await self._scheduler.newest(states=states, limit=limit, before=before)
        return [[wire.job_dictionary(job) for job in jobs]]

    # -- properties ------------------------------------------------------------------------------

    @property
    def _state(self) -> str:
        return "running" if self._scheduler.running() else "idle"

    def _properties(self) -> dict[str, Any]:
        return {
            "Version": lfsvc.__version__,
            "State": self._state,
            "RunningJobs": [job.id for job in self._scheduler.running()],
            "QueueLength": self._scheduler.queue_length,
        }

    def _answer_properties(self, message: Message) -> None:
        values = {name: Variant(PROPERTY_TYPES[name], value) for name, value in self._properties().items()}
        call = (message.member, message.signature)
        if call == ("Get", "ss") and message.body[1] in values:
            self._reply(message, "v", [values[message.body[1]]])
        elif call == ("GetAll", "s"):
            self._reply(message, "a{sv}", [values if message.body[0] in ("", INTERFACE) else {}])
        elif call == ("Get", "ss"):
            self._error(message, STANDARD_ERROR + "UnknownProperty", f"There is no property {message.body[1]}.")
        elif call == ("Set", "ssv"):
            self._error(message, STANDARD_ERROR + "PropertyReadOnly", "All properties are read-only.")
        else:
            self._error(message, STANDARD_ERROR + "InvalidArgs", "The properties are read with Get or GetAll.")

    # -- signals ---------------------------------------------------------------------------------

    def _signal(self, interface: str, member: str, signature: str, body: list[Any]) -> None:
        self._bus.send(Message.new_signal(PATH, interface, member, signature, clean(body)))

    def _job_signal(self, member: str, *values: Any) -> None:
        self._signal(INTERFACE, member, "".join(kind for _, kind in SIGNALS[member]), list(values))

    def queued(self, job: Job) -> None:
        self._job_signal("JobQueued", job.id, job.text)

    def started(self, job: Job) -> None:
        self._job_signal("JobStarted", job.id, job.text)

    def progressed(self, job: Job) -> None:
        self._job_signal("JobProgress", job.id, wire.progress_dictionary(job.progress))

    def finished(self, job: Job) -> None:
        status = job.exit_status if job.exit_status is not None else -1
        self._job_signal("JobFinished", job.id, job.state.value, status)

    def changed(self) -> None:
        now = self._properties()
        changed = {
            name: Variant(PROPERTY_TYPES[name], value) for name, value in now.items() if value != self._told.get(name)
        }
        if changed:
            self._told = now
            self._signal(PROPERTIES, "PropertiesChanged", "sa{sv}as", [INTERFACE, changed, []])


def introspection(methods: tuple[Method, ...]) -> str:
    """The introspection XML of the object; every argument has its name."""

    def arguments(rows: Arguments, direction: str) -> str:
        attribute = f' direction="{direction}"' if direction else ""
        return "".join(f"   <arg name={quoteattr(name)} type={quoteattr(kind)}{attribute}/>\n" for name, kind in rows)

    body = "".join(
        f'  <method name="{method.name}">\n'
        f"{arguments(method.arguments, 'in')}{arguments(method.results, 'out')}"
        "  </method>\n"
        for method in methods
    )
    body += "".join(f'  <signal name="{name}">\n{arguments(rows, "")}  </signal>\n' for name, rows in SIGNALS.items())
    body += "".join(
        f'  <property name="{name}" type="{kind}" access="read"/>\n' for name, kind in PROPERTY_TYPES.items()
    )
    return (
        '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
        ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
        f'<node>\n <interface name="{INTERFACE}">\n{body} </interface>\n'
        f"{_STANDARD_INTERFACES}</node>\n"
    )


_STANDARD_INTERFACES = """\
 <interface name="org.freedesktop.DBus.Properties">
  <method name="Get">
   <arg name="interface_name" type="s" direction="in"/>
   <arg name="property_name" type="s" direction="in"/>
   <arg name="value" type="v" direction="out"/>
  </method>
  <method name="GetAll">
   <arg name="interface_name" type="s" direction="in"/>
   <arg name="properties" type="a{sv}" direction="out"/>
  </method>
  <signal name="PropertiesChanged">
   <arg name="interface_name" type="s"/>
   <arg name="changed_properties" type="a{sv}"/>
   <arg name="invalidated_properties" type="as"/>
  </signal>
 </interface>
 <interface name="org.freedesktop.DBus.Introspectable">
  <method name="Introspect">
   <arg name="xml_data" type="s" direction="out"/>
  </method>
 </interface>
 <interface name="org.freedesktop.DBus.Peer">
  <method name="Ping"/>
 </interface>
"""


def _parent(path: str) -> str:
    """The introspection of a path above the object: the child on the way to it, so that trees can be walked."""
    base = path if path.endswith("/") else path + "/"
    child = PATH[len(base) :].split("/")[0] if PATH.startswith(base) else ""
    return f'<node>\n <node name="{child}"/>\n</node>\n' if child else "<node/>\n"


async def claim_name(bus: Bus) -> None:
    """Own org.lfsvc1.

    Raises:
        Internal: another process owns it; the message says which.
    """
    if await bus.own_name(NAME):
        return
    try:
        owner = f" (pid {await bus.owner_pid(NAME)})"
    except BusError:
        owner = ""
    raise Internal(f"A scheduler runs already on this bus{owner}.", "lfsvc status shows it, lfsvc stop ends it")
