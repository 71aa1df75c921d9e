"""`lfsvc setup`: the unit, the activation file and the jobs' environment, for this user."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from lfsvc import environment_file, paths
from lfsvc.client.api import UNIT, Client
from lfsvc.errors import LfsvcError
from lfsvc.files import replace_file
from lfsvc.llamafactory.cli import PROGRAM, find_program

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

ACTIVATION = "org.lfsvc1.service"

# What belongs to a login, a terminal or a desktop session, not to the toolkits that jobs need. A name
# that ends in _ stands for all that begin with it.
SESSION_VARIABLES = (
    "ALACRITTY_", "BASHOPTS", "BASH_", "BYOBU_", "COLORFGBG", "COLORTERM", "COLUMNS", "DBUS_SESSION_BUS_ADDRESS",
    "DBUS_STARTER_", "DEBUGINFOD_URLS", "DESKTOP_SESSION", "DISPLAY", "EDITOR", "GDMSESSION", "GNOME_",
    "GPG_AGENT_INFO", "GTK_", "HISTCONTROL", "HISTFILE", "HISTSIZE", "HOME", "HOSTNAME", "HUSHLOGIN",
    "ICEAUTHORITY", "IM_CONFIG_PHASE", "INVOCATION_ID", "ITERM_", "JOURNAL_STREAM", "KDE_", "KITTY_", "KONSOLE_",
    "LC_TERMINAL", "LC_TERMINAL_VERSION", "LESS", "LESSCLOSE", "LESSOPEN", "LINES", "LISTEN_", "LOGNAME",
    "LSCOLORS", "LS_COLORS", "MAIL", "MANAGERPID", "MANPATH_", "MOTD_SHOWN", "NOTIFY_SOCKET", "OLDPWD", "PAGER",
    "PROMPT", "PROMPT_COMMAND", "PS1", "PS2", "PS3", "PS4", "PWD", "QT_", "SESSION_MANAGER", "SHELL", "SHELLOPTS",
    "SHLVL", "SSH_", "STY", "SUDO_", "SYSTEMD_", "TERM", "TERMCAP", "TERM_PROGRAM", "TERM_PROGRAM_VERSION", "TMUX",
    "TMUX_", "USER", "USERNAME", "VISUAL", "VSCODE_", "VTE_", "WATCHDOG_", "WAYLAND_", "WEZTERM_", "WINDOW",
    "WINDOWID", "XAUTHORITY", "XDG_", "XMODIFIERS", "ZDOTDIR", "_",
)  # fmt: skip

HEADER = """\
The environment of the jobs of lfsched.service: what was exported where `lfsvc setup` ran.
Edit it as you like; it is read at every start of a job. `lfsvc setup` writes it anew and
keeps the version before as environment.old. Format: systemd.exec(5), EnvironmentFile=."""


def setup_command(arguments: Namespace) -> int:
    """Install the service for this user, or update it; with --remove take it away."""
    if arguments.remove:
        return _remove()
    exported = job_variables(os.environ)
    unit = os.path.join(paths.user_unit_dir(), UNIT)
    try:
        _write(unit, unit_text().encode(), 0o644)
        _write(_activation_path(), packaged(ACTIVATION).encode(), 0o644)
        _write_environment(exported)
    except OSError as error:
        raise LfsvcError(f"{error.filename} cannot be written: {error.strerror}.", "mend its permissions") from error
    print(f"wrote {unit}")
    print(f"wrote {_activation_path()}")
    print(f"wrote {paths.environment_file()}: {len(exported)} variables of this shell, for the jobs")
    program = find_program(PROGRAM, exported.get("PATH", ""))
    if program:
        print(f"jobs will run {program}")
    else:
        print(
            f"warning: {PROGRAM} is not on this shell's PATH; activate the environment that has it and run this again",
            file=sys.stderr,
        )
    if not arguments.no_linger:
        _enable_linger()
    if arguments.no_start:
        print("next: systemctl --user daemon-reload && systemctl --user enable --now lfsched")
        return 0
    return _start()


def _start() -> int:
    if not _systemctl("daemon-reload", quiet=True):
        print("There is no systemd user manager here, so nothing was started.", file=sys.stderr)
        print("hint: start `lfsvc serve` in a terminal (tmux, screen or nohup keep it)", file=sys.stderr)
        return 1
    _systemctl("enable", UNIT)
    _systemctl("reset-failed", UNIT, quiet=True)
    client = Client.connect()
    # An upgrade: the jobs of the old service go on under the new one.
    client.stop_service()
    client.start_service()
    version = client.call("Status")["version"]
    print(f"lfsched.service runs (lfsvc {version}), now and at every login")
    print("next: lfsvc submit train:/path/to/config.yaml@0,1")
    return 0


def _remove() -> int:
    _systemctl("disable", "--now", UNIT, quiet=True)
    for path in (os.path.join(paths.user_unit_dir(), UNIT), _activation_path()):
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        print(f"removed {path}")
    _systemctl("daemon-reload", quiet=True)
    print(f"kept the queue and the jobs' files in {paths.state_dir()}, the settings in {paths.config_dir()}")
    return 0


def packaged(name: str) -> str:
    """The text of a file of packaging/systemd: in the package where it was installed, beside it in a checkout."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for folder in (os.path.join(package, "systemd"), os.path.join(os.path.dirname(package), "packaging", "systemd")):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return file.read()
    raise LfsvcError(f"{name} is missing from this installation of lfsvc.", "install lfsvc again")


