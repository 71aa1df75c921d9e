"""`lfsvc setup`: the unit, the activation file and the jobs' environment, for this user.

What is to be written is planned first and written then, so that --dry-run is the plan alone.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfsvc import environment_file, paths
from lfsvc.client.api import UNIT, Client
from lfsvc.client.session import (
    MANAGER_SECONDS,
    adopt_session,
    enable_linger,
    has_linger,
    systemctl,
    unit_properties,
    user_name,
    warn,
)
from lfsvc.errors import LfsvcError
from lfsvc.files import replace_file
from lfsvc.llamafactory import installation
from lfsvc.llamafactory.cli import PROGRAM, find_program
from lfsvc.llamafactory.environment import job_environment

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

ACTIVATION = "org.lfsvc1.service"
# Beside the jobs' environment: what setup wrote there last.
WRITTEN = ".setup"
PACKAGED_UNIT = f"/usr/lib/systemd/user/{UNIT}"

NEXT = "lfsvc submit train:/path/to/config.yaml@0,1"

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
Edit it as you like; it is read at every start of a job. `lfsvc setup` writes it anew, keeps
what you have set, and the version before as environment.old. Format: systemd.exec(5), EnvironmentFile=."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What setup is going to write."""

    variables: Mapping[str, str] | None  # the jobs' environment; None: the present file stays
    program: str  # the llamafactory-cli that jobs are going to run, or ""
    notes: tuple[str, ...] = ()  # what a user would not expect


def plan(environment: Mapping[str, str], present: Mapping[str, str] | None, beside: str) -> Plan:
    """Decide what to write: `environment` is the shell's, `present` that of the jobs so far.

    `beside` is the folder of this interpreter, where a llamafactory-cli may lie that is not on PATH.
    """
    exported = job_variables(environment)
    path = exported.get("PATH", "")
    program = find_program(PROGRAM, path)
    if program:
        return Plan(variables=exported, program=program)
    before = find_program(PROGRAM, (present or {}).get("PATH", ""))
    program = find_program(PROGRAM, beside)
    if before and program in ("", before):
        # An upgrade from a shell without it must not take it away from the jobs.
        kept = f"this shell has no {PROGRAM}, so the environment of the jobs stays as it is"
        return Plan(variables=None, program=before, notes=(kept,))
    if program:
        exported["PATH"] = os.pathsep.join(part for part in (beside, path) if part)
        added = f"{beside} is not on this shell's PATH; it is on that of the jobs, for {PROGRAM} lies there"
        return Plan(variables=exported, program=program, notes=(added,))
    missing = f"{PROGRAM} is not on this shell's PATH; activate the environment that has it and run this again"
    return Plan(variables=exported, program="", notes=(missing,))


def setup_command(arguments: Namespace) -> int:
    """Install the service for this user, or update it; with --remove take it away."""
    adopt_session()
    if arguments.remove:
        return _remove(dry_run=arguments.dry_run)
    booted = os.path.isdir("/run/systemd/system")  # Source: sd_booted(3)
    if not booted and not arguments.no_start:
        raise LfsvcError(
            "systemd does not run this machine, so there is nothing to set up.",
            "start a scheduler without it: lfsvc serve --detach",
        )
    todo = plan(os.environ, _present_variables(), os.path.dirname(sys.executable))
    if arguments.dry_run:
        return _say_plan(todo, linger=not arguments.no_linger, start=not arguments.no_start)
    _say_written(todo, write(todo))
    # Asked for again where it is set and no systemd runs: logind then starts one.
    lingers = has_linger() and paths.has_user_manager()
    lingers = lingers or (booted and not arguments.no_linger and enable_linger()) or has_linger()
    if todo.program:
        found = installation.find(todo.program, {})
        version = f" ({found.name})" if found and found.version else ""
        print(f"jobs run {todo.program}{version}{', and go on after you log out' if lingers else ''}")
    if arguments.no_start:
        print(f"next: systemctl --user daemon-reload && systemctl --user enable --now {UNIT.removesuffix('.service')}")
        return 0
    return _start()


