"""The states of a job, and what its end means."""

from dataclasses import replace
from typing import Any

import pytest

from lfsvc.job import ENDED, TRANSITIONS, IllegalChange, Job, State, change
from lfsvc.service.verdict import judge
from lfsvc.task import parse

JOB = Job(id=1, task=parse("/a/x.yaml"), text="/a/x.yaml", working_directory="/a", state=State.RUNNING, attempt=1)
STEP = {
    "name": "train",
    "state": "running",
    "started_at": 1,
    "finished_at": 0,
    "exit_status": None,
    "log": "",
    "note": "",
}
STATUS: dict[str, Any] = {"steps": [STEP], "warnings": []}
RESULT: dict[str, Any] = {
    "state": "failed", "stopped": False, "exit_status": 3, "failed_step": "train", "failure": "why", "finished_at": 9,
    "steps": [{**STEP, "state": "failed"}], "warnings": ["odd"],
}  # fmt: skip
STOPPED = {**RESULT, "state": "killed", "stopped": True, "exit_status": 143, "failed_step": "", "failure": ""}


@pytest.mark.parametrize("old", State)
@pytest.mark.parametrize("new", State)
def test_only_the_changes_of_the_table_can_be_made(old: State, new: State) -> None:
    job = replace(JOB, state=old)
    if new in TRANSITIONS[old]:
        assert change(job, new).state is new
    else:
        with pytest.raises(IllegalChange):
            change(job, new)


def test_nothing_follows_an_end() -> None:
    assert {state.value for state in ENDED} == {"succeeded", "failed", "killed", "interrupted", "cancelled"}


@pytest.mark.parametrize(
    ("job", "result", "status", "reason", "interrupted", "requeue", "expected"),
    [
        ({}, RESULT, STATUS, "", False, True, ("failed", 3, "why")),
        # It ended by itself while the machine went down, or just before a kill.
        ({}, {**RESULT, "state": "succeeded", "exit_status": 0}, STATUS, "", True, True, ("succeeded", 0, "why")),
        ({"kill_requested_at": 5}, RESULT, STATUS, "", False, True, ("failed", 3, "why")),
        ({"kill_requested_at": 5}, STOPPED, STATUS, "", False, True, ("killed", 143, "")),
        ({"kill_requested_at": 5}, None, STATUS, "was killed by SIGKILL", False, True, ("killed", 137, "")),
        # A kill is never taken for a shutdown.
        ({"kill_requested_at": 5}, None, STATUS, "", True, True, ("killed", 137, "")),
        ({}, STOPPED, STATUS, "", True, True, ("queued", None, "")),
        ({}, None, STATUS, "", True, False, ("interrupted", 137, "The machine or the user's session ended")),
        ({"interruptions": 1}, STOPPED, STATUS, "", True, False, ("interrupted", 143, "The machine or the user's")),
        ({}, STOPPED, STATUS, "", False, True, ("killed", 143, "It was stopped by hand")),
        ({}, None, STATUS, "was killed by SIGKILL", False, True, ("failed", 137, "The runner of this job was killed")),
        ({}, None, None, "ended with exit status 2", False, True, ("failed", -1, "The runner of this job ended with")),
    ],
)
def test_what_an_end_means(
    job: dict[str, Any], result: Any, status: Any, reason: str, interrupted: bool, requeue: bool, expected: Any
) -> None:
    verdict = judge(
        replace(JOB, **job), result=result, status=status, reason=reason, interrupted=interrupted, requeue=requeue
    )
    state, exit_status, failure = expected
    assert (verdict.state.value, verdict.exit_status) == (state, exit_status)
    assert verdict.failure.startswith(failure) and bool(verdict.failure) is bool(failure)


@pytest.mark.parametrize(
    ("path", "requeue", "default", "interruptions", "expected"),
    [
        ("/a/x.yaml", None, True, 0, True),
        ("/a/x.yaml", None, False, 0, False),
        ("/a/x.yaml", False, True, 0, False),
        ("/a/x.yaml", True, True, 1, False),
        ("/a/x.sh", None, True, 0, False),
        ("/a/x.sh", True, False, 0, True),
    ],
)
def test_an_interrupted_job_is_queued_again_once_and_a_script_only_on_request(
    path: str, requeue: bool | None, default: bool, interruptions: int, expected: bool
) -> None:
    job = replace(JOB, task=parse(path), requeue=requeue, interruptions=interruptions)
    assert job.may_requeue(default=default) is expected
