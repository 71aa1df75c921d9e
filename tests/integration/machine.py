"""A throwaway machine with a booted systemd: systemd-nspawn on an overlay of this one's root.

Standard library only: the tests use it as a module, packaging/demo.sh from the shell
(it boots one, runs a command as the user, takes it away).

Nothing is left behind: neither a mount, a process, a cgroup nor a folder, also where a test fails or
is interrupted; what a run that was killed left is cleared by the next.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

USER = "ml"
HOME = f"/home/{USER}"
VENV = "/opt/lfsvc"

BOOT_SECONDS = 60.0

# Where the overlay's upper layer lies: neither tmpfs (a model would fill it) nor an overlay itself.
BASE = Path(os.environ.get("LFSVC_MACHINES", "/var/tmp/lfsvc-machines"))

CGROUP = Path("/sys/fs/cgroup")


class MachineError(Exception):
    """The machine does not do what it should; the message has what it printed."""


def why_not() -> str:
    """Say why no machine can be booted here; "" where one can."""
    if os.geteuid() != 0:
        return "booting a test machine needs root (run the tests as root, or with sudo)"
    for program in ("systemd-nspawn", "nsenter", "runuser", "dbus-daemon"):
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
        self.uid = 0

    @classmethod
    @contextlib.contextmanager
    def booted(cls, bind: Mapping[str, str] | None = None) -> Iterator[Machine]:
        """Boot a machine with a user and his systemd; take it away at the end, whatever happens.

        `bind`: folder inside → folder of this machine, read-only.
        """
        clear_stale()
        BASE.mkdir(parents=True, exist_ok=True)
        machine = cls(BASE / f"lfsvc-{os.getpid()}", bind or {})
        # A test run that is terminated ends its machines on the way.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        atexit.register(machine.shutdown)
        try:
            machine._make()
            machine.boot()
            machine._make_user()
            yield machine
        finally:
            machine.shutdown()
            atexit.unregister(machine.shutdown)
            signal.signal(signal.SIGTERM, before)

    def _make(self) -> None:
        for name in ("up", "work", "m"):
            (self.folder / name).mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={self.folder}/up,workdir={self.folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.folder / "m")], check=True)
        (self.folder / "m" / "etc" / "machine-id").write_text("")
        for number, inside in enumerate(self.bind):
            del number
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
        roots = [CGROUP] if (CGROUP / "cgroup.procs").exists() else [CGROUP / "unified", CGROUP / "systemd"]
        return [root / self.name for root in roots if (root / "cgroup.procs").exists()]

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
        shutil.copytree(wheels, inside)
        self.run(["/usr/bin/python3", "-m", "venv", VENV], user="root")
        pip = ["install", "--quiet", "--no-index", "--find-links", "/opt/wheels-lfsvc", "lfsvc"]
        self.run([f"{VENV}/bin/pip", *pip], user="root", timeout=120)

    # -- running ---------------------------------------------------------------------------------

    def command(self, argv: Sequence[str], *, user: str = USER, env: Mapping[str, str] | None = None) -> list[str]:
        """The argument vector on this machine that runs `argv` inside."""
        variables = {"LANG": "C.UTF-8", "TERM": "dumb"}
        enter = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-p", "-n", "-C", "--"]
        if user == "root":
            variables |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        else:
            runtime = f"/run/user/{self.uid}"
            variables |= {
                "PATH": f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin",
                "HOME": HOME,
                "USER": user,
                "XDG_RUNTIME_DIR": runtime,
                "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
            }
            enter += ["runuser", "-u", user, "--"]
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


def remove(folder: Path, cgroups: Sequence[Path]) -> None:
    """Unmount and delete what a machine was."""
    mount = folder / "m"
    for _ in range(20):
        if not os.path.ismount(mount):
            break
        if subprocess.run(["umount", "-R", str(mount)], capture_output=True, check=False).returncode != 0:
            time.sleep(0.1)
    if os.path.ismount(mount):
        subprocess.run(["umount", "-R", "-l", str(mount)], capture_output=True, check=False)
    for group in cgroups:
        for inner in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
    shutil.rmtree(folder, ignore_errors=True)


def clear_stale() -> None:
    """Clear what runs that were killed left behind."""
    if not BASE.exists():
        return
    for folder in BASE.iterdir():
        pid = folder.name.rpartition("-")[2]
        if not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        subprocess.run(["pkill", "-KILL", "-f", f"systemd-nspawn .*-M {folder.name} "], check=False)
        machine = Machine(folder, {})
        remove(folder, machine._cgroups())


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
        return subprocess.run(argv, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
