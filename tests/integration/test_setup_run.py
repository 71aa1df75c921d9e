"""`lfsvc setup` in the layouts, sessions and upgrades in which people run it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import HOME, VENV, Machine, wait_until
from scheduler import STANDIN_PATH, Scheduler

W = f"{HOME}/work"
UNIT = f"{HOME}/.config/systemd/user/lfsched.service"
LONG = f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done"


@pytest.fixture
def scheduler(user: Machine) -> Iterator[Scheduler]:
    yield Scheduler(user, "systemd")


def files(machine: Machine) -> str:
    """Everything that setup could write, with its times."""
    return machine.sh("find ~/.config ~/.local /var/lib/systemd/linger -printf '%p %i %T@ %l\\n' 2>/dev/null | sort")


def runs_a_training(scheduler: Scheduler, program: str) -> None:
    """The jobs run this llamafactory-cli."""
    path = scheduler.machine.write(f"{W}/x.yaml", f"do_train: true\noutput_dir: {W}/out\n")
    job = scheduler.submit(f"{path}#no_eval")
    assert scheduler.wait(job)["state"] == "succeeded"
    status = scheduler.machine.run(["busctl", "--user", "call", "org.lfsvc1", "/org/lfsvc1", "org.lfsvc1.Scheduler",
                                    "Status"])  # fmt: skip
    assert f'"llamafactory_cli" s "{program}"' in status.stdout


def copy_of_standin(machine: Machine, folder: str) -> str:
    machine.run(["mkdir", "-p", folder])
    machine.run(["cp", "/opt/standin/llamafactory-cli", folder])
    return f"{folder}/llamafactory-cli"


def test_setup_says_in_five_lines_what_it_did_and_what_to_type_next(scheduler: Scheduler) -> None:
    done = scheduler.cli("setup", "--no-linger")
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and done.stderr == ""
    assert UNIT in lines[0] and "dbus-1/services/org.lfsvc1.service" in lines[0]
    assert lines[1].startswith(f"wrote {HOME}/.config/lfsvc/environment: ")
    assert lines[2] == "jobs run /opt/standin/llamafactory-cli, and go on after you log out"
    assert lines[3].startswith("lfsched.service runs (lfsvc ") and lines[3].endswith("now and at every login")
    assert lines[4] == "next: lfsvc submit train:/path/to/config.yaml@0,1"


def test_a_dry_run_shows_everything_and_changes_nothing(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    before, pid = files(machine), scheduler.pid()
    done = scheduler.cli("setup", "--dry-run", env={"TOKEN": "secret"})
    assert f"would write {UNIT}:" in done.stdout and f"  ExecStart={VENV}/bin/python" in done.stdout
    assert "TOKEN" in done.stdout and "secret" not in done.stdout
    assert "would restart lfsched.service" in done.stdout
    assert "would remove " + UNIT in scheduler.cli("setup", "--remove", "--dry-run").stdout
    assert (files(machine), scheduler.pid()) == (before, pid)
    scheduler.cli("setup", "--remove")
    before = files(machine)
    assert "would start lfsched.service" in scheduler.cli("setup", "--dry-run").stdout
    assert files(machine) == before


def other_version(wheels: Path, folder: Path, version: str) -> Path:
    """The wheel of this checkout, as another version of itself."""
    (wheel,) = wheels.glob("lfsvc-*.whl")
    now = wheel.name.split("-")[1]
    target = folder / wheel.name.replace(now, version)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(("lfsvc/__init__.py", "METADATA", "RECORD")):
                data = data.replace(now.encode(), version.encode())
            new.writestr(name.replace(f"lfsvc-{now}", f"lfsvc-{version}"), data)
    return target


def test_an_upgrade_restarts_the_service_and_not_the_job(scheduler: Scheduler, tmp_path: Path) -> None:
    machine = scheduler.machine
    wheels = Path(os.environ["LFSVC_WHEELS"])
    upgrade = other_version(wheels, tmp_path, "99.1")
    inside = machine.folder / "m" / "opt" / "upgrade"
    inside.mkdir()
    (inside / upgrade.name).write_bytes(upgrade.read_bytes())
    job = scheduler.script("long", LONG)
    waiting = scheduler.script("next", "true")
    scheduler.wait_for_file(f"{W}/up")
    runner = machine.sh(f"systemctl --user show -P MainPID lfsvc-job-{job}")
    pip = [f"{VENV}/bin/pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"]
    try:
        machine.run([*pip, f"/opt/upgrade/{upgrade.name}"], user="root")
        doctor = scheduler.cli("doctor", check=False)
        assert doctor.returncode == 1 and "and this client 99.1" in doctor.stdout
        done = scheduler.cli("setup", "--no-linger")
        assert "lfsched.service runs (lfsvc 99.1, before " in done.stdout
        assert f"; job {job} goes on\n" in done.stdout
        assert machine.sh(f"systemctl --user show -P MainPID lfsvc-job-{job}") == runner
        machine.run(["touch", f"{W}/go"])
        ended = scheduler.wait(job)
        assert (ended["state"], ended["attempts"]) == ("succeeded", 1)
        assert scheduler.wait(waiting)["state"] == "succeeded"
    finally:
        machine.sh(f"{' '.join(pip)} --find-links /opt/wheels-lfsvc lfsvc", user="root")


# -- layouts -----------------------------------------------------------------------------------------


def test_pipx_lfsvc_is_a_link_and_llamafactory_lies_elsewhere(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    program = copy_of_standin(machine, f"{W}/conda/envs/lf/bin")
    machine.run(["ln", "-s", f"{VENV}/bin/lfsvc", f"{W}/lfsvc"])
    path = f"{W}:{W}/conda/envs/lf/bin:/usr/bin:/bin"
    done = scheduler.cli("setup", "--no-linger", env={"PATH": path, "CONDA_PREFIX": f"{W}/conda/envs/lf"})
    assert f"jobs run {program}" in done.stdout
    assert f"ExecStart={VENV}/bin/python" in machine.sh(f"cat {UNIT}")
    assert f'CONDA_PREFIX="{W}/conda/envs/lf"' in machine.sh("cat ~/.config/lfsvc/environment")
    runs_a_training(scheduler, program)


def test_an_environment_that_is_not_activated_is_used_all_the_same(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    # A prefix with a blank in it, as a conda environment in a folder of that kind.
    prefix = f"{W}/my envs/lf"
    machine.run(["/usr/bin/python3", "-m", "venv", "--without-pip", prefix])
    machine.sh(f"cd '{prefix}'/lib/python3*/site-packages; echo {VENV}/lib/python3*/site-packages >lfsvc.pth")
    program = copy_of_standin(machine, f"{prefix}/bin")
    path = "/usr/bin:/bin"
    done = machine.run([f"{prefix}/bin/python", "-m", "lfsvc", "setup", "--no-linger"], env={"PATH": path})
    # Another one was the jobs' before.
    assert f"warning: {prefix}/bin is not on this shell's PATH" in done.stderr
    assert done.stdout.endswith(f"next: {prefix}/bin/python -m lfsvc submit train:/path/to/config.yaml@0,1\n")
    assert f'ExecStart="{prefix}/bin/python" -I ' in machine.sh(f"cat {UNIT}")
    runs_a_training(scheduler, program)


def test_without_llamafactory_setup_says_so_and_an_upgrade_keeps_the_jobs_environment(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    bare = {"PATH": "/opt/lfsvc/bin:/usr/bin:/bin"}
    before = machine.sh("cat ~/.config/lfsvc/environment")
    done = scheduler.cli("setup", "--no-linger", env=bare)
    assert "warning: this shell has no llamafactory-cli, so the environment of the jobs stays" in done.stderr
    assert machine.sh("cat ~/.config/lfsvc/environment") == before
    machine.run(["rm", f"{HOME}/.config/lfsvc/environment"])
    done = scheduler.cli("setup", "--no-linger", env=bare)
    assert "warning: llamafactory-cli is not on this shell's PATH; activate the environment" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("next: ")


# -- sessions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        # cron: hardly any variable at all.
        f"setpriv --reuid ml --regid ml --init-groups env -i HOME={HOME} LOGNAME=ml PATH={STANDIN_PATH} lfsvc setup",
        f"su - ml -c 'env -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS PATH={STANDIN_PATH} lfsvc setup'",
        # su without -: the runtime folder and the bus are root's.
        "setpriv --reuid ml --regid ml --init-groups env -i XDG_RUNTIME_DIR=/run/user/0"
        f" DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/0/bus HOME={HOME} PATH={STANDIN_PATH} lfsvc setup",
    ],
    ids=["cron", "su_login", "su"],
)
def test_setup_needs_no_session(scheduler: Scheduler, command: str) -> None:
    machine = scheduler.machine
    scheduler.cli("setup", "--remove")
    done = machine.run(["bash", "-c", f"mkdir -p -m 700 /run/user/0; touch /run/user/0/bus; cd /; {command}"],
                       user="root", check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lfsched.service runs" in done.stdout and done.stderr == ""
    assert machine.run(["systemctl", "--user", "is-enabled", "lfsched"]).stdout == "enabled\n"
    assert scheduler.pid()


@pytest.fixture
def without_linger(scheduler: Scheduler) -> Iterator[Scheduler]:
    """A user whose systemd ends with his last session, and who has none now."""
    machine = scheduler.machine
    machine.run(["loginctl", "disable-linger", "ml"], user="root")
    # Up to ten seconds: UserStopDelaySec= of logind.conf(5).
    manager = ["systemctl", "is-active", f"user@{machine.uid}"]
    wait_until(lambda: "inactive" in machine.run(manager, check=False).stdout, "his systemd still runs", 60)
    try:
        yield scheduler
    finally:
        machine.sh("systemctl unmask --runtime polkit; loginctl enable-linger ml", user="root")
        machine._wait_for_user()


def test_where_linger_is_refused_the_command_for_the_administrator_is_given(without_linger: Scheduler) -> None:
    machine = without_linger.machine
    machine.sh("systemctl mask --runtime polkit; systemctl stop polkit", user="root")
    # A login, which ends with the command.
    script = f"export PATH={STANDIN_PATH}; lfsvc setup; lfsvc setup --no-linger >/dev/null; lfsvc doctor >&2"
    done = machine.run(["su", "-", "ml", "-c", script], user="root")
    warning, _, doctor = done.stderr.partition("✓")
    assert warning == (
        "warning: jobs end when you log out; to change that, an administrator runs:\n  sudo loginctl enable-linger ml\n"
    )
    assert "go on after you log out" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("next: ")
    assert "! linger            jobs end when you log out\n" in doctor and "sudo loginctl enable-linger ml" in doctor


def need_polkit(machine: Machine) -> None:
    if "PolicyKit1" not in machine.sh("ls /usr/share/dbus-1/system-services", user="root"):
        pytest.skip("polkit is not installed here")


def test_a_user_whose_systemd_does_not_run_gets_one_with_linger(without_linger: Scheduler) -> None:
    machine = without_linger.machine
    need_polkit(machine)
    done = without_linger.cli("setup", "--no-linger", check=False)
    assert done.returncode == 1
    assert "No systemd runs for ml, so nothing was started.\nhint: log in as ml" in done.stderr
    doctor = without_linger.cli("doctor", check=False)
    assert doctor.returncode == 1 and "✗ user manager      none runs for ml\n" in doctor.stdout
    done = without_linger.cli("setup")
    assert "and go on after you log out" in done.stdout and done.stderr == ""
    assert "lfsched.service runs" in done.stdout
    assert machine.run(["test", "-e", "/var/lib/systemd/linger/ml"], check=False).returncode == 0


def test_a_read_only_config_folder_is_a_sentence(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    config = f"{HOME}/.config"
    machine.sh(f"mount --bind {config} {config}; mount -o remount,bind,ro {config}", user="root")
    try:
        done = scheduler.cli("setup", check=False)
    finally:
        machine.run(["umount", config], user="root")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"lfsvc: {UNIT} cannot be written: Read-only file system.\nhint: mend the permissions of its folder\n"
    )


def test_a_config_home_that_systemd_does_not_know_is_said(scheduler: Scheduler) -> None:
    scheduler.cli("setup", "--remove")
    done = scheduler.cli("setup", check=False, env={"XDG_CONFIG_HOME": f"{W}/config"})
    assert done.returncode == 1
    assert f"Your systemd does not look for units in {W}/config/systemd/user" in done.stderr
    assert "hint: unset XDG_CONFIG_HOME and run this again" in done.stderr


def test_a_machine_without_systemd_is_told_of_serve(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    scheduler.cli("setup", "--remove")
    before = files(machine)
    script = (
        "mount -t tmpfs none /run/systemd; mount -t tmpfs none /run/user; exec setpriv --reuid ml --regid ml"
        f" --init-groups env -i HOME={HOME} PATH={STANDIN_PATH} lfsvc setup"
    )
    done = machine.run(["unshare", "-m", "bash", "-c", script], user="root", check=False)
    assert done.returncode == 1 and "hint: start a scheduler without it: lfsvc serve --detach" in done.stderr
    assert files(machine) == before


def test_remove_leaves_no_file_behind_and_lets_the_job_end(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    job = scheduler.script("long", LONG)
    scheduler.wait_for_file(f"{W}/up")
    scheduler.cli("setup", "--remove")
    left = machine.sh("find ~/.config/systemd ~/.local/share/dbus-1 ! -type d")
    assert left == ""
    machine.run(["touch", f"{W}/go"])
    unit = f"lfsvc-job-{job}.service"
    wait_until(
        lambda: machine.run(["systemctl", "--user", "is-active", unit], check=False).returncode != 0, "it still runs"
    )
    scheduler.cli("setup", "--no-linger")
    assert scheduler.job(job)["state"] == "succeeded"
