"""`lfsvc serve` on a terminal: the output of the jobs appears there as well."""

from __future__ import annotations

import asyncio
import sys

from lfsvc.follow import Follower
from lfsvc.job import Job
from lfsvc.service.events import Listener
from lfsvc.service.writer import Writer


class TerminalListener(Listener):
    """Copies the log of whatever runs to stdout, as it grows."""

    def __init__(self) -> None:
        self._follower: Follower | None = None
        self._log = ""
        self._writer = Writer(sys.stdout.fileno())

    def started(self, job: Job) -> None:
        self.follow(job.log)

    def progressed(self, job: Job) -> None:
        # Its next step has a log of its own.
        self.follow(job.log)

    def finished(self, job: Job) -> None:
        if job.log == self._log:
            self.close()

    def follow(self, log: str, offset: int = 0) -> None:
        """Copy a log from `offset` (bytes) on."""
        if not log or log == self._log:
            return
        self.close()
        try:
            self._follower = Follower(log, offset)
        except OSError:
            return
        self._log = log
        asyncio.get_running_loop().add_reader(self._follower.fileno(), self._copy)
        self._copy()

    def _copy(self) -> None:
        assert self._follower is not None
        while data := self._follower.read():
            self._writer.write(data)
        if self._writer.gone:
            # The jobs do not need it.
            self._stop()

    def close(self) -> None:
        """Copy what is left and stop following."""
        if self._follower is not None:
            self._copy()
        self._stop()

    def _stop(self) -> None:
        if self._follower is not None:
            asyncio.get_running_loop().remove_reader(self._follower.fileno())
            self._follower.close()
            self._follower = None
            self._log = ""
