"""`lfsvc notify test`: one message to every target of `notify:`, from this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfsvc import config as settings
from lfsvc import paths
from lfsvc.errors import LfsvcError, NoService, WrongUse

if TYPE_CHECKING:
    from argparse import Namespace

    from lfsvc.notify import Message, Target

EXAMPLE = """\
    notify:
      - desktop: true
      - webhook: https://ntfy.sh/a-topic-that-nobody-guesses
        preset: ntfy
        on: [failed, queue_empty]"""


def notify_command(arguments: Namespace) -> int:
    """Send the test message; 1 where a target did not take it."""
    targets = settings.load().notify
    if not targets:
        raise LfsvcError(f"{paths.config_file()} has no `notify:`.", f"for instance:\n{EXAMPLE}")
    if arguments.target is not None:
        if arguments.target > len(targets):
            entries = "1 entry" if len(targets) == 1 else f"{len(targets)} entries"
            raise WrongUse(f"There is no entry {arguments.target} of notify.", f"{paths.config_file()} has {entries}")
        targets = targets[arguments.target - 1 : arguments.target]
    failed = False
    for target in targets:
        problem = _send(target)
        failed = failed or bool(problem)
        line = f"{'✗' if problem else '✓'} {target.number} {target.label}"
        print(f"{line}: {problem}" if problem else line, flush=True)
    return 1 if failed else 0


def _send(target: Target) -> str:
    """Send the test message to a target; give what went wrong, or ""."""
    import os
    import socket

    from lfsvc import delivery, notify

    message = notify.test_message(target, socket.gethostname())
    if target.kind == "desktop":
        return _show(message)
    if target.kind == "command":
        return delivery.Command(delivery.Children()).run(target, message, os.environ).problem
    return delivery.post(target, message, os.environ).problem


def _show(message: Message) -> str:
    """Show a message on the desktop; give what went wrong, or "".

    The daemon is asked by its unique name, which the bus activates nobody for.
    """
    from jeepney import DBusAddress, DBusErrorResponse, new_method_call
    from jeepney.bus_messages import message_bus
    from jeepney.wrappers import unwrap_msg

    from lfsvc.client.api import open_bus
    from lfsvc.delivery import DESKTOP_SECONDS, NO_DAEMON, NOTIFICATIONS, NOTIFICATIONS_PATH, desktop_arguments

    try:
        connection = open_bus()
    except NoService:
        return "no session bus can be reached"
    with connection:
        try:
            reply = connection.send_and_get_reply(message_bus.GetNameOwner(NOTIFICATIONS), timeout=DESKTOP_SECONDS)
            (owner,) = unwrap_msg(reply)
            daemon = DBusAddress(NOTIFICATIONS_PATH, bus_name=owner, interface=NOTIFICATIONS)
            asked = new_method_call(daemon, "GetCapabilities")
            (capabilities,) = unwrap_msg(connection.send_and_get_reply(asked, timeout=DESKTOP_SECONDS))
            *texts, urgency = desktop_arguments(message, markup="body-markup" in capabilities)
            values = (*texts, [], {"urgency": ("y", urgency)}, -1)
            told = new_method_call(daemon, "Notify", "susssasa{sv}i", values)
            unwrap_msg(connection.send_and_get_reply(told, timeout=DESKTOP_SECONDS))
        except DBusErrorResponse as error:
            return NO_DAEMON if error.name == "org.freedesktop.DBus.Error.NameHasNoOwner" else str(error)
        except TimeoutError:
            return f"the notification daemon did not answer within {DESKTOP_SECONDS:g} s"
        except OSError as error:
            return f"the session bus is gone: {error.strerror or error}"
    return ""
