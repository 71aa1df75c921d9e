"""The README's Dockerfile, step by step, in a chroot with a PID namespace of its own: what a container is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import BASE, Machine, remove, wait_until, why_not

ROOT = Path(__file__).parent.parent.parent
STANDIN = ROOT / "tests" / "support" / "llamafactory-cli"
# As an image with LLaMA-Factory has it: an environment of its own, first on PATH.
ENVIRONMENT = {"PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the README's Dockerfile."""
    (text,) = re.findall(r"```Dockerfile\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)]


class Container:
    """An image in a folder, and at times a process in it that is PID 1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._outer: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def build(self) -> list[str]:
        """Carry the Dockerfile out; give its CMD."""
        command: list[str] = []
        for instruction, rest in dockerfile():
            if instruction == "RUN":
                self._chroot(["bash", "-ec", rest])
            elif instruction == "COPY":
                source, target = rest.split()
                assert source == "."
                self._copy_checkout(self.root / target.lstrip("/"))
            elif instruction == "CMD":
                command = json.loads(rest)
            else:
                assert instruction in ("FROM", "VOLUME"), instruction
        return command

    def _copy_checkout(self, target: Path) -> None:
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        target.mkdir(parents=True)
        subprocess.run(
            ["cp", "--parents", "-t", str(target), *names.splitlines()], cwd=ROOT, check=True, capture_output=True
        )

    def _chroot(self, argv: list[str]) -> None:
        done = subprocess.run(
            ["chroot", str(self.root), *argv], env=ENVIRONMENT | {"DEBIAN_FRONTEND": "noninteractive"}, check=False,
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, command: list[str]) -> None:
        """`docker run`: the command as PID 1."""
        inner = f"mount -t proc proc {self.root}/proc && exec chroot {self.root} {shlex.join(command)}"
        self._outer = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "bash", "-c", inner],
            env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        wait_until(lambda: children.read_text().split(), "no PID 1")
        self._pid = int(children.read_text().split()[0])
        wait_until(lambda: self.exec("lfsvc", "status", check=False).returncode == 0, self._said)

    def _said(self) -> str:
        assert self._outer is not None and self._outer.stderr is not None
        os.set_blocking(self._outer.stderr.fileno(), False)
        return (self._outer.stderr.read() or b"").decode()

    def exec(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`docker exec`."""
        enter = ["nsenter", "-t", str(self._pid), "--mount", "--pid", "--ipc", "--root"]
        done = subprocess.run(
            [*enter, "env", "-i", "-C", "/root", *(f"{name}={value}" for name, value in ENVIRONMENT.items()), *argv],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def job(self, number: int) -> Any:
        return json.loads(self.exec("lfsvc", "show", "--json", str(number)).stdout)

    def stop(self) -> None:
        """`docker stop`: SIGTERM to PID 1, with which all others end."""
        if self._outer is None:
            return
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGTERM)
        with self._outer:
            try:
                self._outer.wait(15)
            except subprocess.TimeoutExpired:
                self._outer.kill()
        self._outer = None


@pytest.fixture
def container() -> Iterator[Container]:
    reason = why_not()
    if reason:
        if os.environ.get("LFSVC_REQUIRE_INTEGRATION") or os.environ.get("CI") == "true":
            pytest.fail(f"the integration tests must run here: {reason}")
        pytest.skip(reason)
    # A number beyond those of booted machines.
    image = Machine(BASE / f"lfsvc-99-{os.getpid()}", {})
    container = Container(image.folder / "m")
    try:
        image._make()
        subprocess.run(["mount", "--rbind", "/dev", str(container.root / "dev")], check=True)
        subprocess.run(["mount", "--make-rslave", str(container.root / "dev")], check=True)
        subprocess.run(["chroot", str(container.root), "python3", "-m", "venv", "/opt/venv"], check=True, cwd="/")
        program = container.root / "opt" / "venv" / "bin" / "llamafactory-cli"
        program.write_bytes(STANDIN.read_bytes())
        program.chmod(0o755)
        yield container
    finally:
        container.stop()
        image.shutdown()
        remove(image.folder, [])


YAML = """\
model_name_or_path: org/base
stage: sft
do_train: true
dataset: x
dataset_dir: ONLINE
val_size: 0.1
output_dir: /root/saves/run
"""


def test_the_dockerfile_makes_a_container_that_trains_kills_and_survives_a_restart(container: Container) -> None:
    command = container.build()
    assert command == ["lfsvc", "serve"]
    container.start(command)
    (container.root / "root" / "run.yaml").write_text(YAML)
    container.exec("lfsvc", "submit", "run.yaml@0", "--wait")
    container.exec("lfsvc", "wait", "2")
    assert [container.job(number)["state"] for number in (1, 2)] == ["succeeded", "succeeded"]
    assert container.exec("lfsvc", "results", "--csv").stdout.splitlines()[1].startswith("run,eval,lora,")

    (container.root / "root" / "tree.sh").write_text("setsid sleep 98701 & setsid setsid sleep 98701; wait")
    container.exec("lfsvc", "submit", "tree.sh")
    wait_until(lambda: container.exec("pgrep", "-c", "sleep", check=False).stdout.strip() == "2", "no sleep")
    container.exec("lfsvc", "kill")
    container.exec("lfsvc", "wait", "3", check=False)
    assert container.job(3)["state"] == "killed"
    assert container.exec("pgrep", "-c", "sleep", check=False).stdout.strip() == "0"

    container.exec("lfsvc", "submit", "tree.sh", "run.yaml@1")
    wait_until(lambda: container.job(4)["state"] == "running", "not started")
    container.stop()
    container.start(command)
    container.exec("lfsvc", "wait", "5")
    assert [container.job(number)["state"] for number in (4, 5)] == ["interrupted", "succeeded"]
