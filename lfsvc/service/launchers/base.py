"""The interface of a launcher, and what all launchers share."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Protocol

import lfsvc.runner


class Refused(Exception):
    """A start that was refused because the machine is going down: the job stays queued."""


class CannotStart(Exception):
    """A start that failed for good; the message is the sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a launcher needs to know of a job. `folder` holds its spec.json."""

    job_id: int
    title: str
    folder: str
    grace_seconds: float

    @property
    def runner_arguments(self) -> list[str]:
        """The argument vector of the job's runner."""
        launch = os.path.join(os.path.dirname(lfsvc.runner.__file__), "launch.py")
        # -X utf8: paths in the spec are UTF-8, whatever the locale of the service is.
        return [sys.executable, "-X", "utf8", "-I", "-S", launch, self.folder]


class Launcher(Protocol):
    """Starts runners, finds them again, stops them, and knows when all processes of a job are gone.

    A handle is a text that `attach` of a later service understands.
    """

    name: str

    async def instance(self) -> str:
        """Name the boot and the manager under which jobs run now; another text means: all of them are gone."""
        ...

    async def going_down(self) -> bool:
        """Whether the manager of the jobs is stopping, so that nothing may be started or judged."""
        ...

    async def start(self, start: Start) -> str:
        """Start a runner; give its handle.

        Raises:
            Refused: the machine is going down.
            CannotStart: it cannot be started at all.
        """
        ...

    async def attach(self, start: Start, handle: str) -> bool:
        """Find a runner again that an earlier service started; False where it is gone. `handle` may be ""."""
        ...

    async def wait(self, job_id: int) -> str:
        """Wait until every process of a started or attached job is gone.

        Gives what happened to the runner where that was out of order, such as "was killed by SIGKILL",
        else "".
        """
        ...

    async def stop(self, job_id: int) -> None:
        """Ask the runner to end its job; its own grace time and then force do the rest. Does not wait."""
        ...

    async def clear(self, start: Start) -> None:
        """End whatever is left of a job whose runner is known to be gone."""
        ...


def boot_id() -> str:
    """The kernel's id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
