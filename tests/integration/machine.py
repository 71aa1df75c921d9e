"""A throwaway machine with a booted systemd: systemd-nspawn on an overlay of this one's root.

Standard library only: the tests use it as a module, packaging/demo.sh from the shell
(it boots one, runs a command as the user, takes it away).

Nothing is left behind: neither a mount, a process, a cgroup nor a folder, also where a test fails or
is interrupted; what a run that was killed left is cleared by the next.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

USER = "ml"
HOME = f"/home/{USER}"
VENV = "/opt/lfsvc"

BOOT_SECONDS = 60.0

# Where the overlay's upper layer lies: neither tmpfs (a model would fill it) nor an overlay itself.
BASE = Path(os.environ.get("LFSVC_MACHINES", "/var/tmp/lfsvc-machines"))

CGROUP = Path("/sys/fs/cgroup")


_numbers = itertools.count()


class MachineError(Exception):
    """The machine does not do what it should; the message has what it printed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came. pytest takes a SystemExit for a failed test and goes on; this ends it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated(number)


def why_not() -> str:
    """Say why no machine can be booted here; "" where one can."""
    if os.geteuid() != 0:
        return "booting a test machine needs root (run the tests as root, or with sudo)"
    for program in ("systemd-nspawn", "nsenter", "setpriv", "dbus-daemon"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


def wait_until(predicate: Callable[[], object], describe: Callable[[], object] | str, timeout: float = 20.0) -> None:
    """Wait until `predicate` holds; where it does not in time, fail with what `describe` says last.

    For states of another machine, of which nothing tells this process.
    """
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            seen = describe if isinstance(describe, str) else describe()
            raise AssertionError(f"not within {timeout:g} s; last seen: {seen}")
        time.sleep(0.05)


class Machine:
    """One machine. `with Machine.booted() as machine: machine.run(["id"])`."""

    python = f"{VENV}/bin/python"
    lfsvc = f"{VENV}/bin/lfsvc"

    def __init__(self, folder: Path, bind: Mapping[str, str]) -> None:
        self.folder = folder
        self.name = folder.name
        self.bind = dict(bind)
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._lock = -1
        self.uid = 0
        self.begin = "0"

    @classmethod
    @contextlib.contextmanager
    def booted(cls, bind: Mapping[str, str] | None = None) -> Iterator[Machine]:
        """Boot a machine with a user and his systemd; take it away at the end, whatever happens.

        `bind`: folder inside → folder of this machine, read-only.
        """
        # The number: two machines of one process are two.
        machine = cls(BASE / f"lfsvc-{next(_numbers)}-{os.getpid()}", bind or {})
        # A test run that is terminated ends its machines on the way. Under nohup, SIGHUP stays ignored.
        caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, _terminate) for number in caught}
        atexit.register(machine.shutdown)
        try:
            machine._make()
            machine.boot()
            machine._make_user()
            yield machine
        finally:
            machine.shutdown()
            atexit.unregister(machine.shutdown)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _make(self) -> None:
        with _base_locked():
            clear_stale()
            for name in ("up", "work", "m"):
                (self.folder / name).mkdir(parents=True)
            # Held as long as this process lives, however it ends: who gets it knows the machine for stale.
            self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        layers = f"lowerdir=/,upperdir={self.folder}/up,workdir={self.folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.folder / "m")], check=True)
        (self.folder / "m" / "etc" / "machine-id").write_text("")
        for inside in self.bind:
            (self.folder / "m" / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def boot(self) -> None:
        """Boot, for the first time or again on the same files; returns when systemd is up."""
        assert self._nspawn is None, "it is up already"
        log = open(self.folder / "boot.log", "ab")
        binds = [f"--bind-ro={outside}:{inside}" for inside, outside in self.bind.items()]
        with log:
            self._nspawn = subprocess.Popen(
                ["systemd-nspawn", "-q", "-D", str(self.folder / "m"), "--register=no", "--keep-unit", "-M", self.name,
                 "--link-journal=no", "--private-network", "--console=pipe", *binds, "-b",
                 "systemd.unit=basic.target"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": os.environ["PATH"], "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                preexec_fn=self._enter_cgroup,
            )  # fmt: skip
        wait_until(self._find_init, self._boot_log, BOOT_SECONDS)
        wait_until(self._is_up, self._boot_log, BOOT_SECONDS)
        self.run(["systemctl", "start", "systemd-logind"], user="root")
        if self.uid:
            self._wait_for_user()

    def _enter_cgroup(self) -> None:
        """Two machines must not share a cgroup, so this one gets one of its own in each hierarchy."""
        for group in self._cgroups():
            group.mkdir(exist_ok=True)
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def _cgroups(self) -> list[Path]:
        return [root / self.name for root in _cgroup_roots()]

    def _boot_log(self) -> str:
        return (self.folder / "boot.log").read_text(errors="replace")[-3000:]

    def _find_init(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise MachineError(f"systemd-nspawn ended with {self._nspawn.returncode}:\n{self._boot_log()}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                    self._init = int(pid)
        return self._init != 0

    def _is_up(self) -> bool:
        done = self.run(["systemctl", "is-active", "basic.target"], user="root", check=False)
        return done.stdout.strip() == "active"

    def _make_user(self) -> None:
        self.run(["useradd", "-m", "-s", "/bin/bash", USER], user="root")
        self.uid = int(self.run(["id", "-u", USER], user="root").stdout)
        # Only a persistent journal is split by user, and only then an ordinary user sees his entries.
        self.run(["mkdir", "-p", "/var/log/journal"], user="root")
        self.run(["systemd-tmpfiles", "--create", "--prefix", "/var/log/journal"], user="root")
        self.run(["systemctl", "restart", "systemd-journald"], user="root")
        self.run(["journalctl", "--flush"], user="root")
        self.run(["loginctl", "enable-linger", USER], user="root")
        self._wait_for_user()

    def _wait_for_user(self) -> None:
        wait_until(
            lambda: self.run(["systemctl", "--user", "is-active", "default.target"], check=False).returncode == 0,
            lambda: self.run(["systemctl", "status", f"user@{self.uid}.service"], user="root", check=False).stdout,
            BOOT_SECONDS,
        )

    def install(self, wheels: Path) -> None:
        """Install lfsvc and what it needs from a folder of wheels; the user may run it, not write to it."""
        inside = self.folder / "m" / "opt" / "wheels-lfsvc"
        shutil.copytree(wheels, inside, ignore=shutil.ignore_patterns(".*"))
        self.run(["/usr/bin/python3", "-m", "venv", VENV], user="root")
        pip = ["install", "--quiet", "--no-index", "--find-links", "/opt/wheels-lfsvc", "lfsvc"]
        self.run([f"{VENV}/bin/pip", *pip], user="root", timeout=120)

    # -- running ---------------------------------------------------------------------------------

    def command(self, argv: Sequence[str], *, user: str = USER, env: Mapping[str, str] | None = None) -> list[str]:
        """The argument vector on this machine that runs `argv` inside."""
        variables = {"LANG": "C.UTF-8", "TERM": "dumb"}
        enter = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-p", "-n", "-C", "--"]
        # pdeathsig: a signal to nsenter, such as that of a timeout, ends the command inside and not nsenter alone.
        if user == "root":
            variables |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
            enter += ["setpriv", "--pdeathsig", "KILL", "--"]
        else:
            runtime = f"/run/user/{self.uid}"
            variables |= {
                "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
                "HOME": HOME,
                "USER": user,
                "XDG_RUNTIME_DIR": runtime,
                "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
            }
            enter += ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--pdeathsig", "KILL", "--"]
        variables |= env or {}
        settings = [f"{name}={value}" for name, value in variables.items() if value is not None]
        # env -C: the working directory of the caller may not exist inside.
        return [*enter, "env", "-i", "-C", HOME if user != "root" else "/", *settings, *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = USER,
        env: Mapping[str, str] | None = None,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside; with `check`, one that fails raises MachineError with what it printed."""
        done = subprocess.run(
            self.command(argv, user=user, env=env),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
            check=False,
            umask=0o022,
            encoding="utf-8",
            errors="backslashreplace",
        )
        if check and done.returncode != 0:
            raise MachineError(f"{list(argv)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def popen(
        self, argv: Sequence[str], *, user: str = USER, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command inside; stdout and stderr are one pipe."""
        return subprocess.Popen(
            self.command(argv, user=user, env=env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            umask=0o022,
            encoding="utf-8",
            errors="backslashreplace",
        )

    def sh(self, script: str, **kwargs: object) -> str:
        """Run a shell script inside as the user; give what it printed."""
        return self.run(["bash", "-c", script], **kwargs).stdout  # type: ignore[arg-type]  # handed on as they are

    def write(self, path: str, text: str, *, mode: int = 0o644) -> str:
        """Write a file of the user's; give its path."""
        self.run(["mkdir", "-p", os.path.dirname(path)])
        self.run(["tee", path], input=text)
        self.run(["chmod", f"{mode:o}", path])
        return path

    # -- ends ------------------------------------------------------------------------------------

    def poweroff(self) -> None:
        """Shut down in order, as a machine that is switched off."""
        os.kill(self._init, signal.SIGRTMIN + 4)
        self._wait_down(60)

    def power_cut(self) -> None:
        """Lose power, at the level of processes."""
        os.kill(self._init, signal.SIGKILL)
        self._wait_down(30)

    def _wait_down(self, timeout: float) -> None:
        assert self._nspawn is not None
        self._nspawn.wait(timeout)
        self._nspawn = None
        self._init = 0

    def shutdown(self) -> None:
        """Take the machine away; harmless where it is gone."""
        if self._nspawn is not None:
            with contextlib.suppress(OSError):
                if self._init:
                    os.kill(self._init, signal.SIGKILL)
            self._nspawn.kill()
            self._nspawn.wait()
            self._nspawn = None
        remove(self.folder, self._cgroups())
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _cgroup_roots() -> list[Path]:
    """The hierarchies that systemd uses: one, or two where this machine has cgroup v1 beside v2."""
    return [root for root in (CGROUP, CGROUP / "unified", CGROUP / "systemd") if (root / "cgroup.procs").exists()]


def _processes(cgroups: Sequence[Path]) -> set[int]:
    """The processes in some cgroups and all below them."""
    found: set[int] = set()
    for group in cgroups:
        for procs in [group / "cgroup.procs", *group.rglob("cgroup.procs")]:
            with contextlib.suppress(OSError):
                # 0 is what a process of a PID namespace outside ours is called.
                found.update(int(pid) for pid in procs.read_text().split() if pid != "0")
    return found


def remove(folder: Path, cgroups: Sequence[Path]) -> None:
    """End what still runs of a machine, unmount and delete it. What cannot be done is said, not raised."""
    deadline = time.monotonic() + 10
    # By its own cgroup: a name or a remembered PID may be somebody else's.
    while (alive := _processes(cgroups)) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    mount = folder / "m"
    for _ in range(20):
        if not os.path.ismount(mount):
            break
        if subprocess.run(["umount", "-R", str(mount)], capture_output=True, check=False).returncode != 0:
            time.sleep(0.1)
    if os.path.ismount(mount):
        subprocess.run(["umount", "-R", "-l", str(mount)], capture_output=True, check=False)
    for group in cgroups:
        _remove_cgroup(group)
    if os.path.ismount(mount):
        # Never delete through a mount.
        print(f"lfsvc tests: {mount} cannot be unmounted", file=sys.stderr)
        return
    shutil.rmtree(folder, ignore_errors=True)
    for left in [folder, *cgroups]:
        if left.exists():
            print(f"lfsvc tests: {left} cannot be removed", file=sys.stderr)


def _remove_cgroup(group: Path) -> None:
    """Remove a cgroup and all below it; one with a process in it stays."""
    for inner in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            inner.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()


@contextlib.contextmanager
def _base_locked() -> Iterator[None]:
    """Only one process at a time makes or clears machines."""
    BASE.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(BASE / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_stale(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # Died before it had one, or an earlier harness made it, which had none.
        pid = folder.name.rpartition("-")[2]
        return pid.isdigit() and not Path(f"/proc/{pid}").exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def clear_stale() -> None:
    """Clear what runs that were killed left behind."""
    for folder in BASE.glob("lfsvc-*"):
        if _is_stale(folder):
            remove(folder, Machine(folder, {})._cgroups())
    # Empty ones whose folder is gone already; by the PID, since another BASE may have living machines.
    for root in _cgroup_roots():
        for group in root.glob("lfsvc-*"):
            pid = group.name.rpartition("-")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                _remove_cgroup(group)


def main(arguments: list[str]) -> int:
    """Boot a machine with lfsvc in it, run a command as its user, take it away; give the command's status.

    Arguments: a folder of wheels, a folder to be seen under the same path inside, files to be put into
    /opt/demo, `--`, the command.
    """
    separator = arguments.index("--")
    wheels, cache, *files = arguments[:separator]
    reason = why_not()
    if reason:
        print(f"No test machine can be booted: {reason}.", file=sys.stderr)
        return 1
    with Machine.booted({cache: cache}) as machine:
        machine.install(Path(wheels))
        demo = machine.folder / "m" / "opt" / "demo"
        demo.mkdir(parents=True)
        for file in files:
            shutil.copy(file, demo)
        argv = machine.command(arguments[separator + 1 :], env={"TERM": os.environ.get("TERM", "dumb")})
        return subprocess.run(argv, check=False, umask=0o022).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Terminated as ended:
        sys.exit(128 + ended.number)
