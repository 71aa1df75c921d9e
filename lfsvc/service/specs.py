"""What a runner is told: a Job, the settings and the surroundings → spec.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lfsvc.config import Config
from lfsvc.documents import FORMAT
from lfsvc.job import Job
from lfsvc.llamafactory.environment import job_environment
from lfsvc.llamafactory.settings import MAX_YAML_BYTES, read
from lfsvc.service.database import snapshot_name
from lfsvc.task import Command

if TYPE_CHECKING:
    from lfsvc.documents import Spec

# All jobs together stay below journald's default limit of 10,000 messages in 30 s for all units of a user.
JOURNAL_LINES, JOURNAL_SECONDS = 8000, 30


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the service was given at its start, or looks up at each use."""

    environment: Mapping[str, str]
    umask: int
    nudge_socket: str
    environment_file: Callable[[], Mapping[str, str]]


def spec_of(
    job: Job, *, folder: str, config: Config, surroundings: Surroundings, journal_spent: list[list[int]]
) -> Spec:
    """Make the spec of a job's present attempt. Reads the environment file and, for an evaluation, the snapshot.

    Args:
        job: as stored.
        folder: its folder, with the snapshot.
        config: the settings in force.
        surroundings: of the service.
        journal_spent: what the jobs before have sent to the journal (`documents.JournalShare`).

    Raises:
        LfsvcError, OSError: one of the files cannot be read.
    """
    snapshot = os.path.join(folder, snapshot_name(job.task.command))
    environment = job_environment(
        service=surroundings.environment,
        file=surroundings.environment_file(),
        devices=job.task.devices,
        own=job.environment,
        work_folder=job.output_dir or folder,
    )
    environment["LFSVC_JOB_ID"] = str(job.id)
    # Job ids of two state folders may be the same; this tells their processes apart.
    environment["LFSVC_JOB_FOLDER"] = folder
    return {
        "format": FORMAT,
        "job_id": job.id,
        "attempt": job.attempt,
        "name": job.name,
        "command": job.task.command.value,
        "task": job.text,
        "llamafactory_command": _llamafactory_command(job, snapshot),
        "source": job.task.path,
        "snapshot": snapshot,
        "working_directory": job.working_directory,
        "output_dir": job.output_dir,
        "umask": job.umask,
        "environment": environment,
        "grace_seconds": config.kill_grace,
        "nudge": surroundings.nudge_socket,
        "journal": {"lines": JOURNAL_LINES, "seconds": JOURNAL_SECONDS, "spent": journal_spent},
    }


def _llamafactory_command(job: Job, snapshot: str) -> str:
    """`eval` for a benchmark (`task:`), else `train`: it is how LLaMA-Factory evaluates and predicts, too."""
    if job.task.command is not Command.EVAL:
        return "train"
    with open(snapshot, "rb") as file:
        return "eval" if read(file.read(MAX_YAML_BYTES), snapshot).is_benchmark else "train"
