"""What the end of a job means: result document, what happened to its runner, who asked for what → a Verdict.

Pure. The result document is the truth; the rest decides where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lfsvc.job import NOTHING_RAN, Job, State, Step, StepState
from lfsvc.task import Command

SIGKILL_STATUS = 128 + 9


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The fields of a job that has ended. State QUEUED: it is to run again."""

    state: State
    exit_status: int | None
    failed_step: str = ""
    failure: str = ""
    finished_at: int = 0
    """Microseconds since the epoch as the runner saw it; 0 where it saw nothing."""
    steps: tuple[Step, ...] = ()
    model: str = ""
    progress: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def judge(
    job: Job,
    *,
    result: Mapping[str, Any] | None,
    status: Mapping[str, Any] | None,
    reason: str,
    interrupted: bool,
    requeue: bool,
) -> Verdict:
    """Say what became of a job all of whose processes are gone.

    Args:
        job: as stored, its `kill_requested_at` included.
        result: result.json of this attempt.
        status: status.json of this attempt.
        reason: what happened to the runner, "" where nothing is known or it ended of itself.
        interrupted: whether the machine or the manager went away under it.
        requeue: whether an interruption queues it again.
    """
    document = result or status or {}
    steps = steps_of(document)
    warnings = job.warnings + tuple(document.get("warnings", ()))
    # Keys that a runner of an older lfsvc does not write.
    if result is not None and "model" not in result and job.task.command is Command.TRAIN:
        warnings = (*warnings, "it was started by an earlier lfsvc, which merges nothing")
    verdict = partial(Verdict, model=document.get("model", ""), progress=document.get("progress", {}))
    if result is not None and not result["stopped"]:
        return verdict(
            state=State(result["state"]),
            exit_status=result["exit_status"],
            failed_step=result["failed_step"],
            failure=result["failure"],
            finished_at=result["finished_at"],
            steps=steps,
            warnings=warnings,
        )
    exit_status = result["exit_status"] if result is not None else SIGKILL_STATUS if status else NOTHING_RAN
    steps = ended_steps(steps, StepState.KILLED, exit_status)
    if job.kill_requested_at:
        return verdict(state=State.KILLED, exit_status=exit_status, steps=steps, warnings=warnings)
    if interrupted:
        if requeue:
            return verdict(
                state=State.QUEUED,
                exit_status=None,
                # A training that was through is not run again for its merge.
                steps=steps,
                warnings=(
                    *job.warnings,
                    f"attempt {job.attempt} was interrupted by the end of the machine or session",
                ),
            )
        again = "" if job.interruptions else " To run it again, submit it again."
        return verdict(
            state=State.INTERRUPTED,
            exit_status=exit_status,
            failure="The machine or the user's session ended under this job." + again,
            steps=steps,
            warnings=warnings,
        )
    if result is not None:
        return verdict(
            state=State.KILLED,
            exit_status=exit_status,
            failure="It was stopped by hand (systemctl --user stop, or SIGTERM to its runner), not through lfsvc.",
            steps=steps,
            warnings=warnings,
        )
    failed_step = next((step.name for step in steps if step.state is StepState.KILLED), "")
    return verdict(
        state=State.FAILED,
        exit_status=exit_status,
        failed_step=failed_step,
        failure=_without_result(reason),
        steps=ended_steps(steps_of(document), StepState.FAILED, exit_status),
        warnings=warnings,
    )


def _without_result(reason: str) -> str:
    what = reason or "ended without a result"
    why = ""
    if "SIGKILL" in what or not reason:
        why = ", by hand or by the kernel short of memory (see journalctl -k)"
    return f"The runner of this job {what}{why}; whatever was left of the job was ended with it."


def steps_of(document: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps of a status or result document."""
    return tuple(
        Step(
            name=step["name"],
            state=StepState(step["state"]),
            started_at=step["started_at"],
            finished_at=step["finished_at"],
            exit_status=step["exit_status"],
            log=step["log"],
            note=step["note"],
        )
        for step in document.get("steps", ())
    )


def main_log(steps: tuple[Step, ...]) -> str:
    """The log to look at first: of the step that runs, that failed, or else of the first; "" where none has one."""
    interesting = (StepState.RUNNING, StepState.FAILED, StepState.KILLED)
    logs = [step.log for step in steps if step.log and step.state in interesting]
    logs += [step.log for step in steps if step.log]
    return logs[0] if logs else ""


def ended_steps(steps: tuple[Step, ...], state: StepState, exit_status: int) -> tuple[Step, ...]:
    """The steps, with what seems to run still put to an end that nobody recorded."""
    return tuple(
        replace(step, state=state, exit_status=exit_status) if step.state is StepState.RUNNING else step
        for step in steps
    )
