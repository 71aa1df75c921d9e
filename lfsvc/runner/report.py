"""What the runner tells while it works: status.json, at most once a second, and a nudge to the service."""

from __future__ import annotations

import os
import time

from lfsvc import documents, journal, processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lfsvc.documents import Spec, Status, StepDocument
    from lfsvc.llamafactory.progress import TrainerLog

REPORT_SECONDS = 1.0

# The trainer prints a step's line just before it writes the log that is read here.
LAG_SECONDS = 0.2


class Report:
    """The state of a run. `steps` and `warnings` are the runner's to change.

    `progress` is that of the present step, `last_progress` that of the last step that had one.
    """

    def __init__(self, spec: Spec, folder: str, budget: journal.Budget, names: list[str]) -> None:
        self._spec = spec
        self._folder = folder
        self._budget = budget
        own = processes.find(os.getpid())
        self._pid_start = own.start if own is not None else 0
        self._step = ""
        self.steps: list[StepDocument] = [_pending(name) for name in names]
        self.warnings: list[str] = []
        self.progress: dict[str, Any] = {}
        self.last_progress: dict[str, Any] = {}
        self._trainer: TrainerLog | None = None
        # When the trainer's log is to be read (monotonic seconds), 0.0 while nothing was printed.
        self._due = 0.0
        self._last = 0.0

    def begin(self, step: str, trainer: TrainerLog | None) -> None:
        """A step begins, with the log that tells of its progress where it has one. Not written yet: see `write`."""
        self._step = step
        self._trainer = trainer
        self.progress = {}
        self._due = 0.0

    def printed(self) -> None:
        """The step has printed something: a reason to look at its progress, soon."""
        if self._trainer is not None and not self._due:
            self._due = max(time.monotonic() + LAG_SECONDS, self._last + REPORT_SECONDS)

    @property
    def due(self) -> float | None:
        """When `turn` has something to do (monotonic seconds), None where it has not."""
        return self._due or None

    def turn(self) -> None:
        """Read the progress if it is time, and tell of it if it is another."""
        if not self._due or time.monotonic() < self._due:
            return
        self._due = 0.0
        self._last = time.monotonic()
        if self._read():
            self.write()
            self.nudge()

    def _read(self) -> bool:
        if self._trainer is None or not self._trainer.read():
            return False
        self.progress = self.last_progress = self._trainer.progress
        return True

    def end(self) -> None:
        """The step has ended: take in what it wrote last. Its progress stays until the next step begins."""
        self._read()
        if self._trainer is not None:
            self._trainer.close()
        self._trainer = None
        self._due = 0.0

    def write(self) -> None:
        """Write status.json now."""
        status: Status = {
            "format": documents.FORMAT,
            "job_id": self._spec["job_id"],
            "attempt": self._spec["attempt"],
            "pid": os.getpid(),
            "pid_start": self._pid_start,
            "step": self._step,
            "steps": self.steps,
            "progress": self.progress,
            "warnings": self.warnings,
            "journal_spent": self._budget.spent(journal.boot_seconds()),
        }
        try:
            documents.write(self._folder, documents.STATUS, status)
        except OSError:
            # A full disk: the service knows less for a while, the job goes on.
            pass

    def nudge(self) -> None:
        """Tell the service to read our documents. Lossy by design: it reads them at every start as well."""
        import socket

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as connection:
                connection.sendto(str(self._spec["job_id"]).encode(), self._spec["nudge"])
        except OSError:
            pass


def _pending(name: str) -> StepDocument:
    return {
        "name": name,
        "state": "pending",
        "started_at": 0,
        "finished_at": 0,
        "exit_status": None,
        "log": "",
        "note": "",
    }
