"""The checks of `lfsvc doctor`, from facts to answers, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lfsvc
from lfsvc.client import doctor
from lfsvc.client.accelerators import Device, DeviceFile, Found
from lfsvc.client.doctor import CHECKS, Check, Facts

GIB = 1024**3
UNIT = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "UnitFileState": "enabled",
    "MainPID": "77",
    "Result": "success",
}
H100 = Found(
    kind="NVIDIA",
    devices=tuple(Device(index=index, name="NVIDIA H100 80GB HBM3", total_mib=81559) for index in range(8)),
    files=("/dev/nvidia0", "/dev/nvidiactl"),
    numbered=8,
)
HEALTHY = Facts(
    user="ml",
    uid=1001,
    journals=("/var/log/journal/x/user-1001.journal",),
    unit=UNIT,
    pid=77,
    status={"version": lfsvc.__version__, "running": [{"id": 3}], "queue_length": 2},
    environment={"PATH": "/opt/lf/bin", "FORCE_TORCHRUN": "1"},
    program="/opt/lf/bin/llamafactory-cli",
    program_version="0.9.3",
    program_here="/opt/lf/bin/llamafactory-cli",
    state_folder=("/home/ml/.local/state/lfsvc", True, 500 * GIB),
    results_folder=("/home/ml/.local/share/lfsvc/eval_results", True, 500 * GIB),
    found=(H100,),
)
CLOSED = DeviceFile(path="/dev/davinci0", uid=1000, gid=1000, group="HwHiAiUser", mode=0o660, opens_here=False)
NPU = Found(kind="Ascend", devices=(), files=("/dev/davinci0",), numbered=1)


def report(facts: Facts) -> dict[str, Check]:
    return {name: check(facts) for name, check in CHECKS.items()}


def test_a_healthy_machine_has_a_tick_for_everything() -> None:
    checks = report(HEALTHY)
    assert {check.state for check in checks.values()} == {"ok"}
    assert checks["accelerators"].text == "8 x NVIDIA H100 80GB HBM3, 80 GiB each"
    assert checks["scheduler"].text == f"lfsvc {lfsvc.__version__} runs (pid 77): 1 running, 2 waiting"
    assert checks["llamafactory-cli"].text == "/opt/lf/bin/llamafactory-cli, version 0.9.3"


def test_a_container_with_lfsvc_serve_has_no_cross_for_what_it_cannot_have() -> None:
    facts = replace(HEALTHY, booted=False, manager=False, linger=False, journals=None, unit={}, activation=False)
    checks = report(facts)
    skipped = {name for name, check in checks.items() if check.state == "skip"}
    assert skipped == {"user manager", "linger", "journal", "unit"}
    assert {check.state for name, check in checks.items() if name not in skipped} == {"ok"}


def test_a_service_started_by_hand_beside_systemd_needs_no_unit() -> None:
    checks = report(replace(HEALTHY, pid=78, unit={}, activation=False, linger=False))
    assert [checks[name].state for name in ("user manager", "linger", "unit", "scheduler")] == ["skip"] * 3 + ["ok"]


@pytest.mark.parametrize(
    ("check", "changes", "state", "text", "fix"),
    [
        ("user manager", {"manager": False}, "bad", "none runs for ml", "sudo loginctl enable-linger ml"),
        ("session bus", {"bus_problem": ("No session bus.", "log in")}, "bad", "No session bus.", "log in"),
        ("session bus", {"booted": False, "bus_problem": ("No", "")}, "skip", "none yet", ""),
        (
            "session bus",
            {"booted": False, "bus_problem": ("No", ""), "dbus_daemon": False},
            "bad",
            "no dbus-daemon",
            "install the package dbus",
        ),
        ("linger", {"linger": False}, "warn", "jobs end when you log out", "sudo loginctl enable-linger ml"),
        ("journal", {"journals": None}, "warn", "not persistent", "/var/log/journal"),
        ("journal", {"journals": ()}, "warn", "yours to read", "usermod -aG systemd-journal ml"),
        ("unit", {"unit": {**UNIT, "LoadState": "not-found"}}, "bad", "is not installed", "lfsvc setup"),
        ("unit", {"activation": False}, "bad", "activation file", "lfsvc setup"),
        ("unit", {"unit": {**UNIT, "UnitFileState": "disabled"}}, "warn", "not start at login", "enable lfsched"),
        ("unit", {"unit": {}, "pid": 0}, "skip", "without a user manager", ""),
        ("scheduler", {"status": {"version": "0.0.9"}}, "bad", "it is lfsvc 0.0.9", "lfsvc setup; jobs go on"),
        ("scheduler", {"status": None, "status_problem": "it does not answer"}, "bad", "does not answer", "lfsvc stop"),
        ("scheduler", {"status": None, "pid": 0}, "warn", "does not run", "lfsvc start"),
        (
            "scheduler",
            {"status": None, "pid": 0, "unit": {**UNIT, "LoadState": "not-found"}},
            "bad",
            "none runs",
            "lfsvc setup",
        ),
        ("scheduler", {"status": None, "pid": 0, "booted": False}, "bad", "none runs", "lfsvc serve"),
        (
            "scheduler",
            {
                "status": None,
                "pid": 0,
                "unit": {
                    **UNIT,
                    "ActiveState": "failed",
                    "StatusText": "Failed: /x: kill_grace must be a number. hint: mend the line",
                },
            },
            "bad",
            "does not start: /x: kill_grace must be a number.",
            "mend the line",
        ),
        (
            "scheduler",
            {"status": None, "pid": 0, "unit": {**UNIT, "ActiveState": "failed", "Result": "exit-code"}},
            "bad",
            "ended as exit-code",
            "journalctl --user",
        ),
        ("config", {"config_problem": ("/x is not valid YAML.", "mend it")}, "bad", "/x is not valid", "mend it"),
        ("llamafactory-cli", {"program": ""}, "bad", "PATH of the jobs (/opt/lf/bin)", "lfsvc setup, in the env"),
        ("llamafactory-cli", {"program": "", "booted": False}, "bad", "PATH of the jobs", "lfsvc serve, in the env"),
        ("llamafactory-cli", {"program_version": ""}, "ok", "version unknown", ""),
        ("this shell", {"program_here": "/other/llamafactory-cli"}, "warn", "/other/llamafactory-cli", "lfsvc setup"),
        ("this shell", {"program_here": ""}, "skip", "needs none", ""),
        ("accelerators", {"found": ()}, "warn", "FORCE_TORCHRUN=1 fails", "NPROC_PER_NODE=1"),
        ("accelerators", {"found": (), "environment": {"NPROC_PER_NODE": "1"}}, "skip", "on the CPU", ""),
        (
            "accelerators",
            {"found": (replace(H100, problem="nvidia-smi has not answered within 5 s"),)},
            "bad",
            "8 x NVIDIA H100 80GB HBM3, 80 GiB each, but nvidia-smi has not answered within 5 s",
            "dmesg",
        ),
        (
            "accelerators",
            {"found": (replace(NPU, devices=(Device(index=0, name="910B4", health="Critical"),)),)},
            "warn",
            "Ascend 0 is Critical",
            "@devices",
        ),
        ("device files", {"found": ()}, "skip", "none", ""),
        ("device files", {"closed": None}, "skip", "while no scheduler runs", ""),
        (
            "device files",
            {"found": (NPU,), "closed": (CLOSED, CLOSED), "own_groups": frozenset({1001, 1000})},
            "bad",
            "may not open /dev/davinci0 and 1 more (group HwHiAiUser, mode 660): it began before ml joined the group",
            "sudo systemctl restart user@1001 (or loginctl terminate-user ml); it ends what runs",
        ),
        (
            "device files",
            {"found": (NPU,), "closed": (CLOSED,), "own_groups": frozenset({1001})},
            "bad",
            "may not open /dev/davinci0",
            "sudo usermod -aG HwHiAiUser ml, then sudo systemctl restart user@1001",
        ),
        (
            "device files",
            {"found": (NPU,), "closed": (replace(CLOSED, gid=0, mode=0o600),)},
            "bad",
            "mode 600",
            "an administrator",
        ),
        ("queue folder", {"state_folder": ("/q", False, 500 * GIB)}, "bad", "/q cannot be written", "set state_dir"),
        ("queue folder", {"state_folder": ("/q", True, GIB)}, "warn", "/q, 1.0 GiB free", "make room"),
        ("queue folder", {"state_folder": ("/q", True, 0)}, "bad", "/q, 0.0 GiB free", "make room"),
        ("results folder", {"results_folder": None}, "bad", "does not answer", "set results_root"),
    ],
)
def test_each_fault_has_its_sentence_and_its_fix(
    check: str, changes: Mapping[str, Any], state: str, text: str, fix: str
) -> None:
    found = CHECKS[check](replace(HEALTHY, **changes))
    assert found.state == state
    assert text in found.text
    assert fix in found.fix
    assert bool(found.fix) == (state in ("warn", "bad"))


def test_facts_are_gathered_on_any_machine_and_every_check_answers() -> None:
    checks = report(doctor.gather())
    assert all(check.state in doctor.MARKS and check.text for check in checks.values())


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    path, writable, free = doctor.look_into(str(tmp_path / "a" / "b"))
    assert (path, writable) == (str(tmp_path / "a" / "b"), True) and free > 0
    (tmp_path / "file").touch()
    assert doctor.look_into(str(tmp_path / "file" / "b"))[1] is False


def test_a_journal_is_readable_by_its_files(tmp_path: Path) -> None:
    assert doctor.readable_journals(1001, str(tmp_path / "none")) is None
    machine = tmp_path / "0123"
    machine.mkdir()
    (machine / "user-1000.journal").touch()
    assert doctor.readable_journals(1001, str(tmp_path)) == ()
    (machine / "user-1001.journal").touch()
    assert doctor.readable_journals(1001, str(tmp_path)) == (str(machine / "user-1001.journal"),)


CHECKED = {
    "linger": Check("ok", "jobs go on"),
    "unit": Check("warn", "not at login", "enable it"),
    "config": Check("bad", "kill_grace: soon", "mend the line"),
    "this shell": Check("skip", "none"),
}


def test_the_report_is_aligned_with_a_mark_for_each_line() -> None:
    assert "\n".join(doctor.lines(CHECKED, ascii_only=False, colour=False)) == (
        "✓ linger      jobs go on\n"
        "! unit        not at login\n"
        "              fix: enable it\n"
        "✗ config      kill_grace: soon\n"
        "              fix: mend the line\n"
        "\u2013 this shell  none\n"
        "1 broken, 1 to look at"
    )


def test_the_report_is_ascii_where_it_must_and_coloured_where_it_may() -> None:
    plain = list(doctor.lines(CHECKED, ascii_only=True, colour=False))
    assert [line[0] for line in plain if line[0] != " "] == ["+", "!", "x", "-", "1"]
    coloured = list(doctor.lines(CHECKED, ascii_only=True, colour=True))
    assert coloured[0] == "\x1b[32m+\x1b[0m linger      jobs go on"
    healthy = list(doctor.lines({"linger": CHECKED["linger"]}, ascii_only=True, colour=False))
    assert healthy[-1] == "nothing broken, nothing to look at"
