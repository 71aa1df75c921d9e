"""`lfsvc watch` on a real terminal: live, through restarts, and the terminal is given back as it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator

import pytest
from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
ALTERNATE, NORMAL, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


class Terminal:
    """A pseudo-terminal with a program of the test machine on it."""

    def __init__(self, scheduler: Scheduler, *arguments: str, columns: int = 100, rows: int = 30) -> None:
        self.printed = ""
        self._master, self._slave = os.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            scheduler.machine.command(["lfsvc", *arguments], env={**scheduler.env, "TERM": "xterm-256color"}),
            stdin=self._slave, stdout=self._slave, stderr=self._slave, start_new_session=True,
            # Its controlling terminal: else no SIGWINCH comes.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self.printed += data.decode(errors="replace")

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def screen(self) -> str:
        """What stands on the screen: all that was printed since the cursor last went home."""
        return ESCAPES.sub("", self.printed.rpartition("\x1b[H")[2])

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.screen(), lambda: f"no {text!r} in:\n{self.screen()}")

    def is_as_before(self) -> bool:
        """Whether the terminal has its settings, its screen and its cursor again."""
        last_screen = self.printed.rfind(NORMAL) > self.printed.rfind(ALTERNATE)
        cursor = self.printed.rfind(CURSOR) > self.printed.rfind("\x1b[?25l")
        return termios.tcgetattr(self._slave) == self.before and last_screen and cursor

    def end(self) -> int:
        """Wait for the end of the program; give its exit status."""
        status = self.process.wait(20)
        self.close()
        return status

    def close(self) -> None:
        if self._reader.is_alive() or self.process.poll() is None:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            # The reader ends when the last slave is closed; the settings are read before.
            self.as_before = self.is_as_before()
            os.close(self._slave)
            self._reader.join(20)
            os.close(self._master)


@contextlib.contextmanager
def watching(scheduler: Scheduler, columns: int = 100, rows: int = 30) -> Iterator[Terminal]:
    terminal = Terminal(scheduler, "watch", columns=columns, rows=rows)
    try:
        terminal.wait_for("q leaves; jobs go on")
        yield terminal
    finally:
        terminal.close()


def gate(scheduler: Scheduler, name: str = "long") -> int:
    return scheduler.script(name, f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")


def test_watch_is_live_and_q_leaves_it(scheduler: Scheduler) -> None:
    with watching(scheduler) as terminal:
        assert "Nothing has been submitted yet." in terminal.screen()
        gate(scheduler)
        terminal.wait_for("1  running  shell  long.sh")
        scheduler.script("next", "true")
        terminal.wait_for("position 1")
        scheduler.machine.run(["touch", f"{W}/go"])
        terminal.wait_for("2  succeeded  shell  next.sh")
        # An arrow key is none of those that leave.
        terminal.type("\x1b[A")
        terminal.type("q")
        assert terminal.end() == 0
    assert terminal.as_before


def test_watch_survives_a_restart_of_the_service(scheduler: Scheduler) -> None:
    gate(scheduler)
    with watching(scheduler) as terminal:
        terminal.wait_for("1  running")
        scheduler.stop()
        terminal.wait_for("The scheduler is away; jobs go on.")
        assert "1  running" in terminal.screen()
        scheduler.start()
        terminal.wait_for("q leaves; jobs go on")
        scheduler.crash()
        scheduler.machine.run(["touch", f"{W}/go"])
        terminal.wait_for("1  succeeded")
        terminal.type("q")
        assert terminal.end() == 0


@pytest.mark.parametrize("number", ["INT", "TERM", "HUP"])
def test_a_signal_leaves_the_terminal_as_it_was(user: Machine, number: str) -> None:
    scheduler = Scheduler(user, "systemd")
    with watching(scheduler) as terminal:
        user.sh(f"pkill -{number} -f '[l]fsvc watch'")
        status = terminal.end()
        assert (status == 0) == (number == "INT")
    assert terminal.as_before
    assert "Traceback" not in terminal.printed


def test_watch_fills_a_terminal_that_is_resized(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    with watching(scheduler, columns=60, rows=10) as terminal:
        terminal.resize(120, 40)
        wait_until(lambda: terminal.screen().count("\n") >= 39, lambda: terminal.screen())
        terminal.type("q")
        assert terminal.end() == 0


def test_ctrl_z_gives_the_terminal_to_the_shell_and_fg_takes_it_back(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    with watching(scheduler) as terminal:
        user.sh("pkill -TSTP -f '[l]fsvc watch'")
        wait_until(lambda: "T" in user.sh("ps -o stat= -C lfsvc; true"), "not stopped")
        assert terminal.is_as_before()
        # nsenter has stopped with it, and passes this on.
        terminal.process.send_signal(signal.SIGCONT)
        wait_until(lambda: terminal.printed.count(ALTERNATE) == 2, "no screen again")
        terminal.wait_for("q leaves")
        terminal.type("q")
        assert terminal.end() == 0
    assert terminal.as_before


def test_watch_draws_the_losses_of_the_training_that_runs(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    path = user.write(f"{W}/x.yaml", f"model_name_or_path: m\nstage: sft\ndo_train: true\noutput_dir: {W}/saves\n")
    with watching(scheduler) as terminal:
        scheduler.submit(f"{path}#no_eval", "--force", "--env", "STANDIN_LINES=40", "--env", "STANDIN_SLEEP=98752")
        terminal.wait_for("loss 2.5 █")
        terminal.wait_for("▁ 2.11")
        scheduler.cli("kill")
        terminal.wait_for("1  killed")
        assert "█" not in terminal.screen()
        terminal.type("q")
        assert terminal.end() == 0


def test_without_a_terminal_watch_says_what_to_do(user: Machine) -> None:
    done = Scheduler(user, "systemd").cli("watch", check=False)
    assert (done.returncode, done.stderr) == (
        2, "lfsvc: lfsvc watch needs a terminal.\nhint: lfsvc status prints the same once\n",
    )  # fmt: skip
