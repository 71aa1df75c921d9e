"""A connection to the session bus: calls with a time limit, signals, and texts that no bus refuses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageType, NameFlag, RequestNameReply
from dbus_next.errors import AuthError
from dbus_next.message import Message
from dbus_next.signature import Variant

CALL_SECONDS = 25.0

BUS = "org.freedesktop.DBus"


class BusError(Exception):
    """A call that was answered with an error, or not in time. `name` is the D-Bus error name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{message} ({name})" if message else name)
        self.name = name


class _PatientSocket:
    """The socket that dbus-next writes to; where it has no room, nothing was written and it asks again.

    Works around dbus-next 0.2.3, whose writer takes EAGAIN for the end of the connection: with some
    200 KB waiting in the socket (a burst of signals) the service would be off the bus.
    """

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner

    def send(self, data: memoryview) -> int:
        try:
            return self._inner.send(data)
        except (BlockingIOError, InterruptedError):
            return 0


class Bus:
    """One connection. Made by `connect`."""

    def __init__(self, connection: MessageBus) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, address: str) -> Bus:
        """Connect to the bus at an address.

        Raises:
            OSError: nothing listens there, or it takes nobody in.
        """
        try:
            connection = await MessageBus(bus_address=address).connect()
        except (AuthError, ValueError, EOFError) as error:
            raise ConnectionError(f"{address}: {error}") from error
        writer: Any = connection._writer
        writer.sock = _PatientSocket(writer.sock)
        return cls(connection)

    async def wait_for_disconnect(self) -> None:
        """Return, or raise, when the connection is gone."""
        connection: Any = self._connection
        await connection.wait_for_disconnect()

    def disconnect(self) -> None:
        """End the connection."""
        connection: Any = self._connection
        connection.disconnect()

    def add_handler(self, handler: Callable[[Message], bool]) -> None:
        """Call `handler` for every message; True from it means that it has seen to it."""
        self._connection.add_message_handler(handler)

    def send(self, message: Message) -> None:
        """Send a message without waiting."""
        self._connection.send(message)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: list[Any] | None = None,
        *,
        timeout: float = CALL_SECONDS,
    ) -> list[Any]:
        """Call a method; give the values of its reply.

        Raises:
            BusError: it failed, or nobody answered within `timeout` seconds.
        """
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body or [],
        )
        try:
            reply = await asyncio.wait_for(self._connection.call(message), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise BusError("org.freedesktop.DBus.Error.NoReply", f"{member} was not answered in time") from None
        except (EOFError, OSError) as error:
            raise BusError("org.freedesktop.DBus.Error.Disconnected", str(error)) from error
        if reply is None:
            raise BusError("org.freedesktop.DBus.Error.Disconnected", "the connection is closed")
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise BusError(reply.error_name or "", text)
        return list(reply.body)

    async def get_property(self, destination: str, path: str, interface: str, name: str) -> Any:
        """Read a property; BusError where that fails."""
        properties = "org.freedesktop.DBus.Properties"
        (variant,) = await self.call(destination, path, properties, "Get", "ss", [interface, name])
        return variant.value

    async def add_match(self, rule: str) -> None:
        """Have signals that match a rule sent to this connection."""
        await self.call(BUS, "/org/freedesktop/DBus", BUS, "AddMatch", "s", [rule])

    async def remove_match(self, rule: str) -> None:
        """Undo `add_match`; harmless where there is none."""
        try:
            await self.call(BUS, "/org/freedesktop/DBus", BUS, "RemoveMatch", "s", [rule])
        except BusError:
            pass

    async def has_owner(self, name: str) -> bool:
        """Whether somebody owns a name now; nobody is started for it."""
        (answer,) = await self.call(BUS, "/org/freedesktop/DBus", BUS, "NameHasOwner", "s", [name])
        return bool(answer)

    async def own_name(self, name: str) -> bool:
        """Own a well-known name; False where another connection has it."""
        reply = await self._connection.request_name(name, NameFlag.DO_NOT_QUEUE)
        return reply in (RequestNameReply.PRIMARY_OWNER, RequestNameReply.ALREADY_OWNER)

    async def owner_pid(self, name: str) -> int:
        """The PID of the process that owns a name; BusError where nobody does."""
        (pid,) = await self.call(BUS, "/org/freedesktop/DBus", BUS, "GetConnectionUnixProcessID", "s", [name])
        return int(pid)


def clean(value: Any) -> Any:
    """Make a value fit to travel: the bus drops a connection that sends NUL, and lone surrogates do not encode."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
    if isinstance(value, Variant):
        return Variant(value.signature, clean(value.value))
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
