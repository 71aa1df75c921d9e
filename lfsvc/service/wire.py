"""A Job as a dictionary of the bus (`a{sv}`) and the options and filters that come in, with their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbus_next.signature import Variant

from lfsvc.errors import InvalidOption
from lfsvc.job import Job, State, Step
from lfsvc.service.admission import Options
from lfsvc.service.bus import clean

# Option of SubmitWithOptions → its D-Bus type; the names are those of the fields of Options.
OPTIONS: dict[str, str] = {
    "working_directory": "s",
    "environment": "a{ss}",
    "name": "s",
    "umask": "u",
    "force": "b",
    "requeue": "b",
}
FILTERS: dict[str, str] = {"state": "as", "limit": "u", "before": "t"}

DEFAULT_LIMIT = 100
# 500 dictionaries take 20 ms to marshal, in which the loop stands still.
MAX_LIMIT = 500


def job_dictionary(job: Job) -> dict[str, Variant]:
    """The dictionary of a job. A key without a value is left out."""
    rows: list[tuple[str, str, Any]] = [
        ("id", "t", job.id),
        ("task", "s", job.text),
        ("name", "s", job.name),
        ("command", "s", job.task.command.value),
        ("path", "s", job.task.path),
        ("devices", "au", list(job.task.devices)),
        ("evaluate", "b", job.task.evaluate),
        ("state", "s", job.state.value),
        ("step", "s", next((step.name for step in job.steps if step.state == "running"), "")),
        ("steps", "aa{sv}", [_step_dictionary(step) for step in job.steps]),
        ("exit_status", "i", job.exit_status),
        ("failed_step", "s", job.failed_step),
        ("failure", "s", job.failure),
        ("output_dir", "s", job.output_dir),
        ("log", "s", job.log),
        ("model", "s", job.model),
        ("progress", "a{sv}", progress_dictionary(job.progress)),
        ("queued_at", "t", job.queued_at),
        ("started_at", "t", job.started_at),
        ("finished_at", "t", job.finished_at),
        ("parent", "t", job.parent),
        ("evaluations", "at", list(job.evaluations)),
        ("attempts", "u", job.attempt),
        ("warnings", "as", list(job.warnings)),
    ]
    keep = ("evaluate", "exit_status")
    return {
        key: Variant(signature, clean(value))
        for key, signature, value in rows
        if value or (key in keep and value is not None)
    }


def _step_dictionary(step: Step) -> dict[str, Variant]:
    rows: list[tuple[str, str, Any]] = [
        ("name", "s", step.name),
        ("state", "s", step.state.value),
        ("started_at", "t", step.started_at),
        ("finished_at", "t", step.finished_at),
        ("exit_status", "i", step.exit_status),
        ("log", "s", step.log),
        ("note", "s", step.note),
    ]
    return {
        key: Variant(signature, clean(value))
        for key, signature, value in rows
        if value or (key == "exit_status" and value is not None)
    }


def progress_dictionary(progress: Mapping[str, Any]) -> dict[str, Variant]:
    """How far a step is, in the trainer's words: counts and seconds as `t`, the rest as `d`."""
    return {
        key: Variant("t" if isinstance(value, int) else "d", value)
        for key, value in progress.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def options_of(given: dict[str, Variant]) -> Options:
    """Read the options of SubmitWithOptions.

    Raises:
        InvalidOption: an unknown one, or one of another type.
    """
    return Options(**_checked(given, OPTIONS, "option"))


def filter_of(given: dict[str, Variant]) -> tuple[tuple[State, ...], int, int]:
    """Read the filter of ListJobs: states, limit, before.

    Raises:
        InvalidOption: an unknown key, one of another type, or an unknown state.
    """
    values = _checked(given, FILTERS, "filter")
    states = []
    for word in values.get("state", ()):
        try:
            states.append(State(word))
        except ValueError:
            known = ", ".join(state.value for state in State)
            raise InvalidOption(f"The state {word!r} is unknown.", f"the states are {known}") from None
    return tuple(states), min(values.get("limit", DEFAULT_LIMIT), MAX_LIMIT), values.get("before", 0)


def _checked(given: dict[str, Variant], known: dict[str, str], kind: str) -> dict[str, Any]:
    values = {}
    for key, variant in given.items():
        if key not in known:
            raise InvalidOption(f"The {kind} {key!r} is unknown.", "known are " + ", ".join(known))
        if variant.signature != known[key]:
            raise InvalidOption(
                f"The {kind} {key!r} has the D-Bus type {variant.signature!r}.", f"its type is {known[key]!r}"
            )
        values[key] = variant.value
    return values
