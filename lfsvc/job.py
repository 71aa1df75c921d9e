"""A job and its states: the machine as data. Only `change` makes a job with another state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from lfsvc.task import Command, Task


class State(str, Enum):
    """The state of a job: the word that users type and read."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    KILLED = "killed"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"


class StepState(str, Enum):
    """The state of a step of a job."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    KILLED = "killed"
    SKIPPED = "skipped"


# From each state, the states it may change to. What is not here cannot be stored.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.KILLED, State.INTERRUPTED, State.QUEUED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.KILLED: frozenset(),
    State.INTERRUPTED: frozenset(),
    State.CANCELLED: frozenset(),
}

ENDED: frozenset[State] = frozenset(state for state, to in TRANSITIONS.items() if not to)

# exit_status of a job of which nothing ran.
NOTHING_RAN = -1


class IllegalChange(Exception):
    """A change of state that TRANSITIONS does not have: a fault of lfsvc, never of the user."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a job. Times are microseconds since the epoch, 0 where not yet."""

    name: str
    state: StepState = StepState.PENDING
    started_at: int = 0
    finished_at: int = 0
    exit_status: int | None = None
    log: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the store keeps it. Times are microseconds since the epoch (UTC), 0 where not yet.

    `attempt` counts the starts; a document of the runner belongs to the job only where its attempt
    is this one. `model` is the folder of the merged model that it made, `evaluations` are the jobs that
    its end queued, each with it as `parent`. `instance` names the machine's boot and the manager under
    which the present attempt was started, `handle` what the launcher needs to find it again.
    """

    id: int
    task: Task
    text: str
    working_directory: str
    output_dir: str = ""
    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    requeue: bool | None = None
    state: State = State.QUEUED
    queued_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    attempt: int = 0
    interruptions: int = 0
    kill_requested_at: int = 0
    launcher: str = ""
    instance: str = ""
    handle: str = ""
    exit_status: int | None = None
    failed_step: str = ""
    failure: str = ""
    steps: tuple[Step, ...] = ()
    log: str = ""
    model: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    parent: int = 0
    evaluations: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing will change about this job any more."""
        return self.state in ENDED

    @property
    def title(self) -> str:
        """How messages call it: `train config.yaml`, or the name that the user gave it."""
        return f"{self.task.command.value} {self.short_name}"

    @property
    def short_name(self) -> str:
        """The name that the user gave it, or that of its file."""
        return self.name or self.task.path.rsplit("/", 1)[-1]

    def may_requeue(self, *, default: bool) -> bool:
        """Whether an interruption queues it again: once; a .sh only if its submitter said so.

        `default` is for a YAML whose submitter said nothing.
        """
        if self.interruptions:
            return False
        if self.requeue is not None:
            return self.requeue
        return default and self.task.command is not Command.SHELL


def change(job: Job, to: State, **fields: Any) -> Job:
    """Give the job with another state and other fields.

    Raises:
        IllegalChange: TRANSITIONS has no such change.
    """
    if to not in TRANSITIONS[job.state]:
        raise IllegalChange(f"job {job.id}: {job.state.value} cannot become {to.value}")
    return replace(job, state=to, **fields)
