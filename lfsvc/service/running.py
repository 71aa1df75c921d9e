"""A running job as the service sees it: what is stored, and what its runner has told since it started."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lfsvc.job import Job
from lfsvc.service.launchers.base import Launcher
from lfsvc.service.verdict import main_log, steps_of


@dataclass(kw_only=True)
class Running:
    """A running job, with what its runner has told since it started."""

    job: Job
    launcher: Launcher
    status: Mapping[str, Any] = field(default_factory=dict)
    first_status: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def view(self) -> Job:
        """The job with the state of its steps."""
        steps = steps_of(self.status)
        return replace(
            self.job,
            steps=steps,
            log=main_log(steps),
            progress=dict(self.status.get("progress", {})),
            warnings=self.job.warnings + tuple(self.status.get("warnings", ())),
        )
