"""Notifications of the real service: a notification daemon on the user's bus, an HTTP server, a command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"
CONFIG = f"{HOME}/.config/lfsvc/config.yaml"
TOLD = f"{W}/told"

# Appends each request as a line of JSON; answers 200, and below /gone 404.
SERVER = f"""
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(404 if self.path.startswith("/gone") else 200)
        self.end_headers()
        with open({TOLD!r}, "a") as file:
            print(json.dumps([self.path, body]), file=file)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8085), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@pytest.fixture(params=["systemd", "process"])
def scheduler(user: Machine, request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    # `lfsvc setup` has started it, under another config.
    user.run(["systemctl", "--user", "stop", "lfsched"])
    scheduler = Scheduler(user, request.param)
    yield scheduler
    scheduler.stop()


@pytest.fixture
def server(user: Machine) -> Iterator[None]:
    path = user.write(f"{HOME}/server.py", SERVER)
    process = user.popen([user.python, path])
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.terminate()


def configure(machine: Machine, text: str) -> None:
    machine.write(CONFIG, text)


def told(machine: Machine) -> list[tuple[str, dict[str, Any]]]:
    return [json.loads(line) for line in machine.sh(f"cat {TOLD} 2>/dev/null; true").splitlines()]


def titles(machine: Machine) -> list[str]:
    return [body["title"] for _, body in told(machine)]


def journal(machine: Machine) -> str:
    return machine.sh(f"journalctl --user -u lfsched -o cat --no-pager --since=@{machine.begin}; true")


def test_a_server_is_told_how_jobs_end_and_that_the_queue_is_empty(scheduler: Scheduler, server: None) -> None:
    machine = scheduler.machine
    configure(
        machine,
        "notify:\n"
        "  - webhook: http://127.0.0.1:8085/hook\n    on: [failed, succeeded, killed, queue_empty]\n"
        f"  - command: [/bin/sh, -c, 'cat >{W}/job.json; echo no such user; exit 3']\n    on: failed\n",
    )
    scheduler.start()
    good = scheduler.script("good", "sleep 1")
    bad = scheduler.script("千问", "exit 7")
    scheduler.wait(bad)
    wait_until(lambda: any("queue is empty" in title for title in titles(machine)), lambda: told(machine))
    assert titles(machine) == [
        f"✓ job {good} shell good.sh succeeded",
        f"✗ job {bad} shell 千问.sh failed",
        "○ the queue is empty: 1 succeeded, 1 failed",
    ]
    assert told(machine)[1][1]["job"]["exit_status"] == 7
    scheduler.wait_for_file(f"{W}/job.json")
    if scheduler.mode == "systemd":
        # Without systemd it is said where `lfsvc serve` runs. In either mode all children are reaped by
        # the process launcher, and the exit status is the command's own all the same.
        line = f"Entry 2 of notify (command /bin/sh) was not told '✗ job {bad} shell 千问.sh failed': "
        wait_until(
            lambda: f"{line}it ended with exit status 3: no such user" in journal(machine), lambda: journal(machine)
        )
    assert json.loads(machine.sh(f"cat {W}/job.json"))["finished_at"].endswith("Z")


def test_a_command_outlives_the_end_of_the_next_job(scheduler: Scheduler) -> None:
    """The process launcher ends what it takes for a job's orphan."""
    machine = scheduler.machine
    configure(
        machine,
        f"notify:\n  - command: [/bin/sh, -c, ': >{W}/begun; cat {W}/go; : >{W}/done']\n    on: failed\n",
    )
    machine.run(["mkfifo", f"{W}/go"])
    scheduler.start()
    scheduler.script("bad", "exit 1")
    scheduler.wait_for_file(f"{W}/begun")
    assert scheduler.wait(scheduler.script("next", "sleep 0.2 & exit 0"))["state"] == "succeeded"
    machine.sh(f": >{W}/go")
    scheduler.wait_for_file(f"{W}/done")


@pytest.mark.parametrize("scheduler", ["systemd"], indirect=True)
def test_a_reload_changes_whom_to_tell_and_shows_no_secret(scheduler: Scheduler, server: None) -> None:
    machine = scheduler.machine
    configure(machine, "notify:\n  - webhook: http://127.0.0.1:8085/gone/0123456789\n    on: failed\n")
    scheduler.start()
    scheduler.wait(scheduler.script("one", "exit 1"))
    wait_until(lambda: "HTTP 404" in journal(machine), lambda: journal(machine))
    configure(machine, "notify:\n  - webhook: http://127.0.0.1:8085/new/0123456789\n    on: failed\n")
    machine.run(["systemctl", "--user", "reload", "lfsched"])
    wait_until(lambda: "The config was read again" in journal(machine), lambda: journal(machine))
    scheduler.wait(scheduler.script("two", "exit 1"))
    wait_until(lambda: len(told(machine)) == 2, lambda: told(machine))
    assert [path for path, _ in told(machine)] == ["/gone/0123456789", "/new/0123456789"]
    configure(machine, "notify:\n  - webhook: http://127.0.0.1:8085/0123456789\n    secret: 0123456789\n")
    machine.run(["systemctl", "--user", "reload", "lfsched"])
    clause = f"{CONFIG}: notify: entry 1: the key 'secret' is unknown; a json webhook has webhook, on, preset, token."
    wait_until(lambda: clause in journal(machine), lambda: journal(machine))
    assert "0123456789" not in journal(machine)
    assert "webhook at 127.0.0.1" in journal(machine)


@pytest.mark.parametrize("scheduler", ["systemd"], indirect=True)
def test_a_stop_does_not_wait_for_a_server_that_is_down(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    configure(machine, "notify:\n  - webhook: http://127.0.0.1:8086/\n    on: failed\n")
    scheduler.start()
    job = scheduler.script("bad", "exit 1")
    scheduler.wait(job)
    machine.run(["systemctl", "--user", "stop", "lfsched"])
    text = (
        "Entry 1 of notify (json webhook at 127.0.0.1) was not told '✗ job 1 shell bad.sh failed': the scheduler stops"
    )
    wait_until(lambda: text in journal(machine), lambda: journal(machine))
    assert machine.sh("systemctl --user show -p Result --value lfsched").strip() == "success"


@pytest.mark.parametrize("scheduler", ["systemd"], indirect=True)
def test_systemd_run_gives_a_command_what_the_service_may_not(scheduler: Scheduler) -> None:
    """As the documentation says: a mailer that needs its set-group-id bit, and a life of its own."""
    machine = scheduler.machine
    script = f"grep NoNewPrivs /proc/self/status >{W}/free; cat >{W}/json; echo $LFSVC_JOB_ID >{W}/id"
    configure(
        machine,
        "notify:\n"
        f"  - command: [/bin/sh, -c, 'grep NoNewPrivs /proc/self/status >{W}/bound']\n    on: failed\n"
        "  - command: [systemd-run, --user, --quiet, --collect, --pipe, --wait, -E, LFSVC_JOB_ID, /bin/sh, -c,"
        f" '{script.replace('$', '$$')}']\n    on: failed\n",
    )
    scheduler.start()
    job = scheduler.script("bad", "exit 1")
    wait_until(lambda: machine.sh(f"cat {W}/id 2>/dev/null; true").strip(), lambda: journal(machine))
    assert machine.sh(f"cat {W}/bound {W}/free {W}/id").split() == ["NoNewPrivs:", "1", "NoNewPrivs:", "0", str(job)]
    assert json.loads(machine.sh(f"cat {W}/json"))["id"] == job


# -- the desktop -------------------------------------------------------------------------------------


@pytest.fixture
def dunst(user: Machine) -> Iterator[None]:
    """A real notification daemon, on a screen in memory."""
    screen = user.popen(["Xvfb", "-displayfd", "1", "-screen", "0", "640x480x8", "-nolisten", "tcp"])
    with screen:
        assert screen.stdout is not None
        number = ""
        while not number.isdigit():
            # Complaints about the keyboard come by the same pipe.
            number = screen.stdout.readline().strip()
        daemon = user.popen(["dunst"], env={"DISPLAY": f":{number}"})
        with daemon:
            wait_until(lambda: history(user, check=False) is not None, "dunst does not answer")
            yield
            daemon.terminate()
        screen.terminate()


def history(machine: Machine, *, check: bool = True) -> list[dict[str, Any]] | None:
    """What dunst has shown, newest first; None where it does not answer."""
    done = machine.run(["dunstctl", "history"], check=False)
    if done.returncode != 0:
        assert not check, done.stderr
        return None
    (shown,) = json.loads(done.stdout)["data"]
    return [{key: value["data"] for key, value in one.items()} for one in shown]


def shown(machine: Machine) -> list[dict[str, Any]]:
    """What dunst shows or has shown."""
    machine.run(["dunstctl", "close-all"])
    return history(machine) or []


@pytest.mark.parametrize("scheduler", ["systemd"], indirect=True)
def test_the_desktop_shows_it(scheduler: Scheduler, dunst: None) -> None:
    machine = scheduler.machine
    configure(machine, "notify:\n  - desktop: true\n    on: failed\n")
    scheduler.start()
    job = scheduler.script("a<b>&千问", "exit 7")
    scheduler.wait(job)
    wait_until(lambda: shown(machine), lambda: journal(machine))
    (one,) = shown(machine)
    assert one["appname"] == "lfsvc" and one["summary"] == f"✗ job {job} shell a<b>&千问.sh failed"
    assert "\nran " in one["body"] and f"\nlog: {HOME}/.local/state/lfsvc/jobs/" in one["body"]
    # A critical one stays until somebody has seen it.
    assert one["timeout"] == 0
    done = scheduler.cli("notify", "test")
    assert done.stdout == "✓ 1 desktop\n"
    wait_until(lambda: len(shown(machine)) == 2, lambda: history(machine))
    assert shown(machine)[0]["summary"] == "lfsvc: a test message"


@pytest.mark.parametrize("scheduler", ["systemd"], indirect=True)
def test_without_a_daemon_it_is_said_once_and_nobody_is_activated(scheduler: Scheduler) -> None:
    machine = scheduler.machine
    configure(machine, "notify:\n  - desktop: true\n    on: [failed, queue_empty]\n")
    scheduler.start()
    for _ in range(2):
        scheduler.wait(scheduler.script("bad", "exit 1"))
    machine.run(["systemctl", "--user", "stop", "lfsched"])
    line = "Entry 1 of notify (desktop): no notification daemon is on the session bus"
    wait_until(lambda: line in journal(machine), lambda: journal(machine))
    assert journal(machine).count(line) == 1
    assert machine.sh("systemctl --user show -p ExecMainStartTimestamp --value dunst.service").strip() == ""


# -- lfsvc notify test -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["systemd"], indirect=True)
def test_notify_test_tries_each_target_and_says_why_one_failed(scheduler: Scheduler, server: None) -> None:
    machine = scheduler.machine
    done = scheduler.cli("notify", "test", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"lfsvc: {CONFIG} has no `notify:`.\nhint: for instance:\n    notify:\n")
    configure(
        machine,
        "notify:\n"
        "  - webhook: http://127.0.0.1:8085/topic\n    preset: ntfy\n"
        "  - webhook: http://127.0.0.1:8085/gone/0123456789\n    preset: slack\n"
        "  - desktop: true\n"
        f"  - command: [/bin/sh, -c, 'echo \"$LFSVC_TITLE\" >{W}/title']\n"
        "  - command: [/nowhere]\n",
    )
    done = scheduler.cli("notify", "test", check=False)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "✓ 1 ntfy webhook at 127.0.0.1",
        "✗ 2 slack webhook at 127.0.0.1: HTTP 404",
        "✗ 3 desktop: no notification daemon is on the session bus",
        "✓ 4 command /bin/sh",
        "✗ 5 command /nowhere: it cannot be run: No such file or directory",
    ]
    assert told(machine)[0][0] == "/" and told(machine)[0][1]["topic"] == "topic"
    assert machine.sh(f"cat {W}/title") == "lfsvc: a test message\n"
    only = scheduler.cli("notify", "test", "--target", "4")
    assert only.stdout == "✓ 4 command /bin/sh\n"
    wrong = scheduler.cli("notify", "test", "--target", "6", check=False)
    assert wrong.returncode == 2
    assert wrong.stderr == f"lfsvc: There is no entry 6 of notify.\nhint: {CONFIG} has 5 entries\n"
