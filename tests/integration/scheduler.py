"""The scheduler of the test machine's user, driven as he would, under either launcher."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from machine import HOME, Machine, wait_until

STANDIN_PATH = "/opt/standin:/opt/lfsvc/bin:/usr/bin:/bin"


class Scheduler:
    """`systemd`: lfsched.service with jobs in units. `process`: `lfsvc serve` with a bus of its own."""

    def __init__(self, machine: Machine, mode: str) -> None:
        self.machine = machine
        self.mode = mode
        self.env: dict[str, str] = {"PATH": STANDIN_PATH}
        self._serve: subprocess.Popen[str] | None = None
        if mode == "process":
            # As in a container: neither a bus nor a systemd of this user's is found.
            runtime = f"{HOME}/work/run"
            machine.run(["mkdir", "-p", "-m", "700", runtime])
            self.env |= {"XDG_RUNTIME_DIR": runtime, "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nonexistent"}

    def cli(
        self, *arguments: str, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run `lfsvc …`."""
        return self.machine.run(["lfsvc", *arguments], env={**self.env, **(env or {})}, check=check, timeout=timeout)

    def start(self) -> None:
        """Start it and wait until it answers."""
        if self.mode == "systemd":
            self.machine.run(["systemctl", "--user", "start", "lfsched"])
            return
        self._serve = self.machine.popen(["lfsvc", "serve"], env=self.env)
        wait_until(lambda: self.cli("status", check=False).returncode == 0, "no answer from lfsvc serve")

    def pid(self) -> int:
        """The PID of the scheduler inside the machine; 0 while a new one has not written it yet."""
        return int(self.machine.sh("cat ~/.local/state/lfsvc/lock").strip() or 0)

    def stop(self) -> None:
        """Stop it in order."""
        self.cli("stop")
        self._join()

    def _join(self) -> None:
        if self._serve is not None:
            with self._serve:
                self._serve.wait(20)
            self._serve = None

    def crash(self) -> None:
        """Kill it with SIGKILL and, where nobody else does, start it again."""
        pid = self.pid()
        self.machine.run(["kill", "-KILL", str(pid)])
        if self.mode == "systemd":
            wait_until(
                lambda: self.pid() not in (0, pid) and self.cli("status").returncode == 0, "no restart by systemd"
            )
        else:
            self._join()
            self.start()

    def submit(self, task: str, *options: str) -> int:
        """Submit a task; give the job's id."""
        return int(json.loads(self.cli("submit", "--json", *options, task).stdout)[0]["id"])

    def script(self, name: str, text: str, *options: str) -> int:
        """Submit a script of this content; give the job's id."""
        return self.submit(self.machine.write(f"{HOME}/work/{name}.sh", text), *options)

    def job(self, job_id: int) -> dict[str, Any]:
        """The job as `lfsvc show --json` prints it."""
        found: dict[str, Any] = json.loads(self.cli("show", "--json", str(job_id)).stdout)
        return found

    def wait(self, job_id: int, timeout: float = 60) -> dict[str, Any]:
        """Wait for the end of a job; give it."""
        self.cli("wait", str(job_id), check=False, timeout=timeout)
        return self.job(job_id)

    def wait_for_file(self, path: str) -> None:
        """Wait until a job has made a file: its sign that it has come so far."""
        wait_until(lambda: self.machine.run(["test", "-e", path], check=False).returncode == 0, f"no {path}")

    def log(self, job_id: int) -> str:
        """The output of a job."""
        return self.cli("logs", str(job_id)).stdout
