"""Calls to the service over D-Bus: blocking, with named errors, and a start of the service where none answers.

jeepney, not dbus-next: importing asyncio alone takes longer than a whole call with this.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any

from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageFlag, MessageType, new_method_call
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from lfsvc import errors, paths
from lfsvc.errors import LfsvcError, NoService

NAME = "org.lfsvc1"
PATH = "/org/lfsvc1"
INTERFACE = "org.lfsvc1.Scheduler"
UNIT = "lfsched.service"

SCHEDULER = DBusAddress(PATH, bus_name=NAME, interface=INTERFACE)
MANAGER = DBusAddress(
    "/org/freedesktop/systemd1",
    bus_name="org.freedesktop.systemd1",
    interface="org.freedesktop.systemd1.Manager",
)

CALL_SECONDS = 30.0
# As long as the unit's TimeoutStartSec allows, and a little more.
START_SECONDS = 100.0

# How long a waiting client tries to reach a bus again that went away under it.
BUS_RETURN_SECONDS = 60.0

_NOBODY = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    # Its owner went away before it answered.
    "org.freedesktop.DBus.Error.NoReply",
)


class RemoteError(Exception):
    """An error reply that is not one of ours. `name` is its D-Bus error name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name


def open_bus() -> DBusConnection:
    """Open a connection to the session bus.

    Raises:
        NoService: no bus can be reached.
    """
    first_problem = ""
    for address in paths.session_bus_addresses():
        try:
            return open_dbus_connection(address)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first_problem = first_problem or f"{address}: {getattr(error, 'strerror', None) or error}"
    raise NoService(
        f"No session bus can be reached ({first_problem}), so no scheduler can be.",
        "log in again, or start a scheduler without systemd: lfsvc serve --detach",
    )


