"""`lfsvc submit` and `lfsvc check`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from lfsvc.client.api import Client, utf8
from lfsvc.client.cli import print_error
from lfsvc.errors import InvalidTask, LfsvcError, WrongUse
from lfsvc.llamafactory.cli import PROGRAM, find_program
from lfsvc.task import make_absolute

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
    for text in arguments.tasks:
        try:
            job = _submit(client, text, options)
        except LfsvcError as error:
            print_error(error)
            status = status or error.exit_status
            continue
        jobs.append(job)
        if arguments.json:
            continue
        print(accepted(job, client.call("Status")), flush=True)
        print_warnings(job.get("warnings", ()))
    if jobs:
        _warn_of_other_cli(client)
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
    options = {"working_directory": ("s", utf8(os.getcwd()))}
    warnings = client.call("CheckWithOptions", "sa{sv}", absolute(arguments.task), options)
    if arguments.json:
        print_json({"warnings": warnings})
    else:
        print_warnings(warnings)
        print("ok: it would be queued")
    return 0


def absolute(text: str) -> str:
    """Make a task of the command line into one for the bus."""
    try:
        folder = os.getcwd()
    except OSError:
        raise WrongUse("The working directory is gone.", "cd to another") from None
    return make_absolute(utf8(text), utf8(folder))


def _options(arguments: Namespace) -> dict[str, Any]:
    environment = {}
    for assignment in arguments.env:
        name, equals, value = assignment.partition("=")
        if not equals and name in os.environ:
            # As `docker run --env NAME` and `sbatch --export` have it: the value of this shell.
            value = os.environ[name]
        elif not equals:
            raise WrongUse(f"--env {assignment}: there is no such variable here.", "give --env KEY=VALUE")
        environment[utf8(name)] = utf8(value)
    umask = os.umask(0)
    os.umask(umask)
    options: dict[str, Any] = {
        "working_directory": ("s", utf8(os.getcwd())),
        "environment": ("a{ss}", environment),
        "umask": ("u", umask),
    }
    if arguments.name:
        options["name"] = ("s", utf8(arguments.name))
    if arguments.force:
        options["force"] = ("b", True)
    if arguments.requeue or arguments.no_requeue:
        options["requeue"] = ("b", bool(arguments.requeue))
    return options


def _submit(client: Client, text: str, options: dict[str, Any]) -> dict[str, Any]:
    task = absolute(text)
    if any("\ud800" <= character <= "\udfff" for character in task):
        raise InvalidTask(f"{text!r} is not UTF-8, which D-Bus cannot carry.", "rename the file or its folder")
    job_id = client.call("SubmitWithOptions", "sa{sv}", task, options)
    job: dict[str, Any] = client.call("GetJob", "t", job_id)
    return job


def accepted(job: dict[str, Any], status: dict[str, Any]) -> str:
    """The line that says a task is queued: `job 42 queued (2 ahead): train /abs/x.yaml on devices 0,1`."""
    waiting = [other["id"] for other in status["queued"]]
    ahead = len([other for other in status["running"] if other["id"] != job["id"]])
    if job["id"] in waiting:
        ahead += waiting.index(job["id"])
    elif job["state"] == "queued" and status["queue_length"] > len(waiting):
        # Beyond what Status shows, and the last so far.
        ahead += status["queue_length"] - 1
    else:
        ahead = 0
    devices = " on devices " + ",".join(map(str, job["devices"])) if job.get("devices") else ""
    flag = " (no evaluation)" if job["command"] == "train" and not job["evaluate"] else ""
    return f"job {job['id']} queued ({ahead} ahead): {job['command']} {job['path']}{devices}{flag}"


def print_warnings(warnings: Any) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _warn_of_other_cli(client: Client) -> None:
    """This shell's llamafactory-cli may be another than the one that will run: say so once a call."""
    here = find_program(PROGRAM, os.environ.get("PATH", ""))
    there = client.call("Status").get("llamafactory_cli", "")
    if here and there and os.path.realpath(here) != os.path.realpath(there):
        print(
            f"warning: jobs run {there}, not this shell's {here}; `lfsvc setup` here changes that",
            file=sys.stderr,
        )


def print_json(value: Any) -> None:
    """Print a value as JSON, times as ISO 8601."""
    import json

    from lfsvc.client.show import with_iso_times

    print(json.dumps(with_iso_times(value), indent=2, ensure_ascii=False))
