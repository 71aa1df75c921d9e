"""`lfsvc serve` without systemd: in the background, and what it says when it cannot."""

from __future__ import annotations

from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"


def test_detached_it_is_ready_when_the_command_returns_and_outlives_its_terminal(user: Machine) -> None:
    user.run(["systemctl", "--user", "stop", "lfsched"])
    scheduler = Scheduler(user, "process")
    # In a session of its own, with a terminal that is gone afterwards.
    done = user.run(["script", "-qec", "lfsvc serve --detach", "/dev/null"], env=scheduler.env)
    assert "The scheduler runs in the background (pid " in done.stdout and "next: lfsvc submit TASK" in done.stdout
    pid = scheduler.pid()
    assert scheduler.cli("status").stdout.startswith("lfsvc ")
    assert scheduler.wait(scheduler.script("one", "true"))["state"] == "succeeded"
    again = scheduler.cli("serve", "--detach", check=False)
    assert again.returncode == 1
    assert f"A scheduler runs already for {HOME}/.local/state/lfsvc (pid {pid})." in again.stderr
    assert "hint: lfsvc status shows it" in again.stderr and "Traceback" not in again.stderr
    assert "The scheduler is ready" in user.sh(f"cat {HOME}/.local/state/lfsvc/serve.log")
    tty = user.sh(f"ps -o tty= -p {pid}").strip()
    assert tty == "?"
    scheduler.cli("stop")
    wait_until(lambda: user.run(["kill", "-0", str(pid)], check=False).returncode != 0, "still there")


def test_a_config_that_does_not_hold_is_said_at_once(user: Machine) -> None:
    user.run(["systemctl", "--user", "stop", "lfsched"])
    scheduler = Scheduler(user, "process")
    user.write(f"{HOME}/.config/lfsvc/config.yaml", "kill_grace: soon\n")
    for options in ([], ["--detach"]):
        done = scheduler.cli("serve", *options, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(
            f"lfsvc: {HOME}/.config/lfsvc/config.yaml: kill_grace must be a number of seconds"
        )


def test_detached_it_keeps_nothing_of_its_callers(user: Machine) -> None:
    user.run(["systemctl", "--user", "stop", "lfsched"])
    scheduler = Scheduler(user, "process")
    script = f"exec 9>{W}/lock; flock 9; lfsvc serve --detach >/dev/null; exec 9>&-; flock -n {W}/lock true"
    assert user.run(["bash", "-c", script], env=scheduler.env, check=False).returncode == 0
    scheduler.cli("stop")


def test_a_state_folder_that_cannot_be_made_is_a_sentence(user: Machine) -> None:
    scheduler = Scheduler(user, "process")
    user.write(f"{W}/file", "")
    for options in ([], ["--detach"]):
        done = scheduler.cli("serve", *options, check=False, env={"XDG_STATE_HOME": f"{W}/file"})
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith(f"lfsvc: The state folder {W}/file/lfsvc cannot be used: Not a directory.")


def test_a_user_without_a_home_is_told_so(user: Machine) -> None:
    nobody = ["setpriv", "--reuid", "54321", "--clear-groups", "env", "-i", "PATH=/usr/bin:/bin"]
    done = user.run([*nobody, "/opt/lfsvc/bin/lfsvc", "serve", "--detach"], user="root", check=False)
    assert done.returncode == 3
    assert done.stderr == "lfsvc: This user has no home folder.\nhint: set HOME to an absolute path\n"


def test_whoever_reads_the_output_may_leave_and_the_status_is_not_that_of_a_success(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    user.write(f"{W}/say.sh", "echo one; sleep 0.5; echo two; exit 3\n")
    follow = f"lfsvc submit --follow {W}/say.sh | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    assert user.run(["bash", "-c", follow], env=scheduler.env).stdout.strip() == "141"
    closed = user.run(["bash", "-c", f"lfsvc submit {W}/say.sh >&-; echo $?"], env=scheduler.env)
    assert (closed.stdout, closed.stderr) == ("0\n", "")
    full = user.run(["bash", "-c", "lfsvc status >/dev/full; echo $?"], env=scheduler.env)
    assert full.stdout == "1\n" and full.stderr.startswith(
        "lfsvc: The output cannot be written: No space left on device."
    )


def test_a_name_that_the_terminal_cannot_show_is_no_fault(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    path = user.write(f"{W}/训练.sh", "true\n")
    done = scheduler.cli("submit", path, env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout == f"job 1 queued (0 ahead): shell {W}/??.sh\n"