class Client:
    """A connection to the bus on which the service is, or will be."""

    def __init__(self, connection: DBusConnection) -> None:
        self._connection = connection
        self._replies: dict[int, Message] = {}
        self.signals: deque[Message] = deque()

    @classmethod
    def connect(cls) -> Client:
        """Connect to the session bus.

        Raises:
            NoService: no bus can be reached.
        """
        return cls(open_bus())

    def fileno(self) -> int:
        """The descriptor to wait on for messages."""
        return int(self._connection.sock.fileno())

    def call(self, member: str, signature: str = "", *values: Any, start: bool = True) -> Any:
        """Call a method of the service; give its one result, or None.

        With `start`, a service that does not run is started.

        Raises:
            LfsvcError: the error that the service answered with.
            NoService: nobody answers, and the service cannot be started.
        """
        try:
            try:
                return self._ask(SCHEDULER, member, signature, values)
            except RemoteError as error:
                if error.name not in _NOBODY or not start:
                    raise
            self.start_service()
            return self._ask(SCHEDULER, member, signature, values)
        except RemoteError as error:
            if error.name in _NOBODY:
                raise NoService("The scheduler does not run.", "lfsvc start") from None
            raise _named(error, member) from None

    def submit(self, task: str, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Submit a task; give its id, and the status of the service just before it.

        Both questions are on the way at once: a round trip is a tenth of a whole `lfsvc submit`.

        Raises:
            LfsvcError, NoService: as `call`.
        """
        status = self._send(SCHEDULER, "Status", "", ())
        submitted = self._send(SCHEDULER, "SubmitWithOptions", "sa{sv}", (task, options))
        try:
            before: dict[str, Any] = self._value(status, CALL_SECONDS)
            job_id: int = self._value(submitted, CALL_SECONDS)
        except RemoteError as error:
            # An answer that did not come may still be a job that was queued: that is not tried again.
            if error.name not in _NOBODY[:2]:
                raise _named(error, "SubmitWithOptions") from None
        else:
            return job_id, before
        before = self.call("Status")
        return self.call("SubmitWithOptions", "sa{sv}", task, options), before

    def _ask(self, address: DBusAddress, member: str, signature: str, values: tuple[Any, ...]) -> Any:
        serial = self._send(address, member, signature, values)
        return self._value(serial, START_SECONDS if address is MANAGER else CALL_SECONDS)

    def _send(self, address: DBusAddress, member: str, signature: str, values: tuple[Any, ...]) -> int:
        message = new_method_call(address, member, signature or None, values)
        if address is SCHEDULER or not paths.has_user_manager():
            # Activation by the bus hangs for 25 s where the unit fails, and blocks new tries for 120 s.
            # A systemd that has just been started, though, is waited for by the bus.
            message.header.flags |= MessageFlag.no_auto_start
        return self._post(message)

    def _post(self, message: Message) -> int:
        serial: int = next(self._connection.outgoing_serial)
        try:
            self._connection.send(message, serial=serial)
        except OSError as error:
            raise _gone(error) from error
        return serial

    def _value(self, serial: int, seconds: float) -> Any:
        """The one result of a call; RemoteError where it was answered with an error."""
        reply = self._reply(serial, seconds)
        if reply.header.message_type is MessageType.error:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise RemoteError(reply.header.fields.get(HeaderFields.error_name, ""), text)
        if not reply.body:
            return None
        return plain(reply.header.fields[HeaderFields.signature], reply.body[0])

    def _exchange(self, message: Message, seconds: float) -> Message:
        return self._reply(self._post(message), seconds)

    def _reply(self, serial: int, seconds: float) -> Message:
        deadline = time.monotonic() + seconds
        try:
            while serial not in self._replies:
                self._keep(self._connection.receive(timeout=max(0.0, deadline - time.monotonic())))
        except TimeoutError:
            raise NoService(f"The scheduler did not answer within {seconds:g} s.", "lfsvc status tries again") from None
        except OSError as error:
            raise _gone(error) from error
        return self._replies.pop(serial)

    def _keep(self, message: Message) -> None:
        if message.header.message_type is MessageType.signal:
            self.signals.append(message)
        elif HeaderFields.reply_serial in message.header.fields:
            self._replies[message.header.fields[HeaderFields.reply_serial]] = message

    # -- signals ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """Receive the service's signals, and word of its coming and going, from now on."""
        rules = (
            MatchRule(type="signal", interface=INTERFACE, path=PATH),
            MatchRule(type="signal", sender="org.freedesktop.DBus", member="NameOwnerChanged"),
        )
        rules[1].add_arg_condition(0, NAME)
        for rule in rules:
            self._exchange(message_bus.AddMatch(rule), CALL_SECONDS)

    def has_signals(self) -> bool:
        """Whether signals have arrived. To be asked before waiting on `fileno()`.

        What came in one piece with a reply is in jeepney's buffer, of which the descriptor tells nothing.

        Raises:
            BusGone: the bus has closed the connection.
        """
        try:
            while True:
                self._keep(self._connection.receive(timeout=0))
        except TimeoutError:
            return bool(self.signals)
        except OSError as error:
            raise _gone(error) from error

    def take_signals(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Give the signals that have arrived, as (member, values), without waiting.

        Raises:
            BusGone: the bus has closed the connection.
        """
        self.has_signals()
        found = [(message.header.fields[HeaderFields.member], message.body) for message in self.signals]
        self.signals.clear()
        return found

    # -- the service's unit ----------------------------------------------------------------------

    def service_pid(self) -> int:
        """The PID of the service; 0 where none runs."""
        reply = self._exchange(message_bus.GetConnectionUnixProcessID(NAME), CALL_SECONDS)
        return 0 if reply.header.message_type is MessageType.error else int(reply.body[0])

    def start_service(self) -> None:
        """Start lfsched.service through systemd and wait until it is ready.

        Raises:
            NoService: it cannot be started; the message says why.
        """
        self._unit_job("StartUnit", "done")

    def stop_service(self) -> bool:
        """Stop lfsched.service through systemd; False where systemd does not run it."""
        try:
            state = self._unit_property("org.freedesktop.systemd1.Unit", "ActiveState")
        except RemoteError:
            return False
        if state not in ("active", "activating", "reloading"):
            return False
        self._unit_job("StopUnit", "done")
        return True

    def _unit_job(self, member: str, wanted: str) -> None:
        rule = MatchRule(
            type="signal", sender="org.freedesktop.systemd1", interface=MANAGER.interface, member="JobRemoved"
        )
        rule.add_arg_condition(2, UNIT)
        self._exchange(message_bus.AddMatch(rule), CALL_SECONDS)
        try:
            self._subscribe()
            job = self._ask(MANAGER, member, "ss", (UNIT, "replace"))
        except RemoteError as error:
            raise _cannot_start(error) from None
        result = self._job_result(job)
        if result != wanted:
            raise NoService(*self._why_failed(result))

    def _subscribe(self) -> None:
        """Ask systemd for its signals; the second time in a connection it says that this is done."""
        try:
            self._ask(MANAGER, "Subscribe", "", ())
        except RemoteError as error:
            if error.name != "org.freedesktop.systemd1.AlreadySubscribed":
                raise

    def _job_result(self, job: str) -> str:
        deadline = time.monotonic() + START_SECONDS
        while True:
            while self.signals:
                message = self.signals.popleft()
                if message.header.fields[HeaderFields.member] == "JobRemoved" and message.body[1] == job:
                    return str(message.body[3])
            try:
                self._keep(self._connection.receive(timeout=max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                raise NoService(f"{UNIT} did not come up.", f"systemctl --user status {UNIT}") from None
            except OSError as error:
                raise _gone(error) from error

    def _why_failed(self, result: str) -> tuple[str, str]:
        """What the unit says of its failure: the sentence that the service left as its status, else systemd's word."""
        try:
            text = str(self._unit_property("org.freedesktop.systemd1.Service", "StatusText"))
            kind = str(self._unit_property("org.freedesktop.systemd1.Service", "Result"))
        except RemoteError:
            text, kind = "", ""
        if text.startswith("Failed: "):
            sentence, _, hint = text.removeprefix("Failed: ").partition(" hint: ")
            return f"The scheduler does not start: {sentence}", hint
        return (
            f"The scheduler does not start: {UNIT} ended as {kind or result}.",
            f"journalctl --user -u {UNIT} -n 20",
        )

    def _unit_property(self, interface: str, name: str) -> Any:
        path = self._ask(MANAGER, "GetUnit", "s", (UNIT,))
        unit = DBusAddress(path, bus_name=MANAGER.bus_name, interface="org.freedesktop.DBus.Properties")
        return self._ask(unit, "Get", "ss", (interface, name))


def _named(error: RemoteError, member: str) -> LfsvcError:
    """An error reply as the error of ours that it is."""
    return errors.from_dbus(error.name, str(error)) or LfsvcError(f"{member}: {error} ({error.name})")


class BusGone(NoService):
    """The bus has closed the connection under a client that was waiting."""


def _gone(error: OSError) -> BusGone:
    return BusGone(f"The session bus is gone: {error}.", "log in again, or lfsvc start")


def _cannot_start(error: RemoteError) -> NoService:
    if error.name in _NOBODY or error.name.startswith("org.freedesktop.DBus.Error.Spawn."):
        return NoService(
            "No scheduler runs, and there is no systemd user manager to start one.",
            "start one: lfsvc serve --detach",
        )
    if error.name in ("org.freedesktop.systemd1.NoSuchUnit", "org.freedesktop.DBus.Error.FileNotFound"):
        return NoService(f"No scheduler runs, and {UNIT} is not installed.", "run `lfsvc setup` once")
    return NoService(f"{UNIT} cannot be started: {error}.", f"systemctl --user status {UNIT}")


def reconnect() -> Client:
    """Connect again after the bus went away, trying until it is back.

    Raises:
        NoService: it did not come back.
    """
    deadline = time.monotonic() + BUS_RETURN_SECONDS
    while True:
        try:
            return Client.connect()
        except NoService:
            # Nothing tells of a bus that is not there yet; its folder may not be either.
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def plain(signature: str, value: Any) -> Any:
    """Take the variants out of a value."""
    if signature == "a{sv}":
        return {key: plain(*item) for key, item in value.items()}
    if signature == "aa{sv}":
        return [plain("a{sv}", item) for item in value]
    if signature == "v":
        return plain(*value)
    if signature == "ay":
        return bytes(value)
    return value


def utf8(text: str) -> str:
    """A text of the command line, which came in the locale's encoding, as UTF-8: so it travels on the bus."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")
