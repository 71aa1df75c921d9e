"""One booted machine for the whole run; for each test a clean user, and a look for what it left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from machine import HOME, Machine, why_not
from scheduler import Scheduler

STANDIN_FOLDER = "/opt/standin"
SUPPORT = Path(__file__).parent.parent / "support"


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A booted machine with lfsvc installed and, for speed, the stand-in for llamafactory-cli."""
    reason = why_not()
    wheels = os.environ.get("LFSVC_WHEELS", "")
    if not reason and not wheels:
        reason = "LFSVC_WHEELS is not set: run ./tests/run.sh"
    if reason:
        if os.environ.get("LFSVC_REQUIRE_INTEGRATION") or os.environ.get("CI") == "true":
            pytest.fail(f"the integration tests must run here: {reason}")
        pytest.skip(reason)
    real = os.environ.get("LFSVC_LLAMAFACTORY", "")
    with Machine.booted({"/opt/llamafactory-cache": os.path.dirname(real)} if real else {}) as machine:
        machine.install(Path(wheels))
        folder = machine.folder / "m" / STANDIN_FOLDER.lstrip("/")
        folder.mkdir(parents=True)
        program = folder / "llamafactory-cli"
        program.write_bytes((SUPPORT / "llamafactory-cli").read_bytes())
        program.chmod(0o755)
        (machine.folder / "m" / "opt" / "tiny_model.py").write_bytes((SUPPORT / "tiny_model.py").read_bytes())
        yield machine


def clean(machine: Machine) -> None:
    """Stop all of lfsvc and delete all that it keeps, for the user of the machine."""
    machine.sh(
        "systemctl --user stop lfsched.service 'lfsvc-job-*.service' 2>/dev/null;"
        "pkill -f '[l]fsvc serve'; systemctl --user reset-failed 2>/dev/null;"
        f"chmod -R u+w {HOME}/work 2>/dev/null;"
        f"rm -rf {HOME}/.local/state/lfsvc {HOME}/.config/lfsvc {HOME}/.local/share/lfsvc {HOME}/work"
        f" {HOME}/.config/systemd {HOME}/.local/share/dbus-1; systemctl --user daemon-reload; mkdir {HOME}/work; true"
    )


@pytest.fixture
def user(machine: Machine) -> Iterator[Machine]:
    """The machine with a user who has run `lfsvc setup`; afterwards nothing of a job may be left running."""
    clean(machine)
    machine.run(["lfsvc", "setup", "--no-linger"], env={"PATH": f"{STANDIN_FOLDER}:/opt/lfsvc/bin:/usr/bin:/bin"})
    # Job ids begin anew in each test; what the journal has from before is another test's.
    begin = machine.begin = machine.sh("date +%s.%N").strip()
    yield machine
    faults = machine.sh(f"journalctl --user -o cat --no-pager --since=@{begin} | grep -A20 'fault in lfsvc'; true")
    clean(machine)
    left = machine.sh(
        "for f in /proc/[0-9]*/environ; do tr '\\0' '\\n' <$f 2>/dev/null | grep -q ^LFSVC_JOB_ID= &&"
        " tr '\\0' ' ' <${f%environ}cmdline; done; true"
    ).strip()
    assert left == "", f"left running: {left}"
    assert faults == "", faults


@pytest.fixture(params=["systemd", "process"])
def scheduler(user: Machine, request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    """The scheduler under each launcher; a module that needs one of them alone has a fixture of this name."""
    if request.param == "process":
        user.run(["systemctl", "--user", "stop", "lfsched"])
    scheduler = Scheduler(user, request.param)
    scheduler.start()
    yield scheduler
    if request.param == "process":
        scheduler.cli("kill", check=False)
        scheduler.cli("wait", "--all", check=False)
        scheduler.stop()
