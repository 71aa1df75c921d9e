"""Where the files are: the folders of the XDG base directories and the sockets of the runtime folder.

Cheap to import: the client needs it before anything else. Source: XDG Base Directory Specification.
"""

from __future__ import annotations

import os

from lfsvc.errors import NoService


def _base(variable: str, default: str) -> str:
    # The specification: a relative path in one of these variables is invalid and ignored.
    value = os.environ.get(variable, "")
    if value.startswith("/"):
        return value
    home = os.path.expanduser("~")
    if not home.startswith("/"):
        raise NoService("This user has no home folder.", "set HOME to an absolute path")
    return os.path.join(home, default)


def config_dir() -> str:
    """The folder of config.yaml and environment."""
    return os.path.join(_base("XDG_CONFIG_HOME", ".config"), "lfsvc")


def config_file() -> str:
    """The settings."""
    return os.path.join(config_dir(), "config.yaml")


def environment_file() -> str:
    """What the unit's jobs get as environment, in systemd's EnvironmentFile format."""
    return os.path.join(config_dir(), "environment")


def state_dir() -> str:
    """The default state folder; `state_dir` in config.yaml moves it."""
    return os.path.join(_base("XDG_STATE_HOME", ".local/state"), "lfsvc")


def data_home() -> str:
    """$XDG_DATA_HOME: the user's results, and where per-user D-Bus activation files are looked up."""
    return _base("XDG_DATA_HOME", ".local/share")


def results_root() -> str:
    """The default folder of evaluations; `results_root` in config.yaml moves it."""
    return os.path.join(data_home(), "lfsvc", "eval_results")


def user_unit_dir() -> str:
    """The folder of the user's own units, which wins over all others."""
    return os.path.join(_base("XDG_CONFIG_HOME", ".config"), "systemd", "user")


def runtime_dir() -> str:
    """The folder of the sockets: $XDG_RUNTIME_DIR/lfsvc, /run/user/<uid>/lfsvc, or a folder of the user in /tmp.

    Not made here: `files.make_private` makes it and refuses one that is somebody else's.
    """
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.getuid()}"):
        if base.startswith("/") and os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            return os.path.join(base, "lfsvc")
    return f"/tmp/lfsvc-{os.getuid()}"  # noqa: S108 - made 0700 and checked for its owner


def private_bus_address() -> str:
    """The address of the bus that `lfsvc serve` starts where no session bus is."""
    return "unix:path=" + os.path.join(runtime_dir(), "bus")


def session_bus_addresses() -> list[str]:
    """Where a session bus may be, in the order in which a client tries them.

    su, cron, tmux and ssh without a login session leave DBUS_SESSION_BUS_ADDRESS unset; then the
    user's bus of systemd is tried, and last the one that `lfsvc serve` may have started.
    """
    given = os.environ.get("DBUS_SESSION_BUS_ADDRESS", "")
    if given and not _is_of_another_user(given):
        return [given, private_bus_address()]
    found = []
    systemd_bus = f"/run/user/{os.getuid()}/bus"
    if os.path.exists(systemd_bus):
        found.append("unix:path=" + systemd_bus)
    return [*found, private_bus_address()]


def _is_of_another_user(address: str) -> bool:
    """Whether a socket belongs to somebody else: `su` without `-` keeps the address of whoever called it."""
    path = address.removeprefix("unix:path=").partition(",")[0]
    try:
        return path != address and os.stat(path).st_uid != os.getuid()
    except PermissionError:
        # In another user's folder, which cannot even be looked into.
        return True
    except OSError:
        return False


def has_user_manager() -> bool:
    """Whether this user's systemd runs. Its name on the bus may still be on the way: a call then waits for it."""
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return os.path.exists(os.path.join(base, "systemd", "private"))
