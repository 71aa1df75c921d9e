"""The user's own systemd, bus and linger, also from su, sudo, cron and a shell without a login session."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from lfsvc.client.api import UNIT

if TYPE_CHECKING:
    from collections.abc import Mapping

# systemctl and loginctl wait for a systemd that may hang; a user's systemd that was just let start takes a moment.
COMMAND_SECONDS = 30.0
MANAGER_SECONDS = 20.0


def adopt_session() -> None:
    """Point this process to the user's own systemd and bus, which su, sudo and cron leave unset or another's."""
    os.environ.update(session_environment(os.environ, f"/run/user/{os.getuid()}"))


def session_environment(environment: Mapping[str, str], runtime: str) -> dict[str, str]:
    """What XDG_RUNTIME_DIR and DBUS_SESSION_BUS_ADDRESS are to be, as far as they are not right.

    `runtime` is the folder that logind makes for this user.
    """
    result: dict[str, str] = {}
    given = environment.get("XDG_RUNTIME_DIR", "")
    if not _own(given) and _own(runtime):
        result["XDG_RUNTIME_DIR"] = given = runtime
    address = environment.get("DBUS_SESSION_BUS_ADDRESS", "")
    path = address.removeprefix("unix:path=").partition(",")[0]
    foreign = path.startswith("/") and os.path.exists(os.path.dirname(path)) and not _own(path)
    bus = os.path.join(given, "bus")
    if (not address or foreign) and _own(bus):
        result["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={bus}"
    return result


def _own(path: str) -> bool:
    return os.path.exists(path) and os.stat(path).st_uid == os.getuid()


def user_name() -> str:
    """The name of this process's user; his number where he has none, as in some containers."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def has_linger() -> bool:
    """Whether this user's systemd goes on after the last logout."""
    return os.path.exists(f"/var/lib/systemd/linger/{user_name()}")


def enable_linger() -> bool:
    """Let the user's systemd go on after logout, where that may be had."""
    # With the name: without it loginctl means the owner of the session, and under cron or su there is none.
    done = run("loginctl", "--no-ask-password", "enable-linger", user_name())
    if done is not None and done.returncode == 0:
        return True
    command = f"sudo loginctl enable-linger {user_name()}"
    warn((f"jobs end when you log out; to change that, an administrator runs:\n  {command}",))
    return False


def unit_properties() -> dict[str, str]:
    """What systemd knows of lfsched.service; {} where it cannot be asked."""
    names = "LoadState,ActiveState,UnitFileState,MainPID,Result,StatusText"
    done = run("systemctl", "--user", "show", UNIT, f"--property={names}")
    if done is None or done.returncode != 0:
        return {}
    return {name: value for name, found, value in (line.partition("=") for line in done.stdout.splitlines()) if found}


def systemctl(*arguments: str, quiet: bool = False) -> bool:
    done = run("systemctl", "--user", *arguments)
    if done is not None and done.returncode == 0:
        return True
    if not quiet:
        warn((f"systemctl --user {' '.join(arguments)}: {done.stderr.strip() if done else 'no answer'}",))
    return False


def run(*argv: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command of systemd's; None where it cannot be run or hangs."""
    try:
        return subprocess.run(
            argv,
            env={**os.environ, **session_environment(os.environ, f"/run/user/{os.getuid()}")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def warn(sentences: tuple[str, ...]) -> None:
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr)
