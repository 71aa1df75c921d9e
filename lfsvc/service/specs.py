"""What a runner is told: a Job, the settings and the surroundings → spec.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfsvc.config import Config
from lfsvc.documents import FORMAT
from lfsvc.job import Job, Step, StepState
from lfsvc.llamafactory.environment import job_environment
from lfsvc.llamafactory.evaluation import describe
from lfsvc.llamafactory.merge import plan
from lfsvc.llamafactory.settings import MAX_YAML_BYTES, parse
from lfsvc.service.database import snapshot_name
from lfsvc.task import Command

if TYPE_CHECKING:
    from lfsvc.documents import Merge, Results, Spec, StepDocument

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
    """Make the spec of a job's present attempt. Reads the environment file and the snapshot.

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
    data, values = b"", {}
    if job.task.command is not Command.SHELL:
        with open(snapshot, "rb") as file:
            data = file.read(MAX_YAML_BYTES)
        values = parse(data, job.task.path)
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
        # `eval` takes benchmarks only; with `train` LLaMA-Factory evaluates and predicts, too.
        "llamafactory_command": "eval" if "task" in values else "train",
        "source": job.task.path,
        "snapshot": snapshot,
        "working_directory": job.working_directory,
        "output_dir": job.output_dir,
        "umask": job.umask,
        "environment": environment,
        "grace_seconds": config.kill_grace,
        "nudge": surroundings.nudge_socket,
        "journal": {"lines": JOURNAL_LINES, "seconds": JOURNAL_SECONDS, "spent": journal_spent},
        "merge": _merge(job, values, config) if job.task.command is Command.TRAIN else None,
        "results": _results(job, data, values, config),
        "done": [_document(step) for step in job.steps if step.state is StepState.SUCCEEDED],
    }


def _document(step: Step) -> StepDocument:
    return {
        "name": step.name,
        "state": step.state.value,
        "started_at": step.started_at,
        "finished_at": step.finished_at,
        "exit_status": step.exit_status,
        "log": step.log,
        "note": step.note,
    }


def _merge(job: Job, values: dict[str, Any], config: Config) -> Merge:
    import yaml

    planned = plan(values, job.output_dir, device=config.merge_device, working_directory=job.working_directory)
    skip = planned.skip
    if not skip and not config.merge_enabled:
        skip = "merging is turned off (merge.enabled in config.yaml)"
    title = f"# The merge of the adapter that job {job.id} trained; written by lfsvc.\n"
    return {
        "skip": skip,
        "adapter": planned.adapter,
        "base": planned.base,
        "cache_dir": str(values.get("cache_dir") or ""),
        "config": title + yaml.safe_dump(planned.config, sort_keys=False, allow_unicode=True),
        "delete_checkpoints": config.merge_delete_checkpoints,
    }


def _results(job: Job, data: bytes, values: dict[str, Any], config: Config) -> Results | None:
    if not values or values.get("do_train"):
        return None
    described = describe(data, values, working_directory=job.working_directory)
    if described is None:
        return None
    return {
        "root": config.results_folder,
        "run": described.run,
        "mode": described.mode,
        "type": described.type,
        "model": described.model,
        "path": described.path,
        "trained_by": job.parent,
    }
