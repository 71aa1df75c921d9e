"""`lfsvc doctor`: what of this machine, this user and this installation keeps jobs from running, and the fix.

Facts are gathered first, each within a time limit; the checks are functions from them to an answer. It
changes nothing and starts no service.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import lfsvc
from lfsvc import config as settings
from lfsvc import paths
from lfsvc.client import accelerators, session, setup
from lfsvc.client.accelerators import within
from lfsvc.client.api import UNIT, Client
from lfsvc.client.output import has_colour, print_json
from lfsvc.errors import LfsvcError
from lfsvc.llamafactory import installation
from lfsvc.llamafactory.cli import PROGRAM, find_program
from lfsvc.llamafactory.environment import is_enabled

if TYPE_CHECKING:
    from argparse import Namespace

# For a bus, a service or a file server that hangs. The tools of accelerators have a limit of their own.
FACT_SECONDS = 8.0

LITTLE_BYTES = 2 * 1024**3
TOO_LITTLE_BYTES = 64 * 1024**2

JOURNAL_FOLDER = "/var/log/journal"


@dataclass(frozen=True)
class Check:
    """A check's answer: ok, warn, bad or skip (it has no meaning here), what is true, and what to do about it."""

    state: str
    text: str
    fix: str = ""


ok, warn, bad, skip = (partial(Check, state) for state in ("ok", "warn", "bad", "skip"))

