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