def write(todo: Plan) -> list[str]:
    """Write what was planned; give the names of the user's own edits of the jobs' environment, which are kept.

    Raises:
        LfsvcError: a file cannot be written; the message names it.
    """
    for path, text in own_files().items():
        _write(path, text.encode(), 0o644)
    return [] if todo.variables is None else _write_environment(todo.variables)


def own_files() -> dict[str, str]:
    """The unit and the activation file that this user needs, by path: none where a package brought them."""
    unit = os.path.join(paths.user_unit_dir(), UNIT)
    # One that an installation with pip left in the home would win over the package's.
    of_package = os.path.abspath(__file__).startswith("/usr/lib/python3/") and os.path.exists(PACKAGED_UNIT)
    if of_package and not os.path.lexists(unit):
        return {}
    return {unit: unit_text(), activation_path(): packaged(ACTIVATION)}


def _say_plan(todo: Plan, *, linger: bool, start: bool) -> int:
    for path, text in own_files().items():
        print(f"would write {path}:\n" + "".join(f"  {line}\n" for line in text.splitlines()), end="")
    if todo.variables is not None:
        # Names alone: a value may be a password.
        names = " ".join(sorted(todo.variables))
        print(f"would write {paths.environment_file()}, {len(todo.variables)} variables of this shell:\n  {names}")
    if linger and not has_linger():
        print("would enable linger, so that jobs go on after you log out")
    if start:
        print(f"would {'restart' if unit_properties().get('ActiveState') == 'active' else 'start'} {UNIT}")
    warn(todo.notes)
    return 0


def _say_written(todo: Plan, kept: list[str]) -> None:
    files = own_files()
    print(f"wrote {' and '.join(files)}" if files else f"the unit is the package's: {PACKAGED_UNIT}")
    if todo.variables is not None:
        print(f"wrote {paths.environment_file()}: {len(todo.variables)} variables of this shell, for the jobs")
    if kept:
        print(f"kept your own: {' '.join(kept)}")
    warn(todo.notes)
    if os.getuid() == 0 and os.environ.get("SUDO_USER"):
        warn((f"this was for root; for yourself, run it as {os.environ['SUDO_USER']}, without sudo",))


def _start() -> int:
    deadline = time.monotonic() + MANAGER_SECONDS
    while not systemctl("daemon-reload", quiet=True):
        if not has_linger() or time.monotonic() > deadline:
            user = user_name()
            raise LfsvcError(
                f"No systemd runs for {user}, so nothing was started.",
                f"log in as {user} (ssh, not su) and run this again, or sudo loginctl enable-linger {user}",
            )
        # With linger logind starts it; nothing tells this process when it is up, nor that its folder is there.
        time.sleep(0.1)
        adopt_session()
    # One that has just come up has no bus yet; this waits for it.
    systemctl("start", "dbus.socket", quiet=True)
    adopt_session()
    if unit_properties().get("LoadState") == "not-found":
        raise LfsvcError(
            f"Your systemd does not look for units in {paths.user_unit_dir()}: it has another XDG_CONFIG_HOME.",
            "unset XDG_CONFIG_HOME and run this again",
        )
    systemctl("enable", UNIT)
    systemctl("reset-failed", UNIT, quiet=True)
    client = Client.connect()
    before: dict[str, Any] = {}
    try:
        before = client.call("Status", start=False)
    except LfsvcError:
        # None runs, or it hangs; then it is stopped all the same.
        pass
    # An upgrade: the jobs of the old service go on under the new one.
    client.stop_service()
    client.start_service()
    status = client.call("Status")
    was = before.get("version", status["version"])
    running = "".join(f"; job {job['id']} goes on" for job in before.get("running", ()))
    version = status["version"] + (f", before {was}" if was != status["version"] else "")
    print(f"{UNIT} runs (lfsvc {version}), now and at every login{running}")
    print("next: " + (NEXT if find_program("lfsvc", os.environ.get("PATH", "")) else _by_path(NEXT)))
    return 0


def _by_path(command: str) -> str:
    """A command for a shell on whose PATH lfsvc is not."""
    folder = os.path.dirname(sys.executable)
    return os.path.join(folder, command) if find_program("lfsvc", folder) else f"{sys.executable} -m {command}"