# A folder: its path, whether it can be written (or made), the free bytes of its file system.
Folder = tuple[str, bool, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the checks look at. A problem is a text and a hint; ("", "") where there is none."""

    user: str = "me"
    uid: int = 1000
    booted: bool = True  # systemd runs this machine
    manager: bool = True  # this user's systemd runs
    linger: bool = True
    bus_problem: tuple[str, str] = ("", "")
    dbus_daemon: bool = True  # it is installed
    journals: tuple[str, ...] | None = ()  # persistent files that may be read; None: there is no folder for them
    unit: Mapping[str, str] = field(default_factory=dict)  # properties of lfsched.service; {} without a manager
    activation: bool = True
    pid: int = 0  # of the service, 0 where none runs
    status: Mapping[str, Any] | None = None
    status_problem: str = ""
    config_problem: tuple[str, str] = ("", "")
    environment: Mapping[str, str] = field(default_factory=dict)  # of a job
    program: str = ""  # the jobs' llamafactory-cli
    program_version: str = ""
    program_here: str = ""  # this shell's
    state_folder: Folder | None = None
    results_folder: Folder | None = None
    found: tuple[accelerators.Found, ...] = ()
    closed: tuple[accelerators.DeviceFile, ...] | None = ()  # None: there is no process to ask about
    own_groups: frozenset[int] = frozenset()  # by /etc/group, which a process that began earlier may not have

    @property
    def under_systemd(self) -> bool:
        """Whether the service is, or would be, a unit of this user's systemd."""
        return _is_unit(self.booted, self.pid, self.unit)

    @property
    def without_systemd(self) -> Check | None:
        """The answer of checks that are about systemd, where it has no part in the jobs."""
        if not self.booted:
            return skip("no systemd here; jobs are processes of `lfsvc serve`")
        return None if self.under_systemd else skip(f"the scheduler was started by hand (pid {self.pid})")


def _is_unit(booted: bool, pid: int, unit: Mapping[str, str]) -> bool:
    return booted and (not pid or unit.get("MainPID") == str(pid))


# -- the checks --------------------------------------------------------------------------------------


def _manager(facts: Facts) -> Check:
    fix = f"log in as {facts.user} (ssh, not su), or sudo loginctl enable-linger {facts.user}"
    if facts.without_systemd:
        return facts.without_systemd
    return ok(f"runs for {facts.user}") if facts.manager else bad(f"none runs for {facts.user}", fix)


def _bus(facts: Facts) -> Check:
    if not facts.bus_problem[0]:
        return ok("answers")
    if facts.booted:
        return bad(*facts.bus_problem)
    if facts.dbus_daemon:
        return skip("none yet; `lfsvc serve` starts one")
    return bad("there is none, and no dbus-daemon to start one", "install the package dbus")


def _linger(facts: Facts) -> Check:
    if facts.without_systemd:
        return facts.without_systemd
    if facts.linger:
        return ok(f"jobs go on after {facts.user} logs out")
    command = f"loginctl enable-linger {facts.user}"
    return warn("jobs end when you log out", f"{command}; where that is refused, an administrator: sudo {command}")


def _journal(facts: Facts) -> Check:
    make = f"sudo mkdir -p {JOURNAL_FOLDER} && sudo systemctl restart systemd-journald && sudo journalctl --flush"
    if not facts.booted:
        return skip("none here; the jobs' output is in their log files")
    if facts.journals:
        return ok("persistent: journalctl --user -u lfsched shows the jobs")
    if facts.journals is None:
        return warn("not persistent, so journalctl --user is empty; the jobs' log files are not", make)
    return warn("no file of it is yours to read", f"sudo usermod -aG systemd-journal {facts.user}, and log in again")


def _unit(facts: Facts) -> Check:
    if facts.without_systemd:
        return facts.without_systemd
    if not facts.unit:
        return skip("cannot be told without a user manager")
    if facts.unit.get("LoadState") != "loaded":
        return bad(f"{UNIT} is not installed", "lfsvc setup")
    if not facts.activation:
        return bad("the D-Bus activation file is missing: busctl cannot start the scheduler", "lfsvc setup")
    if facts.unit.get("UnitFileState") not in ("enabled", "enabled-runtime", "static"):
        return warn("the scheduler does not start at login", f"systemctl --user enable {UNIT}")
    return ok("the scheduler starts at login, and when it is called over D-Bus")


def _scheduler(facts: Facts) -> Check:
    if facts.status is not None:
        version = facts.status.get("version", "unknown")
        if version != lfsvc.__version__:
            fix = "lfsvc setup" if facts.under_systemd else "lfsvc stop, then lfsvc serve"
            return bad(f"it is lfsvc {version}, and this client {lfsvc.__version__}", f"{fix}; jobs go on")
        jobs = f"{len(facts.status.get('running', ()))} running, {facts.status.get('queue_length', 0)} waiting"
        return ok(f"lfsvc {version} runs (pid {facts.pid}): {jobs}")
    if facts.pid:
        return bad(f"pid {facts.pid} runs, but: {facts.status_problem}", "lfsvc stop, then lfsvc start; jobs go on")
    if not facts.booted:
        return bad("none runs", "lfsvc serve --detach")
    if facts.unit.get("LoadState") != "loaded":
        return bad("none runs", "lfsvc setup" if facts.under_systemd else "lfsvc serve --detach")
    if facts.unit.get("ActiveState") == "failed" or facts.unit.get("Result", "success") != "success":
        said, _, hint = facts.unit.get("StatusText", "").removeprefix("Failed: ").partition(" hint: ")
        why = said or f"ended as {facts.unit.get('Result')}"
        return bad(f"does not start: {why}", hint or f"journalctl --user -u {UNIT} -n 20")
    return warn("does not run; what is queued waits", "lfsvc start")


def _config(facts: Facts) -> Check:
    path = paths.config_file()
    problem, fix = facts.config_problem
    if problem:
        return bad(f"{problem} A running scheduler keeps its settings, and will not start with these", fix)
    return ok(f"{path} holds" if os.path.exists(path) else "the defaults hold")


def _llamafactory(facts: Facts) -> Check:
    if facts.program:
        return ok(f"{facts.program}, version {facts.program_version or 'unknown'}")
    fix = "lfsvc setup" if facts.under_systemd else "lfsvc serve"
    path = facts.environment.get("PATH", "")
    return bad(f"not on the PATH of the jobs ({path})", f"{fix}, in the environment that has it")


def _this_shell(facts: Facts) -> Check:
    here, there = facts.program_here, facts.program
    if not here:
        return skip(f"has no {PROGRAM}" + (", and needs none" if there else " either: activate its environment first"))
    if not there or os.path.realpath(here) == os.path.realpath(there):
        return ok(f"finds {here}" if not there else f"finds the same {PROGRAM} as the jobs")
    return warn(f"finds another {PROGRAM}: {here}", "lfsvc setup here, if jobs are to run that one")


def _accelerators(facts: Facts) -> Check:
    what = "; ".join(found.text for found in facts.found)
    problems = [found.problem for found in facts.found if found.problem]
    if problems:
        return bad(f"{what}, but {'; '.join(problems)}", "look at the kernel log: sudo dmesg")
    sick = [text for found in facts.found for text in found.sick]
    if sick:
        return warn(f"{what}, but {', '.join(sick)}", "submit with @devices that leave them out")
    if facts.found:
        return ok(what)
    if is_enabled(facts.environment, "FORCE_TORCHRUN") and "NPROC_PER_NODE" not in facts.environment:
        where = paths.environment_file() if facts.under_systemd else "the environment of `lfsvc serve`"
        return warn("none, and without one FORCE_TORCHRUN=1 fails", f"set NPROC_PER_NODE=1 in {where}, or with --env")
    return skip("none; trainings run on the CPU")


def _device_files(facts: Facts) -> Check:
    if not any(found.files for found in facts.found):
        return skip("none")
    if facts.closed is None:
        return skip("cannot be told while no scheduler runs")
    if not facts.closed:
        return ok("the scheduler's process may open them")
    first = facts.closed[0]
    more = f" and {len(facts.closed) - 1} more" if len(facts.closed) > 1 else ""
    text = f"the scheduler's process may not open {first.path}{more} (group {first.group}, mode {first.mode:03o})"
    again = "start it again from a fresh login"
    if facts.under_systemd:
        again = f"sudo systemctl restart user@{facts.uid} (or loginctl terminate-user {facts.user}); it ends what runs"
    if first.gid in facts.own_groups:
        return bad(f"{text}: it began before {facts.user} joined the group", again)
    if first.gid and first.mode & 0o060 == 0o060:
        return bad(text, f"sudo usermod -aG {first.group} {facts.user}, then {again}")
    return bad(text, f"an administrator has to open it to {facts.user}, with a udev rule")


def _folder(key: str, facts: Facts) -> Check:
    folder: Folder | None = facts.state_folder if key == "state_dir" else facts.results_folder
    if folder is None:
        return bad("its file system does not answer", f"set {key} in {paths.config_file()}")
    path, writable, free_bytes = folder
    if not writable:
        return bad(f"{path} cannot be written", f"mend it, or set {key} in {paths.config_file()}")
    free = f"{path}, {free_bytes / 1024**3:.1f} GiB free"
    if free_bytes < LITTLE_BYTES:
        low = bad if free_bytes < TOO_LITTLE_BYTES else warn
        return low(free, "make room; old checkpoints are the largest")
    return ok(free)


CHECKS: dict[str, Callable[[Facts], Check]] = {
    "user manager": _manager,
    "session bus": _bus,
    "linger": _linger,
    "journal": _journal,
    "unit": _unit,
    "scheduler": _scheduler,
    "config": _config,
    PROGRAM: _llamafactory,
    "this shell": _this_shell,
    "accelerators": _accelerators,
    "device files": _device_files,
    "queue folder": partial(_folder, "state_dir"),
    "results folder": partial(_folder, "results_root"),
}


# -- the facts ---------------------------------------------------------------------------------------


def gather() -> Facts:
    """Look at everything."""
    booted = os.path.isdir("/run/systemd/system")  # Source: sd_booted(3)
    manager = booted and paths.has_user_manager()
    unit = session.unit_properties() if manager else {}
    bus_problem, pid, status, status_problem = within(FACT_SECONDS, _ask_service, _BUS_HANGS)
    config, config_problem = _read_config()
    user, uid = session.user_name(), os.getuid()
    environment = setup.environment_of_jobs(pid, unit=_is_unit(booted, pid, unit))
    program = find_program(PROGRAM, environment["PATH"])
    found = accelerators.find(os.environ)
    theirs = accelerators.credentials_of(pid or accelerators.manager_pid())
    ours = accelerators.credentials_of("self")
    files = accelerators.look_at(file for each in found for file in each.files)
    installed = installation.find(program, environment) if program else None
    return Facts(
        user=user,
        uid=uid,
        booted=booted,
        manager=manager,
        linger=session.has_linger(),
        bus_problem=bus_problem,
        dbus_daemon=shutil.which("dbus-daemon") is not None,
        journals=readable_journals(uid),
        unit=unit,
        activation=setup.activation_in_place(),
        pid=pid,
        status=status,
        status_problem=status_problem,
        config_problem=config_problem,
        environment=environment,
        program=program,
        program_version=installed.version if installed else "",
        program_here=find_program(PROGRAM, os.environ.get("PATH", "")),
        state_folder=within(FACT_SECONDS, lambda: look_into(config.state_folder), None),
        results_folder=within(FACT_SECONDS, lambda: look_into(config.results_folder), None),
        found=found,
        closed=tuple(accelerators.closed_files(files, theirs, ours)) if theirs and ours else None,
        own_groups=frozenset(os.getgrouplist(user, os.getgid())),
    )


_Answer = tuple[tuple[str, str], int, "Mapping[str, Any] | None", str]
_BUS_HANGS: _Answer = (("the session bus does not answer", "log in again"), 0, None, "")


def _ask_service() -> _Answer:
    """The bus's problem, the service's PID, its status, its problem. Starts no service."""
    try:
        client = Client.connect()
        pid = client.service_pid()
    except LfsvcError as error:
        return (str(error), error.hint), 0, None, ""
    if not pid:
        return ("", ""), 0, None, ""
    try:
        # A service that hangs costs the whole of FACT_SECONDS, and is then told from a bus that does.
        status = within(FACT_SECONDS / 2, lambda: client.call("Status", start=False), None)
    except LfsvcError as error:
        return ("", ""), pid, None, str(error)
    return ("", ""), pid, status, "" if status is not None else "it does not answer"


def _read_config() -> tuple[settings.Config, tuple[str, str]]:
    try:
        return settings.load(), ("", "")
    except LfsvcError as error:
        return settings.Config(), (str(error), error.hint)


def readable_journals(uid: int, folder: str = JOURNAL_FOLDER) -> tuple[str, ...] | None:
    """The persistent journal files that may be read: this user's own, or those of the system."""
    if not os.path.isdir(folder):
        return None
    patterns = (f"*/user-{uid}*.journal", "*/system*.journal")
    files = [path for pattern in patterns for path in glob.glob(os.path.join(folder, pattern))]
    return tuple(path for path in files if os.access(path, os.R_OK))


def look_into(path: str) -> Folder:
    """Whether a folder can be written, and what is free; where it does not exist, of the nearest one above."""
    there = path
    while not os.path.exists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    try:
        status = os.statvfs(there)
    except OSError:
        return path, False, 0
    return path, os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK), status.f_bavail * status.f_frsize


