"""--json: one schema, which is what the service sends, and which does not change unnoticed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from lfsvc.client import output
from lfsvc.client.output import CHECK, JOB, PROGRESS, SCHEMA, STATUS, STEP, print_json, with_iso_times
from lfsvc.job import Job, State, Step, StepState
from lfsvc.llamafactory import progress
from lfsvc.service import wire
from lfsvc.task import Command, Task

STEP_DONE = Step(
    name="train", state=StepState.RUNNING, started_at=2, finished_at=3, exit_status=1, log="/l", note="n"
)  # fmt: skip
FULL = Job(
    id=7, task=Task(command=Command.TRAIN, path="/x/a.yaml", devices=(0, 1), evaluate=True), text="train:/x/a.yaml",
    working_directory="/x", output_dir="/x/out", name="a", state=State.RUNNING, queued_at=1, started_at=2,
    finished_at=3, attempt=1, exit_status=1, failed_step="train", failure="It failed.", log="/x/out/a.log",
    model="/x/out/merged", steps=(STEP_DONE,), parent=6, evaluations=(8,), warnings=("odd",),
    progress={"current_steps": 1, "total_steps": 2, "percentage": 50.0, "loss": 0.5, "lr": 1e-4, "epoch": 1.0,
              "elapsed_time": 1, "remaining_time": 1},
)  # fmt: skip

# D-Bus type → what it is in JSON.
TYPES = {
    "s": "string", "t": "integer", "u": "integer", "i": "integer", "d": "number", "b": "boolean",
    "as": "array of string", "at": "array of integer", "au": "array of integer",
}  # fmt: skip


def on_the_bus(dictionary: dict[str, Any]) -> dict[str, str]:
    """Key → JSON type, for what has no schema of its own."""
    return {
        key: "time" if key.endswith("_at") else TYPES.get(value.signature, key) for key, value in dictionary.items()
    }


def in_the_schema(table: dict[str, tuple[str, str]]) -> dict[str, str]:
    named = {"array of step": "steps", "progress": "progress"}
    return {key: named.get(kind, kind) for key, (kind, _) in table.items()}


def test_the_schema_is_what_the_service_sends() -> None:
    sent = wire.job_dictionary(FULL)
    assert on_the_bus(sent) == in_the_schema(JOB)
    assert on_the_bus(sent["steps"].value[0]) == in_the_schema(STEP)
    assert on_the_bus(sent["progress"].value) == in_the_schema(PROGRESS)
    assert set(PROGRESS) == {*progress.COUNTS, *progress.NUMBERS, *progress.TIMES}


def test_the_order_of_the_schema_is_that_of_what_is_printed() -> None:
    assert list(wire.job_dictionary(FULL)) == list(JOB)


def test_every_row_of_the_schema_has_a_type_and_one_line() -> None:
    known = {"string", "integer", "number", "boolean", "time", *SCHEMA}
    for table in SCHEMA.values():
        for kind, meaning in table.values():
            assert kind.removeprefix("array of ") in known
            assert meaning and "\n" not in meaning and "|" not in meaning


def test_the_words_of_the_schema_are_those_of_the_states() -> None:
    for words, states in ((JOB["state"][1], State), (STEP["state"][1], StepState)):
        assert re.findall(r"\w+", words.replace(" or ", ", ")) == [state.value for state in states]


def test_the_schema_is_stable() -> None:
    """A key is added, never taken away or given another type: a script somewhere reads it."""
    assert {key: kind for key, (kind, _) in JOB.items()}.items() >= {
        "id": "integer", "task": "string", "name": "string", "command": "string", "path": "string",
        "devices": "array of integer", "evaluate": "boolean", "state": "string", "step": "string",
        "steps": "array of step", "exit_status": "integer", "failed_step": "string", "failure": "string",
        "output_dir": "string", "log": "string", "model": "string", "progress": "progress", "queued_at": "time",
        "started_at": "time", "finished_at": "time", "parent": "integer", "evaluations": "array of integer",
        "attempts": "integer", "warnings": "array of string",
    }.items()  # fmt: skip
    assert {key: kind for key, (kind, _) in STEP.items()}.items() >= {
        "name": "string", "state": "string", "started_at": "time", "finished_at": "time", "exit_status": "integer",
        "log": "string", "note": "string",
    }.items()  # fmt: skip
    assert {key: kind for key, (kind, _) in PROGRESS.items()}.items() >= {
        "current_steps": "integer", "total_steps": "integer", "percentage": "number", "loss": "number", "lr": "number",
        "epoch": "number", "elapsed_time": "integer", "remaining_time": "integer",
    }.items()  # fmt: skip
    assert {key: kind for key, (kind, _) in STATUS.items()}.items() >= {
        "version": "string", "state": "string", "running": "array of job", "queued": "array of job",
        "queue_length": "integer", "started_at": "time", "llamafactory_cli": "string",
    }.items()  # fmt: skip
    assert {key: kind for key, (kind, _) in CHECK.items()}.items() >= {"warnings": "array of string"}.items()


def test_a_job_without_much_keeps_what_is_always_there() -> None:
    empty = dataclasses.replace(
        FULL, name="", output_dir="", started_at=0, finished_at=0, exit_status=None, failed_step="", failure="", log="",
        model="", steps=(), progress={}, parent=0, evaluations=(), warnings=(),
    )  # fmt: skip
    assert set(wire.job_dictionary(empty)) == {
        "id", "task", "command", "path", "devices", "evaluate", "state", "queued_at", "attempts",
    }  # fmt: skip


def printed(value: Any) -> Any:
    text = io.StringIO()
    with redirect_stdout(text):
        print_json(value)
    return json.loads(text.getvalue(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_times_are_iso_8601_and_no_number_is_one_that_json_lacks() -> None:
    job = {"queued_at": 1772375400123456, "steps": [{"started_at": 1}], "progress": {"loss": math.nan, "lr": -math.inf}}
    assert printed([job]) == [
        {
            "queued_at": "2026-03-01T14:30:00.123456Z",
            "steps": [{"started_at": "1970-01-01T00:00:00.000001Z"}],
            "progress": {"loss": None, "lr": None},
        }
    ]


def test_what_is_given_is_not_changed() -> None:
    job = {"queued_at": 1, "progress": {"loss": math.nan}}
    with_iso_times(job)
    assert job["queued_at"] == 1


@pytest.mark.parametrize(("encoding", "text"), [("utf-8", "实验"), ("latin-1", "\\u5b9e\\u9a8c")])
def test_json_is_written_as_the_stream_can(encoding: str, text: str) -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding)
    with redirect_stdout(stream):
        output.print_json({"name": "实验"})
    stream.flush()
    assert text in data.getvalue().decode(encoding)


def test_the_readme_documents_every_key() -> None:
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    section = readme.partition("\n## JSON\n")[2].partition("\n## ")[0]
    for table in (STATUS, JOB, STEP):
        for key, (kind, meaning) in table.items():
            assert f"| `{key}` | {kind} | {meaning} |\n" in section, key
    for key in PROGRESS:
        assert f"`{key}`" in section, key
