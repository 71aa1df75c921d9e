"""`lfsvc doctor` on a machine with systemd, on one without, and with what breaks in practice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from machine import HOME, Machine
from scheduler import STANDIN_PATH, Scheduler

W = f"{HOME}/work"
NPU = "/dev/davinci0"


@pytest.fixture
def scheduler(user: Machine) -> Iterator[Scheduler]:
    yield Scheduler(user, "systemd")


def report(scheduler: Scheduler, status: int) -> dict[str, dict[str, Any]]:
    """The checks by name; the exit status must be this one."""
    done = scheduler.cli("doctor", "--json", check=False)
    assert (done.returncode, done.stderr) == (status, ""), done.stdout
    document = json.loads(done.stdout)
    assert document["ok"] is (status == 0)
    return {check["name"]: check for check in document["checks"]}


def test_a_machine_that_is_set_up_is_all_right(scheduler: Scheduler) -> None:
    checks = report(scheduler, 0)
    assert {name for name, check in checks.items() if check["state"] not in ("ok", "skip")} <= {"accelerators"}
    # Those that are about systemd must have been made, not passed over.
    for name in ("user manager", "session bus", "linger", "journal", "unit", "scheduler", "llamafactory-cli"):
        assert checks[name]["state"] == "ok", checks[name]
    assert f"pid {scheduler.pid()}): 0 running, 0 waiting" in checks["scheduler"]["text"]
    assert checks["llamafactory-cli"]["text"] == "/opt/standin/llamafactory-cli, version unknown"


def test_the_report_fits_the_output_it_goes_to(scheduler: Scheduler) -> None:
    utf8 = scheduler.cli("doctor").stdout
    assert utf8.startswith("✓ user manager      runs for ml\n")
    ascii_only = scheduler.cli("doctor", env={"PYTHONIOENCODING": "ascii"}).stdout
    assert ascii_only.startswith("+ user manager      runs for ml\n") and ascii_only.isascii()
    on_a_terminal = ["script", "-qec", "lfsvc doctor", "/dev/null"]
    colour = {"PATH": STANDIN_PATH, "TERM": "xterm"}
    assert "\x1b[32m✓\x1b[0m user manager" in scheduler.machine.run(on_a_terminal, env=colour).stdout
    assert "\x1b" not in scheduler.machine.run(on_a_terminal, env=colour | {"NO_COLOR": "1"}).stdout


def test_a_stopped_service_is_said_and_stays_stopped(scheduler: Scheduler) -> None:
    scheduler.stop()
    check = report(scheduler, 0)["scheduler"]
    assert (check["state"], check["fix"]) == ("warn", "lfsvc start")
    state = scheduler.machine.run(["systemctl", "--user", "is-active", "lfsched"], check=False)
    assert state.stdout == "inactive\n"


def test_nothing_installed_is_said_with_the_one_command(scheduler: Scheduler) -> None:
    scheduler.cli("setup", "--remove")
    checks = report(scheduler, 1)
    assert [checks[name]["fix"] for name in ("unit", "scheduler")] == ["lfsvc setup"] * 2


def test_a_config_that_does_not_hold_is_the_cause_of_a_service_that_does_not_start(scheduler: Scheduler) -> None:
    scheduler.stop()
    path = scheduler.machine.write(f"{HOME}/.config/lfsvc/config.yaml", "kill_grace: soon\n")
    assert scheduler.cli("start", check=False).returncode == 3
    checks = report(scheduler, 1)
    sentence = f"{path}: kill_grace must be a number of seconds from 0 to 3600, not 'soon'."
    assert checks["config"]["text"].startswith(f"{sentence} A running scheduler keeps its settings")
    assert checks["scheduler"]["text"] == f"does not start: {sentence}"
    assert [checks[name]["fix"] for name in ("config", "scheduler")] == ["mend the line"] * 2


def test_a_service_that_hangs_does_not_hang_the_doctor(scheduler: Scheduler) -> None:
    pid = str(scheduler.pid())
    scheduler.machine.run(["kill", "-STOP", pid])
    try:
        check = report(scheduler, 1)["scheduler"]
    finally:
        scheduler.machine.run(["kill", "-CONT", pid])
    assert check["text"] == f"pid {pid} runs, but: it does not answer"


def test_another_llamafactory_in_this_shell_is_said(scheduler: Scheduler) -> None:
    scheduler.machine.sh(f"mkdir {W}/bin; cp /opt/standin/llamafactory-cli {W}/bin")
    scheduler.env["PATH"] = f"{W}/bin:{STANDIN_PATH}"
    check = report(scheduler, 0)["this shell"]
    assert check["state"] == "warn" and f"{W}/bin/llamafactory-cli" in check["text"]


def test_a_manager_from_before_the_users_new_group_is_found_out(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    root = f"groupadd npu; touch {NPU}; chgrp npu {NPU}; chmod 660 {NPU}"
    machine.sh(root, user="root")
    try:
        # Not in the group at all.
        check = report(scheduler, 1)["device files"]
        assert f"may not open {NPU} (group npu, mode 660)" in check["text"]
        assert check["fix"].startswith("sudo usermod -aG npu ml, then sudo systemctl restart user@")
        # In it now, as each new login is; the lingering systemd is not, and so is no job.
        machine.run(["usermod", "-aG", "npu", "ml"], user="root")
        check = report(scheduler, 1)["device files"]
        assert check["text"].endswith("it began before ml joined the group")
        assert check["fix"].startswith(f"sudo systemctl restart user@{machine.uid}")
        # Without a service its systemd is asked about.
        scheduler.stop()
        assert report(scheduler, 1)["device files"]["text"].endswith("it began before ml joined the group")
        machine.run(["systemctl", "restart", f"user@{machine.uid}.service"], user="root")
        checks = report(scheduler, 0)
        assert checks["device files"]["state"] == "ok"
        assert checks["accelerators"]["text"] == "1 x Ascend"
    finally:
        machine.sh(f"rm -f {NPU}; gpasswd -d ml npu; groupdel npu; true", user="root")


def test_a_container_with_lfsvc_serve_gets_the_checks_that_make_sense_there(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    scheduler.cli("setup", "--remove")
    user = (
        f"setpriv --reuid ml --regid ml --init-groups env -i HOME={HOME} LANG=C.UTF-8 PATH={STANDIN_PATH}"
        " NPROC_PER_NODE=1"
    )
    script = f"""
        # As in a container: neither systemd nor a bus of the user's.
        mount -t tmpfs none /run/systemd; mount -t tmpfs none /run/user; cd /
        {user} lfsvc doctor; echo "status $?"
        {user} lfsvc serve >/dev/null 2>&1 &
        until {user} lfsvc status >/dev/null 2>&1; do sleep 0.1; done
        {user} lfsvc doctor; echo "status $?"
        {user} lfsvc stop >/dev/null; wait
    """
    done = machine.run(["unshare", "-m", "bash", "-c", script], user="root")
    before, middle, after = done.stdout.partition("status 1\n")
    assert middle and "✗ scheduler         none runs\n" in before and "fix: lfsvc serve" in before
    assert before.count("✗") == 1, before
    assert after.endswith("nothing broken, nothing to look at\nstatus 0\n"), after
    for name in ("user manager", "linger", "journal", "unit", "accelerators"):
        assert f"\n\u2013 {name} " in "\n" + after
    for name in ("session bus", "scheduler", "config", "llamafactory-cli", "queue folder"):
        assert f"\n✓ {name} " in after