def _remove(*, dry_run: bool) -> int:
    unit = os.path.join(paths.user_unit_dir(), UNIT)
    # systemctl disable takes the link away, where there is a systemd to ask.
    link = os.path.join(paths.user_unit_dir(), "default.target.wants", UNIT)
    present = [path for path in (unit, link, activation_path()) if os.path.lexists(path)]
    if dry_run:
        print("".join(f"would remove {path}\n" for path in present), end="")
        return 0
    living = _living()
    systemctl("disable", "--now", UNIT, quiet=True)
    for path in present:
        try:
            if os.path.lexists(path):
                os.unlink(path)
        except OSError as error:
            raise LfsvcError(f"{path} cannot be removed: {error.strerror}.", "mend its permissions") from error
        print(f"removed {path}")
    systemctl("daemon-reload", quiet=True)
    if living:
        warn((f"{living}; to end what runs, lfsvc setup and lfsvc kill",))
    print(f"kept the queue and the jobs' files in {paths.state_dir()}, the settings in {paths.config_dir()}")
    return 0


def _living() -> str:
    """What runs and waits, in words; "" where nothing does, or nobody can say."""
    try:
        status = Client.connect().call("Status", start=False)
    except LfsvcError:
        return ""
    running = [f"job {job['id']} goes on" for job in status["running"]]
    waiting = [f"{status['queue_length']} wait"] if status["queue_length"] else []
    return ", ".join(running + waiting)


def activation_in_place() -> bool:
    """Whether the bus is told how to start the service: by the user's file, or by that of a package."""
    shared = [os.path.join(f"/usr{local}/share/dbus-1/services", ACTIVATION) for local in ("", "/local")]
    return any(map(os.path.exists, [activation_path(), *shared]))


def environment_of_jobs(pid: int, *, unit: bool) -> dict[str, str]:
    """The environment of a job without options, as the service with this PID would make it.

    With `unit` it is, or would be, lfsched.service. Without a PID that can be looked at, what this shell has
    counts for a service that would be started in it.
    """
    service: Mapping[str, str] = {} if unit else os.environ
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = [item.partition("=") for item in os.fsdecode(file.read()).split("\0")]
            service = {name: value for name, _, value in pairs if name}
    except OSError:
        pass
    variables = (_present_variables() or {}) if unit else {}
    return job_environment(service=service, file=variables, devices=(), own={}, work_folder="")


def _present_variables() -> dict[str, str] | None:
    try:
        with open(paths.environment_file(), "rb") as file:
            return environment_file.parse(file.read())
    except OSError:
        return None


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


def activation_path() -> str:
    """Where the bus looks for the user's own activation file."""
    return os.path.join(paths.data_home(), "dbus-1", "services", ACTIVATION)


def _write(path: str, data: bytes, mode: int) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(path, data, mode=mode, durable=True)
    except OSError as error:
        raise LfsvcError(
            f"{path} cannot be written: {error.strerror}.", "mend the permissions of its folder"
        ) from error


def _write_environment(variables: Mapping[str, str]) -> list[str]:
    """Write the jobs' environment; give the names of the user's own edits, which are kept."""
    path = paths.environment_file()
    data = environment_file.render(variables, HEADER)
    try:
        with open(path, "rb") as file:
            before = file.read()
    except FileNotFoundError:
        before = data
    except OSError as error:
        raise LfsvcError(f"{path} cannot be read: {error.strerror}.", "mend its permissions") from error
    kept = _edits(before)
    data = environment_file.render({**variables, **kept}, HEADER) if kept else data
    if before != data:
        # It may hold comments of the user's own.
        _write(path + ".old", before, 0o600)
    _write(path, data, 0o600)
    # What is another in `path` than here is an edit, which the next setup keeps.
    _write(path + WRITTEN, environment_file.render(variables, HEADER), 0o600)
    return sorted(kept)


def _edits(present: bytes) -> dict[str, str]:
    """What the user has put into the jobs' environment since setup wrote it."""
    try:
        with open(paths.environment_file() + WRITTEN, "rb") as file:
            written = environment_file.parse(file.read())
    except OSError:
        return {}
    return {name: value for name, value in environment_file.parse(present).items() if written.get(name) != value}