# -- the command -------------------------------------------------------------------------------------

# State → its mark, the mark where the output cannot carry that, the colour (ECMA-48).
MARKS = {"ok": ("✓", "+", "32"), "warn": ("!", "!", "33"), "bad": ("✗", "x", "31"), "skip": ("\u2013", "-", "2")}


def doctor_command(arguments: Namespace) -> int:
    """Check everything; exit status 1 where something is broken."""
    facts = gather()
    checks = {name: check(facts) for name, check in CHECKS.items()}
    broken = [name for name, check in checks.items() if check.state == "bad"]
    if arguments.json:
        rows = [{"name": n, "state": c.state, "text": c.text, "fix": c.fix} for n, c in checks.items()]
        print_json({"ok": not broken, "version": lfsvc.__version__, "checks": rows})
    else:
        encoding = sys.stdout.encoding or "ascii"
        for line in lines(checks, ascii_only=not _carries(encoding), colour=has_colour(sys.stdout)):
            print(line.encode(encoding, "backslashreplace").decode(encoding))
    return 1 if broken else 0


def _carries(encoding: str) -> bool:
    try:
        "".join(mark for mark, _, _ in MARKS.values()).encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def lines(checks: Mapping[str, Check], *, ascii_only: bool, colour: bool) -> Iterator[str]:
    """The report: a line for each check, one below it for each fix, and one for the whole."""
    width = max(map(len, checks))
    for name, check in checks.items():
        mark, plain, code = MARKS[check.state]
        mark = plain if ascii_only else mark
        yield (f"\x1b[{code}m{mark}\x1b[0m" if colour else mark) + f" {name:{width}}  {check.text}"
        if check.fix and check.state != "ok":
            yield f"  {'':{width}}  fix: {check.fix}"
    states = [check.state for check in checks.values()]
    broken, odd = states.count("bad"), states.count("warn")
    yield f"{broken or 'nothing'} broken, {odd or 'nothing'} to look at"
