"""`lfsvc submit` and `lfsvc check`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import Client, utf8
from lfsvc.client.cli import print_error
from lfsvc.client.output import print_json
from lfsvc.errors import InvalidTask, LfsvcError, WrongUse
from lfsvc.llamafactory.cli import PROGRAM, find_program
from lfsvc.task import make_absolute
from lfsvc.wording import is_utf8, printable

if TYPE_CHECKING:
    from argparse import Namespace


def submit_command(arguments: Namespace) -> int:
    """Queue tasks; with --wait or --follow stay until they have ended."""
    client = Client.connect()
    options = _options(arguments)
    if arguments.wait or arguments.follow:
        client.watch()
    jobs: list[dict[str, Any]] = []
    status = 0
    other_cli = ""
    for text in arguments.tasks:
        try:
            job, before = _submit(client, text, options)
        except LfsvcError as error:
            print_error(error)
            status = status or error.exit_status
            continue
        jobs.append(job)
        if arguments.json:
            continue
        print(accepted(job, len(before["running"]) + before["queue_length"]), flush=True)
        # Of several tasks each warning says which it is about.
        about = f"job {job['id']}: " if len(arguments.tasks) > 1 else ""
        print_warnings(about + warning for warning in job.get("warnings", ()))
        other_cli = _other_cli(before.get("llamafactory_cli", ""), job["command"])
    if other_cli:
        print(f"warning: {other_cli}", file=sys.stderr)
    if arguments.json:
        print_json(jobs)
    if arguments.wait or arguments.follow:
        from lfsvc.client.follow import wait_for

        ids = [job["id"] for job in jobs]
        status = wait_for(client, ids, output=arguments.follow, watching=True) or status
    return status


def check_command(arguments: Namespace) -> int:
    """Say what submit would say."""
    client = Client.connect()
    options: dict[str, Any] = {
        "working_directory": ("s", _working_directory()),
        "environment": ("a{ss}", _environment(arguments.env)),
        "force": ("b", arguments.force),
    }
    warnings = client.call("CheckWithOptions", "sa{sv}", absolute(arguments.task), options)
    if arguments.json:
        print_json({"warnings": warnings})
    else:
        print_warnings(warnings)
        print("ok: it would be queued" + (", with these warnings" if warnings else ""))
    return 0


def absolute(text: str) -> str:
    """Make a task of the command line into one for the bus."""
    return make_absolute(utf8(text), _working_directory())


def _working_directory() -> str:
    try:
        return utf8(os.getcwd())
    except OSError:
        raise WrongUse("The working directory is gone.", "cd to another") from None


def _environment(assignments: list[str]) -> dict[str, str]:
    environment = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals and name in os.environ:
            # As `docker run --env NAME` and `sbatch --export` have it: the value of this shell.
            value = os.environ[name]
        elif not equals:
            raise WrongUse(f"--env {assignment}: there is no such variable here.", "give --env KEY=VALUE")
        environment[utf8(name)] = utf8(value)
    return environment


def _options(arguments: Namespace) -> dict[str, Any]:
    umask = os.umask(0)
    os.umask(umask)
    options: dict[str, Any] = {
        "working_directory": ("s", _working_directory()),
        "environment": ("a{ss}", _environment(arguments.env)),
        "umask": ("u", umask),
    }
    if arguments.name:
        options["name"] = ("s", utf8(arguments.name))
    if arguments.force:
        options["force"] = ("b", True)
    if arguments.requeue or arguments.no_requeue:
        options["requeue"] = ("b", bool(arguments.requeue))
    return options


def _submit(client: Client, text: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    task = absolute(text)
    if not is_utf8(task):
        raise InvalidTask(f"{text!r} is not UTF-8, which D-Bus cannot carry.", "rename the file or its folder")
    job_id, before = client.submit(task, options)
    job: dict[str, Any] = client.call("GetJob", "t", job_id)
    return job, before


def accepted(job: dict[str, Any], ahead: int) -> str:
    """The line that says a task is queued: `job 42 queued (2 ahead): train /abs/x.yaml on devices 0,1`."""
    devices = " on devices " + ",".join(map(str, job["devices"])) if job.get("devices") else ""
    flag = " (no evaluation)" if job["command"] == "train" and not job["evaluate"] else ""
    return f"job {job['id']} queued ({ahead} ahead): {job['command']} {printable(job['path'])}{devices}{flag}"


def print_warnings(warnings: Any) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)


def _other_cli(there: str, command: str) -> str:
    """Say so where this shell's llamafactory-cli is another than the one that runs."""
    here = find_program(PROGRAM, os.environ.get("PATH", "")) if command != "shell" else ""
    if not here or not there or os.path.realpath(here) == os.path.realpath(there):
        return ""
    return f"jobs run {there}, not this shell's {here}; `lfsvc setup` here changes that"
