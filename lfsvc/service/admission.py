"""The checks at submit: a task and its options → a job that may be stored, or the reason why not.

Refused is only what is sure to fail; what is unusual becomes a warning. Blocks on the file system, so
the service runs it in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lfsvc.config import Config
from lfsvc.errors import FileNotFound, InvalidConfig, InvalidOption, InvalidTask
from lfsvc.job import Job
from lfsvc.llamafactory import checks, cli, installation, settings
from lfsvc.llamafactory.checks import Ahead, Finding
from lfsvc.llamafactory.environment import job_environment
from lfsvc.service.evaluations import no_evaluation
from lfsvc.task import Command, Task, parse

MAX_SCRIPT_BYTES = 16 * 1024 * 1024
MAX_ENVIRONMENT_BYTES = 1024 * 1024
MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a submitter may say beside the task."""

    working_directory: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    name: str = ""
    umask: int | None = None
    force: bool = False
    requeue: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A job that may be stored (its id is 0 until then) and the content of its file."""

    job: Job
    snapshot: bytes


def admit(
    text: str,
    options: Options,
    *,
    config: Config,
    service_environment: Mapping[str, str],
    environment_file: Mapping[str, str],
    default_umask: int,
    ahead: Sequence[Ahead] = (),
) -> Admitted:
    """Check a submission.

    `default_umask` is for a submitter who names none, `ahead` are the jobs that come before this one.

    Raises:
        InvalidTask, FileNotFound, InvalidConfig, InvalidOption, LlamaFactoryNotFound: with the reason.
    """
    task = parse(text)
    _check_options(options)
    snapshot = _read_file(task)
    folder = options.working_directory or config.working_directory or os.path.dirname(task.path)
    _check_working_directory(folder)
    warnings = list(task.warnings)
    output_dir = ""
    environment = job_environment(
        service=service_environment,
        file=environment_file,
        devices=task.devices,
        own=options.environment,
        work_folder="",
    )
    if task.command is Command.SHELL:
        warnings += script_warnings(snapshot)
    else:
        config_of_job = settings.read(snapshot, task.path)
        if config_of_job.output_dir:
            output_dir = settings.resolve_folder(config_of_job.output_dir, folder)
            _check_can_be_made(output_dir, task.path)
        if task.command is Command.TRAIN and config_of_job.is_benchmark:
            raise InvalidConfig(
                f"{task.path} has `task:`, so it is an evaluation, not a training.",
                f"submit eval:{task.path}",
            )
        program = cli.require(environment["PATH"])
        conflict = settings.torchrun_conflict(config_of_job, environment)
        if conflict:
            warnings.append(conflict)
        found = checks.findings(
            snapshot,
            config_of_job,
            path=task.path,
            evaluation=task.command is Command.EVAL,
            working_directory=folder,
            environment=environment,
            devices=task.devices,
            ahead=ahead,
            installation=installation.find(program, environment),
        )
        warnings += _refuse_or_warn(found, force=options.force)
        if task.evaluate and config_of_job.values.get("do_train"):
            warnings += no_evaluation(
                config_of_job.values, config.evaluation_template, output_dir=output_dir, working_directory=folder
            )
    job = Job(
        id=0,
        task=task,
        text=text,
        working_directory=folder,
        output_dir=output_dir,
        name=options.name,
        environment=options.environment,
        umask=default_umask if options.umask is None else options.umask,
        requeue=options.requeue,
        warnings=tuple(warnings),
    )
    return Admitted(job=job, snapshot=snapshot)


def _refuse_or_warn(found: Sequence[Finding], *, force: bool) -> list[str]:
    """Give the warnings; refuse what is sure to fail, unless the submitter insists."""
    refusals = [finding for finding in found if finding.refuse]
    if refusals and not force:
        first, *others = refusals
        more = "".join(f"\nalso: {finding.sentence} ({finding.hint})" for finding in others)
        raise InvalidConfig(first.sentence + more, first.hint or "--force submits it all the same")
    return [f"submitted by force: {finding.sentence}" for finding in refusals] + [
        finding.sentence for finding in found if not finding.refuse
    ]


def _check_options(options: Options) -> None:
    if len(options.name) > MAX_NAME_CHARACTERS or not options.name.isprintable():
        raise InvalidOption(
            f"The name must be printable and of at most {MAX_NAME_CHARACTERS} characters.",
            "give a shorter one",
        )
    if options.umask is not None and options.umask > 0o777:
        raise InvalidOption(f"The umask {options.umask:o} (octal) is over 777.", "give one such as 022")
    size = 0
    for name, value in options.environment.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidOption(f"{name!r} cannot be the name of an environment variable.", "give KEY=VALUE")
        size += len(name) + len(value)
    if size > MAX_ENVIRONMENT_BYTES:
        raise InvalidOption(
            f"The environment is larger than {MAX_ENVIRONMENT_BYTES} bytes, which no program can be given.",
            "put large values into a file",
        )


def _read_file(task: Task) -> bytes:
    limit = MAX_SCRIPT_BYTES if task.command is Command.SHELL else settings.MAX_YAML_BYTES
    try:
        # O_NONBLOCK: a FIFO in this place would otherwise keep the thread until somebody writes.
        fd = os.open(task.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_read(task.path, error) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device, FIFO or socket"
            raise InvalidTask(f"{task.path} is {kind}, not a regular file.", "give the file itself")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise _cannot_read(task.path, error) from error
    finally:
        os.close(fd)
    if len(data) > limit:
        raise InvalidTask(f"{task.path} is larger than {limit >> 20} MiB.", "is it the right file?")
    return data


def _cannot_read(path: str, error: OSError) -> FileNotFound | InvalidTask:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return FileNotFound(f"{path} does not exist.", "check the path")
    if error.errno == errno.ENXIO:
        return InvalidTask(f"{path} is a device, FIFO or socket, not a regular file.", "give the file itself")
    return InvalidTask(f"{path} cannot be read: {error.strerror}.", "check its permissions and those of its folders")


def _check_working_directory(folder: str) -> None:
    if not folder.startswith("/"):
        raise InvalidOption(f"The working directory {folder!r} is not absolute.", "give an absolute path")
    if not os.path.isdir(folder):
        raise InvalidOption(f"The working directory {folder} does not exist.", "make it, or name another")
    if not os.access(folder, os.X_OK):
        raise InvalidOption(f"The working directory {folder} cannot be entered.", "check its permissions")


def _check_can_be_made(folder: str, path: str) -> None:
    """Refuse an output_dir that is sure to fail: something else in its place, or a parent that takes nothing."""
    present = folder
    while not os.path.lexists(present):
        present = os.path.dirname(present)
    if not os.path.isdir(present):
        raise InvalidConfig(f"{path}: output_dir {folder} cannot be made: {present} is not a folder.", "choose another")
    if not os.access(present, os.W_OK | os.X_OK):
        verb = "written to" if present == folder else f"made: {present} takes no files of yours"
        raise InvalidConfig(f"{path}: output_dir {folder} cannot be {verb}.", "choose another, or mend its permissions")


def script_warnings(script: bytes) -> list[str]:
    """Say what is odd about a shell script and is known to surprise."""
    for number, line in enumerate(script.split(b"\n"), start=1):
        if line.endswith(b"\r"):
            return [
                f"line {number} ends in CR LF, as Windows writes it; bash takes the CR as part of the command "
                "(cure: sed -i 's/\\r$//' FILE)"
            ]
    return []
