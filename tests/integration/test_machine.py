"""The test machine itself: what it promises the other tests, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import machine as harness
import pytest
from machine import HOME, Machine, MachineError, wait_until


@pytest.fixture
def second(machine: Machine) -> Iterator[Machine]:
    """A machine of the test's own, beside that of the run."""
    with Machine.booted() as own:
        yield own


def traces(name: str) -> list[str]:
    """What there is on this machine of a test machine: mounts, folders, cgroups, processes."""
    found = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/{name}/" in line]
    places = [harness.BASE / name, harness.CGROUP / name, harness.CGROUP / "unified" / name]
    found += [str(place) for place in [*places, harness.CGROUP / "systemd" / name] if place.exists()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.encode() in words:
            found.append(f"{process.name}: {b' '.join(words).decode()}")
    return found


def test_the_user_has_a_bus_and_a_manager_of_his_own(machine: Machine) -> None:
    assert machine.run(["id", "-un"]).stdout == "ml\n"
    assert "org.freedesktop.systemd1" in machine.run(["busctl", "--user", "list"]).stdout
    unit = ["systemd-run", "--user", "--quiet", "--wait", "--pipe", "--collect"]
    assert machine.run([*unit, "echo", "from a unit"]).stdout == "from a unit\n"
    assert machine.run([*unit, "sh", "-c", "exit 7"], check=False).returncode == 7


def test_the_user_sees_his_journal(machine: Machine) -> None:
    machine.run(["systemd-run", "--user", "--wait", "--quiet", "-u", "journal-probe", "echo", "seen in the journal"])
    shown = ["journalctl", "--user", "-u", "journal-probe", "-o", "cat"]
    wait_until(lambda: "seen in the journal" in machine.run(shown).stdout, "no entry")


def test_arguments_and_input_arrive_as_they_are(machine: Machine) -> None:
    odd = ["a b", "$HOME", "it's", '"', "", "\\", "*", "näh\n"]
    assert machine.run(["printf", "%s|", *odd]).stdout == "|".join(odd) + "|"
    assert machine.run(["cat"], input="line\n").stdout == "line\n"
    assert machine.run(["cat"]).stdout == ""
    environment = machine.run(["env"], env={"ODD": "a b\n$HOME"}).stdout
    assert "ODD=a b\n$HOME\n" in environment and "PYTEST_CURRENT_TEST" not in environment


def test_a_failed_command_says_what_it_printed(machine: Machine) -> None:
    with pytest.raises(MachineError, match="ended with 3:\nout\n\nwhy\n"):
        machine.run(["sh", "-c", "echo out; echo why >&2; exit 3"])


def test_a_command_that_takes_too_long_is_ended_inside_as_well(machine: Machine) -> None:
    for user in ("ml", "root"):
        with pytest.raises(subprocess.TimeoutExpired):
            machine.run(["sleep", "54321"], user=user, timeout=0.3)
    alive = ["pgrep", "-fx", "sleep 54321"]
    wait_until(lambda: machine.run(alive, check=False).stdout == "", lambda: machine.run(alive, check=False).stdout)


def test_a_wait_in_vain_says_what_was_seen_last() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.1 s; last seen: state 3"):
        wait_until(lambda: False, lambda: "state 3", timeout=0.1)


def test_lfsvc_is_installed_for_the_user(machine: Machine) -> None:
    assert machine.run(["lfsvc", "--version"]).stdout.startswith("lfsvc ")
    assert machine.run(["test", "-w", harness.VENV], check=False).returncode == 1


def test_a_machine_boots_again_on_the_same_files_after_a_poweroff_and_a_power_cut(second: Machine) -> None:
    boot_ids = set()

    def look() -> None:
        boot_ids.add(second.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout)
        assert second.run(["systemctl", "--user", "is-active", "default.target"]).stdout == "active\n"
        second.sh(f"echo boot >>{HOME}/boots")

    look()
    second.poweroff()
    second.boot()
    look()
    second.power_cut()
    second.boot()
    look()
    assert second.sh(f"cat {HOME}/boots") == "boot\n" * 3
    # The kernel is this machine's own, which nspawn hides with an id for each boot.
    assert len(boot_ids) == 3


def test_a_unit_sees_a_poweroff_as_a_stop_and_a_power_cut_not_at_all(second: Machine) -> None:
    trap = f"trap 'echo stopped >>{HOME}/ends; exit' TERM; touch {HOME}/up; while :; do sleep 0.1; done"
    for end in (second.power_cut, second.poweroff):
        second.run(["systemd-run", "--user", "--quiet", "--collect", "bash", "-c", trap])
        wait_until(lambda: second.run(["test", "-e", f"{HOME}/up"], check=False).returncode == 0, "it did not start")
        end()
        second.boot()
        second.run(["rm", f"{HOME}/up"])
    assert second.sh(f"cat {HOME}/ends") == "stopped\n"


def test_two_machines_do_not_see_each_other(machine: Machine, second: Machine) -> None:
    second.run(["touch", f"{HOME}/mine"])
    assert machine.run(["test", "-e", f"{HOME}/mine"], check=False).returncode == 1
    second.shutdown()
    assert traces(second.name) == []
    assert machine.run(["systemctl", "--user", "is-active", "default.target"]).stdout == "active\n"


def test_nothing_is_left_of_a_machine_whose_test_failed(machine: Machine) -> None:
    with pytest.raises(ZeroDivisionError), Machine.booted() as own:
        name = own.name
        command = own.popen(["sleep", "1000"])
        raise ZeroDivisionError
    with command:
        assert command.wait(10) != 0
    assert traces(name) == []


CHILD = """
import signal, sys
# A run in the background may have been started with these ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, {folder!r})
from machine import Machine
with Machine.booted() as machine:
    print(machine.name, flush=True)
    machine.run(["sleep", "1000"], timeout=1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_of_a_machine_whose_run_was_ended(machine: Machine, number: signal.Signals) -> None:
    script = CHILD.format(folder=os.path.dirname(__file__))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        try:
            assert traces(name) != []
            child.send_signal(number)
            child.wait(30)
        finally:
            child.kill()
    if number is signal.SIGKILL:
        assert traces(name) != [], "nobody could clear it yet"
        with harness._base_locked():
            harness.clear_stale()
    assert traces(name) == []
    assert machine.run(["true"]).returncode == 0, "a machine that is in use is not stale"
