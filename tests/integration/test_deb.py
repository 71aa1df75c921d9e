"""The Debian package: built here, and all that a user of the test machine has."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import HOME, Machine, wait_until, why_not

ROOT = Path(__file__).parent.parent.parent
PACKAGES = "/opt/packages"
SERVICE = ["org.lfsvc1", "/org/lfsvc1", "org.lfsvc1.Scheduler"]
COMPLETION = "/usr/share/bash-completion/completions/lfsvc"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def download(package: str, folder: Path) -> None:
    """Download what a package needs and this machine, the lower layer of the test machine, has not."""
    (folder / "partial").mkdir()
    settings = (f"Dir::Cache::archives={folder}", "APT::Sandbox::User=root", "Debug::NoLocking=1")
    command = ["apt-get", *(f"-o{setting}" for setting in settings), "install", "-y", "--no-install-recommends"]
    command += ["--download-only", package]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        # A machine that was made from an image has no lists of packages, or old ones.
        run("apt-get", "-o", "DPkg::Lock::Timeout=300", "update")
        run(*command)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and those that it needs."""
    reason = why_not()
    if reason:
        if os.environ.get("LFSVC_REQUIRE_INTEGRATION") or os.environ.get("CI") == "true":
            pytest.fail(f"the integration tests must run here: {reason}")
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("packages")
    before = run("git", "-c", "safe.directory=*", "-C", str(ROOT), "status", "--porcelain", "--ignored")
    built = run(str(ROOT / "packaging/build-deb.sh"), str(folder)).strip()
    assert built == str(next(folder.glob("*.deb")))
    assert run("git", "-c", "safe.directory=*", "-C", str(ROOT), "status", "--porcelain", "--ignored") == before
    download(built, folder)
    return folder


@pytest.fixture(scope="module")
def machine(packages: Path) -> Iterator[Machine]:
    """A machine where the package was installed, with a user who has done nothing else."""
    with Machine.booted({PACKAGES: str(packages)}) as machine:
        install(machine)
        yield machine


def install(machine: Machine) -> None:
    # Images for containers leave manual pages out.
    script = f"dpkg --path-include='/usr/share/man/*' -i {PACKAGES}/*.deb"
    machine.run(["bash", "-c", script], user="root", env={"DEBIAN_FRONTEND": "noninteractive"}, timeout=120)


def submit(machine: Machine, script: str, *options: str) -> str:
    path = machine.write(f"{HOME}/x.sh", script)
    return machine.run(["lfsvc", "submit", *options, path]).stdout


def pid(machine: Machine) -> str:
    return machine.sh("systemctl --user show --property=MainPID --value lfsched").strip()


def test_the_service_starts_and_a_job_runs_with_nothing_else_done(machine: Machine) -> None:
    assert machine.run(["sh", "-c", "command -v lfsvc"]).stdout == "/usr/bin/lfsvc\n"
    machine.run(["systemctl", "--user", "start", "lfsched"])
    machine.run(["lfsvc", "submit", "--wait", machine.write(f"{HOME}/x.sh", "touch ~/done\n")])
    machine.run(["test", "-e", f"{HOME}/done"])
    unit = machine.sh("systemctl --user show --property=FragmentPath --value lfsched").strip()
    assert unit == "/usr/lib/systemd/user/lfsched.service"
    machine.run(["sh", "-c", "! test -e ~/.config/systemd/user/lfsched.service"])


def test_it_does_not_start_for_users_who_have_no_jobs(machine: Machine) -> None:
    assert machine.run(["systemctl", "--user", "is-enabled", "lfsched"], check=False).stdout == "disabled\n"


def test_a_call_starts_the_service_by_activation(machine: Machine) -> None:
    machine.run(["systemctl", "--user", "stop", "lfsched"])
    assert machine.run(["busctl", "--user", "get-property", *SERVICE, "Version"]).stdout.startswith('s "')


def test_the_journal_explains_each_event(machine: Machine) -> None:
    listed = machine.run(["journalctl", "--list-catalog"]).stdout
    assert len(re.findall(r"^[0-9a-f]{32} lfsvc: Job ", listed, re.M)) == len(
        re.findall(r"^-- ", (ROOT / "packaging/systemd/lfsvc.catalog").read_text(), re.M)
    )
    job = json.loads(submit(machine, "exit 7\n", "--json"))[0]["id"]
    assert machine.run(["lfsvc", "wait", str(job)], check=False).returncode == 7

    def text() -> str:
        return machine.run(["journalctl", "--user", "-x", "--no-pager", "-u", "lfsched", f"JOB_ID={job}"]).stdout

    wait_until(lambda: f'"lfsvc show {job}" says which step it was' in text(), text)
    assert f"A step of the job {HOME}/x.sh did not succeed." in text()


