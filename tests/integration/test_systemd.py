"""What only a real systemd, dbus-daemon and journald show. As an unprivileged user, in a booted system."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import HOME, Machine, wait_until
from scheduler import STANDIN_PATH, Scheduler

W = f"{HOME}/work"
CALL = ["busctl", "--user", "call", "org.lfsvc1", "/org/lfsvc1", "org.lfsvc1.Scheduler"]


@pytest.fixture
def scheduler(user: Machine) -> Iterator[Scheduler]:
    yield Scheduler(user, "systemd")


def yaml(machine: Machine, name: str = "x", extra: str = "") -> str:
    return machine.write(f"{W}/{name}.yaml", f"do_train: true\noutput_dir: {W}/out-{name}\n{extra}")


def journal(machine: Machine, job_id: int) -> list[str]:
    """What `journalctl --user -u lfsched JOB_ID=…` shows of a job that has ended, once its end is in."""

    def text() -> str:
        return machine.sh(
            f"journalctl --user -u lfsched JOB_ID={job_id} -o cat --no-pager --since=@{machine.begin}; true"
        )

    wait_until(lambda: re.search(rf"^Job {job_id} (succeeded|failed|killed|interrupted)", text(), re.M), text)
    return text().splitlines()


# -- the service -------------------------------------------------------------------------------------


def test_systemctl_starts_it_and_status_tells_what_it_does(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    machine.run(["systemctl", "--user", "restart", "lfsched"])
    assert "Idle; 0 waiting" in machine.sh("systemctl --user status lfsched")
    job = scheduler.script("long", f"touch {W}/up; sleep 98760")
    scheduler.script("next", "true")
    scheduler.wait_for_file(f"{W}/up")
    assert f"job {job} shell long.sh; 1 waiting" in machine.sh("systemctl --user status lfsched")


def test_a_call_starts_the_service_by_activation(scheduler: Scheduler) -> None:
    scheduler.stop()
    answer = scheduler.machine.run(["busctl", "--user", "get-property", *CALL[3:], "Version"])
    assert answer.stdout.startswith('s "')


def test_the_client_starts_it_and_says_at_once_why_it_cannot(scheduler: Scheduler) -> None:
    scheduler.stop()
    assert scheduler.cli("status").stdout.startswith("lfsvc ")
    scheduler.stop()
    path = scheduler.machine.write(f"{HOME}/.config/lfsvc/config.yaml", "kill_grace: soon\n")
    begin = time.monotonic()
    failed = scheduler.cli("status", check=False)
    assert time.monotonic() - begin < 10
    assert failed.returncode == 3
    assert failed.stderr == (
        f"lfsvc: The scheduler does not start: {path}: kill_grace must be a number of seconds from 0 to 3600, "
        "not 'soon'.\nhint: mend the line\n"
    )
    scheduler.machine.run(["rm", f"{HOME}/.config/systemd/user/lfsched.service"])
    scheduler.machine.run(["systemctl", "--user", "daemon-reload"])
    failed = scheduler.cli("submit", yaml(scheduler.machine), check=False)
    assert failed.returncode == 3
    assert "lfsched.service is not installed" in failed.stderr and "lfsvc setup" in failed.stderr


def test_a_reload_reads_the_config_and_keeps_the_old_one_where_it_does_not_hold(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    machine.write(f"{HOME}/.config/lfsvc/config.yaml", "kill_grace: 7\nunknown: 1\n")
    machine.run(["systemctl", "--user", "reload", "lfsched"])
    seen = "journalctl --user -u lfsched -o cat --no-pager"
    wait_until(lambda: "the key 'unknown' is unknown" in machine.sh(seen), lambda: machine.sh(seen))
    assert scheduler.cli("status").returncode == 0


def test_a_hung_service_is_restarted_by_the_watchdog_and_its_job_goes_on(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    machine.write(f"{HOME}/.config/systemd/user/lfsched.service.d/fast.conf", "[Service]\nWatchdogSec=2\n")
    machine.run(["systemctl", "--user", "daemon-reload"])
    machine.run(["systemctl", "--user", "restart", "lfsched"])
    job = scheduler.script("long", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    scheduler.wait_for_file(f"{W}/up")
    pid = scheduler.pid()
    machine.run(["kill", "-STOP", str(pid)])
    wait_until(lambda: scheduler.pid() not in (0, pid), "the hung service still holds the lock", 30)
    machine.run(["touch", f"{W}/go"])
    assert scheduler.wait(job)["state"] == "succeeded"


def test_a_restart_of_the_service_is_nothing_to_a_job(scheduler: Scheduler) -> None:
    job = scheduler.script("long", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done; echo end")
    scheduler.wait_for_file(f"{W}/up")
    scheduler.machine.run(["systemctl", "--user", "restart", "lfsched"])
    scheduler.machine.run(["touch", f"{W}/go"])
    ended = scheduler.wait(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1)


# -- the bus -----------------------------------------------------------------------------------------


def test_busctl_and_gdbus_submit_and_see_the_signals(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    path = yaml(machine)
    machine.sh("lfsvc status")
    gdbus = machine.popen(
        ["stdbuf", "-oL", "gdbus", "monitor", "--session", "--dest", "org.lfsvc1", "--object-path", "/org/lfsvc1"]
    )
    assert gdbus.stdout is not None
    while "is owned by" not in gdbus.stdout.readline():
        pass
    assert machine.run([*CALL, "Submit", "s", f"{path}@0,1#no_eval"], timeout=30).stdout == "t 1\n"
    target = ["--dest", "org.lfsvc1", "--object-path", "/org/lfsvc1", "--method", "org.lfsvc1.Scheduler.Submit"]
    assert machine.run(["gdbus", "call", "--session", *target, path]).stdout == "(uint64 2,)\n"
    scheduler.wait(2)
    seen = ""
    while "JobFinished (uint64 2, 'succeeded', 0)" not in seen:
        line = gdbus.stdout.readline()
        assert line, seen
        seen += line
    machine.run(["pkill", "-x", "gdbus"])
    gdbus.communicate()
    for expected in (
        f"JobQueued (uint64 1, '{path}@0,1#no_eval')", f"JobStarted (uint64 1, '{path}@0,1#no_eval')",
        "JobFinished (uint64 1, 'succeeded', 0)", "'QueueLength': <uint32 1>", "'RunningJobs': <[uint64 1]>",
    ):  # fmt: skip
        assert expected in seen
    log = scheduler.log(1)
    for line in ("CUDA_VISIBLE_DEVICES=0,1", "ASCEND_RT_VISIBLE_DEVICES=0,1", "CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        assert f"[INFO] {line}\n" in log


def test_an_end_that_was_missed_is_signalled_by_the_next_service(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    job = scheduler.script("missed", f"while [ ! -e {W}/go ]; do sleep 0.1; done; exit 3")
    wait_until(lambda: scheduler.job(job)["state"] == "running", "not started")
    scheduler.stop()
    machine.run(["touch", f"{W}/go"])
    unit = ["systemctl", "--user", "is-active", f"lfsvc-job-{job}"]
    wait_until(lambda: machine.run(unit, check=False).returncode != 0, "the job goes on")
    # Not gdbus: its monitor starts what it watches.
    monitor = machine.popen(
        ["stdbuf", "-oL", "dbus-monitor", "--session", "type='signal',interface='org.lfsvc1.Scheduler'"]
    )
    assert monitor.stdout is not None
    while "member=NameLost" not in monitor.stdout.readline():
        pass
    scheduler.start()
    while "member=JobFinished" not in monitor.stdout.readline():
        pass
    assert [monitor.stdout.readline().split()[-1] for _ in range(3)] == [str(job), '"failed"', "3"]
    machine.run(["pkill", "-x", "dbus-monitor"])
    monitor.communicate()


def test_the_introspection_names_every_argument(scheduler: Scheduler) -> None:
    introspect = ["busctl", "--user", "introspect", "--xml-interface", "org.lfsvc1", "/org/lfsvc1"]
    scheduler.cli("status")
    tree = ET.fromstring(scheduler.machine.run(introspect).stdout)
    interface = tree.find("interface[@name='org.lfsvc1.Scheduler']")
    assert interface is not None
    methods = {method.get("name") for method in interface.findall("method")}
    assert methods == {
        "Submit", "SubmitWithOptions", "Check", "CheckWithOptions", "Status", "Kill", "KillJob", "GetJob", "ListJobs"
    }  # fmt: skip
    assert all(argument.get("name") for argument in interface.iter("arg"))
    # The README's reference is the running service's.
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    for method in interface.findall("method"):
        ways = {
            way: ", ".join(f"{a.get('type')} {a.get('name')}" for a in method.findall(f"arg[@direction='{way}']"))
            for way in ("in", "out")
        }
        cells = [f"`{ways['in']}`" if ways["in"] else "", f"→ `{ways['out']}`" if ways["out"] else ""]
        row = f"| `{method.get('name')}` | {' '.join(cell for cell in cells if cell)} |"
        assert row in readme, row
    for signal in interface.findall("signal"):
        text = ", ".join(f"{a.get('type')} {a.get('name')}" for a in signal.findall("arg"))
        assert f"`{signal.get('name')}({text})`" in readme
    for found in interface.findall("property"):
        assert f"`{found.get('name')} {found.get('type')}`" in readme
    assert "/org/lfsvc1" in scheduler.machine.run(["busctl", "--user", "tree", "org.lfsvc1"]).stdout


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (["Submit", "s", "/nowhere/x.yaml"], "/nowhere/x.yaml does not exist."),
        (["Submit", "s", "x.yaml"], "The path 'x.yaml' is not absolute."),
        (["Submit", "u", "5"], "Submit takes s task; the call has the signature 'u'."),
        (["SubmitWithOptions", "sa{sv}", "/x.sh", "1", "color", "s", "red"], "The option 'color' is unknown."),
        (["SubmitWithOptions", "sa{sv}", "/x.sh", "1", "name", "u", "1"], "The option 'name' has the D-Bus type 'u'."),
        (["ListJobs", "a{sv}", "1", "state", "as", "1", "asleep"], "The state 'asleep' is unknown."),
        (["GetJob", "t", "77"], "No job 77."),
        (["GetJob", "t", "18446744073709551615"], "No job 18446744073709551615."),
        (["KillJob", "t", "77"], "No job 77."),
        (["Kill"], "No job is running."),
        (["Explode"], "org.lfsvc1.Scheduler has no method Explode"),
    ],
)
def test_a_wrong_call_gets_a_sentence_and_the_service_goes_on(
    scheduler: Scheduler, call: list[str], error: str
) -> None:
    scheduler.cli("status")
    done = scheduler.machine.run([*CALL, *call], check=False)
    assert done.returncode == 1
    assert error in done.stderr and "Traceback" not in done.stderr
    assert scheduler.cli("status").returncode == 0


def test_errors_have_their_names(scheduler: Scheduler) -> None:
    scheduler.cli("status")
    target = ["gdbus", "call", "--session", "--dest", "org.lfsvc1", "--object-path", "/org/lfsvc1", "--method"]
    for method, arguments, name in (
        ("Submit", ["/nowhere.yaml"], "FileNotFound"),
        ("Submit", ["/x.txt"], "InvalidTask"),
        ("KillJob", ["9"], "NoSuchJob"),
        ("Kill", [], "NoRunningJob"),
    ):
        done = scheduler.machine.run([*target, f"org.lfsvc1.Scheduler.{method}", *arguments], check=False)
        assert f"org.lfsvc1.Error.{name}: " in done.stderr


# -- the journal -------------------------------------------------------------------------------------


def test_the_journal_shows_a_job_from_submission_to_end_with_every_line(scheduler: Scheduler) -> None:
    job = scheduler.script("talk", "for i in $(seq 500); do echo line $i; done; printf 'no end'")
    scheduler.wait(job)
    lines = journal(scheduler.machine, job)
    assert lines[0] == f"Job {job} queued: {W}/talk.sh"
    assert lines[1] == f"Job {job} started: shell talk.sh" or lines[1].startswith("line ")
    printed = [line for line in lines if not line.startswith("Job ")]
    assert printed == [f"line {number}" for number in range(1, 501)] + ["no end"]
    assert lines[-1] == f"Job {job} succeeded"
    fields = json.loads(scheduler.machine.sh(f"journalctl --user -u lfsched JOB_ID={job} JOB_STEP=shell -o json -n 1"))
    assert fields["JOB_COMMAND"] == "shell" and fields["JOB_TASK"] == f"{W}/talk.sh"
    assert fields["JOB_LOG"] == scheduler.job(job)["log"]
    assert fields["SYSLOG_IDENTIFIER"] == "lfsvc-job" and fields["USER_UNIT"] == "lfsched.service"


def test_a_chatty_job_is_whole_in_its_file_and_within_the_limit_in_the_journal(scheduler: Scheduler) -> None:
    job = scheduler.script("chatty", "seq 100000")
    log = scheduler.wait(job)["log"]
    assert scheduler.machine.sh(f"wc -l <{log}").strip() == "100000"
    printed = [line for line in journal(scheduler.machine, job) if not line.startswith("Job ")]
    sent = [line for line in printed if line.isdigit()]
    # 8,000, or what a busy machine's journald took in the 150 ms after the job's end.
    assert 1000 < len(sent) <= 8000
    assert sent == [str(number) for number in range(1, len(sent) + 1)]
    assert printed[-1] == f"… {100_000 - len(sent):,} lines only in the log file"
    # What the next job within the same half minute may send is what this one left.
    after = scheduler.script("after", "seq 10000")
    scheduler.wait(after)
    more = [line for line in journal(scheduler.machine, after) if line.isdigit()]
    assert len(sent) + len(more) <= 8000


def test_a_stopped_journald_neither_slows_nor_stops_a_job(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    pid = machine.sh("pgrep -x systemd-journal").strip()
    machine.run(["kill", "-STOP", pid], user="root")
    try:
        begin = time.monotonic()
        job = scheduler.script("talk", "seq 20000")
        ended = scheduler.wait(job)
        assert time.monotonic() - begin < 10
        assert machine.sh(f"wc -l <{ended['log']}").strip() == "20000"
    finally:
        machine.run(["kill", "-CONT", pid], user="root")
    assert ended["state"] == "succeeded"
    assert any("lines are not in the journal" in warning for warning in ended["warnings"])


def test_a_full_disk_does_not_stop_a_job_and_its_end_is_kept(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    machine.run(["mkdir", "-p", f"{W}/small"])
    machine.run(["mount", "-t", "tmpfs", "-o", "size=256k,uid=1001", "small", f"{W}/small"], user="root")
    try:
        path = machine.write(f"{W}/full.yaml", f"do_train: false\noutput_dir: {W}/small\n")
        scheduler.machine.run(["systemctl", "--user", "stop", "lfsched"])
        machine.write(f"{HOME}/.config/lfsvc/environment", f"PATH={STANDIN_PATH}\n")
        job = scheduler.submit(f"{path}#no_eval", "--env", "STANDIN_LINES=40000", "--env", "STANDIN_EXIT=6")
        ended = scheduler.wait(job)
        assert ended["exit_status"] == 6
        assert any("could not be written to the log: No space left" in warning for warning in ended["warnings"])
    finally:
        machine.run(["umount", f"{W}/small"], user="root")


# -- the unit of a job -------------------------------------------------------------------------------


def test_a_job_is_a_unit_of_its_own_without_ties_or_secrets(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    job = scheduler.script("unit", f"touch {W}/up; sleep 98759", "--env", "TOKEN=secret")
    scheduler.wait_for_file(f"{W}/up")
    text = machine.sh(f"systemctl --user show lfsvc-job-{job}.service")
    properties = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert properties["Description"] == f"lfsvc job {job}: shell unit.sh"
    assert properties["Slice"] == "app-lfsvc.slice" and properties["KillMode"] == "mixed"
    assert properties["TimeoutStopUSec"] == "15s" and properties["OOMPolicy"] == "continue"
    for tie in ("Requires", "BindsTo", "PartOf", "Requisite"):
        assert "lfsched" not in properties.get(tie, "")
    assert "secret" not in text
    modes = machine.sh(f"cd ~/.local/state/lfsvc; stat -c '%a %n' . jobs queue.db jobs/{job} jobs/{job}/spec.json")
    assert modes.split()[::2] == ["700", "700", "600", "700", "600"]


def test_a_unit_that_is_stopped_by_hand_is_a_killed_job_and_says_so(scheduler: Scheduler) -> None:
    job = scheduler.script("hand", f"touch {W}/up; sleep 98758")
    scheduler.wait_for_file(f"{W}/up")
    scheduler.machine.run(["systemctl", "--user", "stop", f"lfsvc-job-{job}.service"])
    ended = scheduler.wait(job)
    assert ended["state"] == "killed" and "stopped by hand" in ended["failure"]


def test_a_daemon_reload_is_nothing_to_a_job(scheduler: Scheduler) -> None:
    job = scheduler.script("long", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    scheduler.wait_for_file(f"{W}/up")
    for _ in range(3):
        scheduler.machine.run(["systemctl", "--user", "daemon-reload"])
    scheduler.machine.run(["systemctl", "--user", "daemon-reexec"])
    assert scheduler.job(job)["state"] == "running"
    scheduler.machine.run(["systemctl", "--user", "restart", "lfsched"])
    assert scheduler.job(job)["state"] == "running"
    scheduler.machine.run(["touch", f"{W}/go"])
    assert scheduler.wait(job)["state"] == "succeeded"


# -- the end of the machine --------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["poweroff", "power_cut", "user_manager"])
def test_the_end_of_the_machine_interrupts_and_a_training_runs_again(scheduler: Scheduler, end: str) -> None:
    machine = scheduler.machine
    training = scheduler.submit(yaml(machine) + "#no_eval", "--env", "STANDIN_SLEEP=3")
    log = f"ls {W}/out-x/llamafactory_train_*.log"
    wait_until(lambda: machine.run(["bash", "-c", log], check=False).returncode == 0, "no log")
    script = scheduler.script("script", f"echo ran >>{W}/ran; while [ ! -e {W}/go ]; do sleep 0.1; done")

    def go_down() -> None:
        if end == "user_manager":
            machine.run(["systemctl", "restart", f"user@{machine.uid}.service"], user="root")
        else:
            getattr(machine, end)()
            machine.boot()

    go_down()
    wait_until(lambda: scheduler.cli("status", check=False).returncode == 0, "no service after the boot")
    # It was running, so it runs again, before the script that waited behind it.
    ended = scheduler.wait(training)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 2), ended
    assert any("was interrupted" in warning for warning in ended["warnings"])
    scheduler.wait_for_file(f"{W}/ran")
    go_down()
    ended = scheduler.wait(script)
    assert ended["state"] == "interrupted", ended
    assert "session ended under this job" in ended["failure"]
    assert machine.sh(f"cat {W}/ran") == "ran\n"


def test_a_logout_is_nothing_to_a_job_with_linger(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    path = machine.write(f"{W}/long.sh", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    # A login session of its own, which is over when su ends; without the address of a bus, as su leaves it.
    machine.run(
        ["su", "-", "ml", "-c", f"env -u DBUS_SESSION_BUS_ADDRESS /opt/lfsvc/bin/lfsvc submit {path}"], user="root"
    )
    scheduler.wait_for_file(f"{W}/up")
    machine.run(["touch", f"{W}/go"])
    assert scheduler.wait(1)["state"] == "succeeded"


# -- the command line --------------------------------------------------------------------------------


def test_acceptance_is_said_at_once(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    first = scheduler.script("first", "sleep 98757")
    path = yaml(machine)
    done = scheduler.cli("submit", "work/x.yaml@0,1,2,3#no_eval")
    assert done.stdout == f"job 2 queued (1 ahead): train {path} on devices 0,1,2,3 (no evaluation)\n"
    bench = machine.write(f"{W}/bench.yaml", f"do_eval: true\noutput_dir: {W}/bench\n")
    done = scheduler.cli("submit", f"eval:{bench}#no_eval")
    assert done.stdout == f"job 3 queued (2 ahead): eval {bench}\n"
    assert done.stderr.startswith("warning: #no_eval on an evaluation has no effect")
    status = scheduler.cli("status").stdout
    assert "1  running  shell  first.sh" in status and "position 2" in status
    assert scheduler.cli("kill").stdout == f"job {first} is being killed: shell {W}/first.sh\n"
    assert scheduler.cli("list", "--state", "killed", "--json").returncode == 0


@pytest.mark.parametrize(
    ("prepare", "task", "status", "sentence"),
    [
        ("", "work/missing.yaml", 2, f"{W}/missing.yaml does not exist."),
        ("mkdir d.yaml", "work/d.yaml", 2, f"{W}/d.yaml is a folder, not a regular file."),
        ("mkfifo f.yaml", "work/f.yaml", 2, f"{W}/f.yaml is a device, FIFO or socket, not a regular file."),
        ("touch u.sh; chmod 0 u.sh", "work/u.sh", 2, f"{W}/u.sh cannot be read: Permission denied."),
        ("echo 'a: [' >b.yaml", "work/b.yaml", 2, f"{W}/b.yaml is not valid YAML: line 2: "),
        ("echo '- a' >l.yaml", "work/l.yaml", 2, f"{W}/l.yaml must be a mapping of `key: value` lines; it is a list."),
        ("touch e.yaml", "work/e.yaml", 2, f"{W}/e.yaml must be a mapping of `key: value` lines; it is empty."),
        ("echo 'a: 1' >n.yaml", "work/n.yaml", 2, f"{W}/n.yaml has no output_dir."),
        ("echo 'output_dir: 5' >n.yaml", "work/n.yaml", 2, f"{W}/n.yaml: output_dir must be a folder, not 5."),
        ("echo 'output_dir: /proc/x' >p.yaml", "work/p.yaml", 2, f"{W}/p.yaml: output_dir /proc/x cannot be made"),
        ("touch file; echo 'output_dir: work/file/x' >q.yaml", "work/q.yaml", 2, f"{W}/file is not a folder"),
        ("", "merge:work/x.yaml", 2, "The prefix merge: is unknown."),
    ],
)
def test_bad_input_gets_one_sentence_and_queues_nothing(
    scheduler: Scheduler, prepare: str, task: str, status: int, sentence: str
) -> None:
    scheduler.machine.sh(f"cd {W}; {prepare}")
    for command in ("submit", "check"):
        done = scheduler.cli(command, task, check=False)
        assert done.returncode == status
        assert sentence in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.startswith("lfsvc: ") and done.stderr.count("\n") <= 2
    assert json.loads(scheduler.cli("list", "--json").stdout) == []


def test_a_missing_llamafactory_is_said_at_submit(scheduler: Scheduler) -> None:
    scheduler.machine.write(f"{HOME}/.config/lfsvc/environment", "PATH=/usr/bin:/bin\n")
    done = scheduler.cli("submit", yaml(scheduler.machine), check=False)
    assert done.returncode == 1
    assert "llamafactory-cli is not on the PATH of the jobs (/usr/bin:/bin)." in done.stderr
    assert scheduler.wait(scheduler.script("still", "true"))["state"] == "succeeded"


def test_a_script_without_execute_permission_or_with_crlf_is_accepted(scheduler: Scheduler) -> None:
    path = scheduler.machine.write(f"{W}/crlf.sh", "true\r\nexit 0\n", mode=0o600)
    done = scheduler.cli("submit", "--wait", path, check=False)
    assert "warning: line 1 ends in CR LF" in done.stderr
    assert scheduler.job(1)["attempts"] == 1


def test_serve_on_a_terminal_prints_the_output_of_the_jobs(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    machine.run(["systemctl", "--user", "stop", "lfsched"])
    alone = Scheduler(machine, "process")
    alone.env["EXPORTED"] = "by the shell"
    serve = machine.popen(["script", "-qec", "lfsvc serve", "/dev/null"], env=alone.env)
    wait_until(lambda: alone.cli("status", check=False).returncode == 0, "no answer")
    assert alone.wait(alone.script("talk", 'echo "exported $EXPORTED"'))["state"] == "succeeded"
    alone.cli("stop")
    printed = serve.communicate(timeout=20)[0].splitlines()
    assert "exported by the shell" in printed and "Job 1 succeeded" in printed


def test_a_working_directory_that_is_gone_is_said(scheduler: Scheduler) -> None:
    for command in ("submit", "check"):
        done = scheduler.machine.run(
            ["bash", "-c", f"mkdir {W}/gone; cd {W}/gone; rmdir {W}/gone; lfsvc {command} x.sh"], check=False
        )
        assert (done.returncode, done.stderr) == (2, "lfsvc: The working directory is gone.\nhint: cd to another\n")


def test_without_a_bus_the_client_says_so(scheduler: Scheduler) -> None:
    nothing = {"XDG_RUNTIME_DIR": f"{W}/none", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nonexistent"}
    done = scheduler.cli("status", check=False, env=nothing)
    assert done.returncode == 3
    assert done.stderr.startswith("lfsvc: No session bus can be reached (unix:path=/nonexistent: No such file")


def test_wrong_use_is_said_with_a_hint(scheduler: Scheduler) -> None:
    for arguments, text in (
        (["sumbit", "x.yaml"], "hint: did you mean: lfsvc submit"),
        (["train:x.yaml"], "hint: did you mean: lfsvc submit train:x.yaml"),
        (["show", "abc"], "'abc' is not the number of a job"),
        (["submit"], "the following arguments are required: TASK"),
        (["submit", "--env", "NOWHERE_SET", "x.sh"], "there is no such variable here"),
    ):
        done = scheduler.cli(*arguments, check=False)
        assert done.returncode == 2 and text in done.stderr.replace("The following", "the following")


def test_setup_can_be_run_again_and_removed(scheduler: Scheduler) -> None:
    job = scheduler.script("long", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    scheduler.wait_for_file(f"{W}/up")
    pid = scheduler.pid()
    done = scheduler.cli("setup", "--no-linger", env={"CANN_HOME": '/usr/local/Ascend $x "y"', "SSH_TTY": "/dev/x"})
    assert "lfsched.service runs" in done.stdout and scheduler.pid() != pid
    environment = scheduler.machine.sh("cat ~/.config/lfsvc/environment; stat -c %a ~/.config/lfsvc/environment")
    assert 'CANN_HOME="/usr/local/Ascend \\$x \\"y\\""' in environment and "SSH_TTY" not in environment
    assert environment.endswith("600\n")
    scheduler.machine.run(["touch", f"{W}/go"])
    ended = scheduler.wait(job)
    assert ended["state"] == "succeeded", ended
    scheduler.cli("setup", "--remove")
    listed = scheduler.machine.sh("systemctl --user list-unit-files lfsched.service --no-legend; true")
    assert listed == ""
    assert scheduler.machine.run(["test", "-e", f"{HOME}/.local/state/lfsvc/queue.db"]).returncode == 0


def test_the_environment_file_is_read_as_systemd_reads_it(scheduler: Scheduler) -> None:
    text = 'A=\'x y\'"z"\nB=two\\\nlines\n# C=3\nD="\\$HOME \\"q\\""\n  E = spaced  \nF=a\'b\n'
    path = scheduler.machine.write(f"{HOME}/.config/lfsvc/environment", text)
    show = "env | grep -E '^[A-F]=' | sort"
    job = scheduler.script("env", show)
    scheduler.wait(job)
    command = f'systemd-run --user --pipe --wait -q -p EnvironmentFile={path} bash -c "{show}"'
    assert scheduler.log(job) == scheduler.machine.sh(command)


def test_the_unit_file_verifies(scheduler: Scheduler) -> None:
    unit = f"{HOME}/.config/systemd/user/lfsched.service"
    done = scheduler.machine.run(["systemd-analyze", "--user", "verify", "--man=no", unit], check=False)
    assert (done.returncode, done.stderr) == (0, "")