def unit_text() -> str:
    """The unit, with this interpreter in ExecStart."""
    import site

    user_site = os.path.abspath(__file__).startswith(str(site.getusersitepackages()) + os.sep)
    # -I: neither the manager's PYTHONPATH nor the working directory may reach the service's interpreter.
    # It hides a `pip install --user`, too; then -E is as much as can be had.
    flags = ["-E"] if user_site else ["-I"]
    command = " ".join(quoted(word) for word in [sys.executable, *flags, "-X", "utf8", "-m", "lfsvc", "serve"])
    lines = packaged(UNIT).splitlines()
    return "\n".join(f"ExecStart={command}" if line.startswith("ExecStart=") else line for line in lines) + "\n"


def quoted(word: str) -> str:
    """A word of a command line in a unit file.

    Source: systemd.service(5), COMMAND LINES; systemd.unit(5), specifiers.
    """
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or not word.isascii() or any(c in " ';" for c in word) else word


def job_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment the jobs are to have: all but the session's own.

    Names that a shell cannot assign (functions that bash exports) are left out as well: systemd's
    format cannot hold them.
    """
    prefixes = tuple(name for name in SESSION_VARIABLES if name.endswith("_") and name != "_")
    return {
        name: value
        for name, value in environment.items()
        if environment_file.valid_name(name) and name not in SESSION_VARIABLES and not name.startswith(prefixes)
    }


def _activation_path() -> str:
    return os.path.join(paths.data_home(), "dbus-1", "services", ACTIVATION)


def _write(path: str, data: bytes, mode: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    replace_file(path, data, mode=mode, durable=True)


def _write_environment(variables: Mapping[str, str]) -> None:
    path = paths.environment_file()
    data = environment_file.render(variables, HEADER)
    try:
        with open(path, "rb") as file:
            before = file.read()
    except FileNotFoundError:
        before = data
    if before != data:
        # It may hold lines of the user's own.
        _write(path + ".old", before, 0o600)
    _write(path, data, 0o600)


def _systemctl(*arguments: str, quiet: bool = False) -> bool:
    try:
        done = subprocess.run(
            ["systemctl", "--user", *arguments],
            env={**os.environ, "XDG_RUNTIME_DIR": os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"},
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return False
    if done.returncode != 0 and not quiet:
        print(f"warning: systemctl --user {' '.join(arguments)}: {done.stderr.strip()}", file=sys.stderr)
    return done.returncode == 0


def _enable_linger() -> None:
    """Let the user's systemd go on after logout, where that is not so yet and may be had."""
    import pwd

    user = pwd.getpwuid(os.getuid()).pw_name
    if os.path.exists(f"/var/lib/systemd/linger/{user}"):
        return
    try:
        done = subprocess.run(
            ["loginctl", "--no-ask-password", "enable-linger"], capture_output=True, text=True, check=False
        )
    except OSError:
        return
    if done.returncode == 0:
        print("enabled linger: jobs go on after you log out")
    else:
        print("warning: jobs end when you log out; to change that, an administrator runs:", file=sys.stderr)
        print(f"  sudo loginctl enable-linger {user}", file=sys.stderr)