def test_the_manual_page_is_found(machine: Machine) -> None:
    page = machine.run(["man", "--warnings", "-E", "UTF-8", "lfsvc"], env={"MANWIDTH": "100"})
    assert page.stderr == ""
    text = re.sub(".\b", "", page.stdout)
    for part in ("lfsvc - a job queue for LLaMA-Factory", "--no-requeue", "train:run.yaml@0,1,2,3", "EXIT STATUS"):
        assert part in text


def test_bash_completes_commands_options_and_tasks(machine: Machine) -> None:
    machine.sh(f"mkdir -p {HOME}/c/folder; cd {HOME}/c; touch run.yaml run.sh run.txt")

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = (
            f"cd {HOME}/c; . {COMPLETION}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1));"
            "$(complete -p lfsvc | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        # As on the terminal, each once.
        return sorted(set(machine.sh(script).split()))

    assert completed("lfsvc", "su") == ["submit"]
    assert completed("lfsvc", "ki") == ["kill"]
    assert completed("lfsvc", "serve", "--launcher", "p") == ["process"]
    assert completed("lfsvc", "submit", "--req") == ["--requeue"]
    assert completed("lfsvc", "submit", "") == ["folder", "run.sh", "run.yaml"]
    assert completed("lfsvc", "submit", "run.sh", "r") == ["run.sh", "run.yaml"]
    # bash takes a colon for a word.
    assert completed("lfsvc", "submit", "train", ":") == ["folder", "run.sh", "run.yaml"]
    assert completed("lfsvc", "submit", "train", ":", "run.y") == ["run.yaml"]
    assert completed("lfsvc", "list", "--state", "succ") == ["succeeded"]
    assert completed("lfsvc", "results", "-o", "run.t") == ["run.txt"]


def test_the_pythonpath_of_a_toolkit_does_not_reach_it(machine: Machine) -> None:
    for module in ("jeepney", "dbus_next", "yaml", "lfsvc"):
        machine.write(f"{HOME}/toolkit/{module}.py", "raise SystemExit('a module of the toolkit')\n")
    machine.run(["systemctl", "--user", "stop", "lfsched"])
    machine.run(["systemctl", "--user", "set-environment", f"PYTHONPATH={HOME}/toolkit"])
    try:
        machine.run(["lfsvc", "status"], env={"PYTHONPATH": f"{HOME}/toolkit"})
    finally:
        machine.run(["systemctl", "--user", "unset-environment", "PYTHONPATH"])


def test_setup_leaves_the_units_to_the_package(machine: Machine) -> None:
    done = machine.run(["lfsvc", "setup", "--no-linger"])
    assert done.stdout.startswith("the unit is the package's: /usr/lib/systemd/user/lfsched.service\n")
    assert machine.sh(f"ls {HOME}/.config/systemd/user/lfsched.service {HOME}/.local/share/dbus-1; true") == ""
    assert "ExecStart={ path=/usr/bin/python3" in machine.sh("systemctl --user show -p ExecStart lfsched")


def test_an_upgrade_restarts_the_scheduler_and_not_the_job(machine: Machine) -> None:
    script = f"touch {HOME}/up; while ! [ -e {HOME}/go ]; do sleep 0.1; done\n"
    job = json.loads(submit(machine, script, "--json"))[0]["id"]
    wait_until(lambda: machine.run(["test", "-e", f"{HOME}/up"], check=False).returncode == 0, "no start")
    before = pid(machine)
    install(machine)
    assert pid(machine) not in ("0", before)
    assert json.loads(machine.run(["lfsvc", "show", "--json", str(job)]).stdout)["state"] == "running"
    machine.run(["touch", f"{HOME}/go"])
    machine.run(["lfsvc", "wait", str(job)])


def test_a_removal_leaves_queue_and_job_and_a_new_installation_takes_them_up(machine: Machine) -> None:
    machine.run(["rm", "-f", f"{HOME}/up", f"{HOME}/go"])
    script = f"touch {HOME}/up; while ! [ -e {HOME}/go ]; do sleep 0.1; done\n"
    job = json.loads(submit(machine, script, "--json"))[0]["id"]
    wait_until(lambda: machine.run(["test", "-e", f"{HOME}/up"], check=False).returncode == 0, "no start")
    machine.run(["dpkg", "--purge", "lfsvc"], user="root")
    unit = machine.sh("systemctl --user show --property=LoadState --property=ActiveState lfsched")
    assert unit.split() == ["LoadState=not-found", "ActiveState=inactive"]
    machine.run(["sh", "-c", "! test -e /usr/lib/python3/dist-packages/lfsvc"])
    assert machine.sh(f"systemctl --user is-active lfsvc-job-{job}") == "active\n"
    # It ends with neither package nor scheduler there.
    machine.run(["touch", f"{HOME}/go"])
    wait_until(
        lambda: machine.run(["systemctl", "--user", "is-active", f"lfsvc-job-{job}"], check=False).returncode != 0,
        "the job runs",
    )
    install(machine)
    assert json.loads(machine.run(["lfsvc", "show", "--json", str(job)]).stdout)["state"] == "succeeded"
