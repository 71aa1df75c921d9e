"""What each step runs: its files, its program and its arguments."""

from __future__ import annotations

import os
import time

from lfsvc.files import create_fresh, write_all
from lfsvc.llamafactory.cli import PROGRAM, find_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lfsvc.documents import Spec


class CannotRun(Exception):
    """A step that cannot even be started; the message is the sentence for the user."""


class Prepared:
    """A step ready to run. `log` appends to the file at `log_path`."""

    __slots__ = ("arguments", "log", "log_path", "program", "warnings")

    def __init__(self, program: str, arguments: list[str], log_path: str, log: int, warnings: list[str]) -> None:
        self.program = program
        self.arguments = arguments
        self.log_path = log_path
        self.log = log
        self.warnings = warnings


def names(spec: Spec) -> list[str]:
    """The steps of a job, in their order."""
    return [spec["command"]]


def timestamp() -> str:
    """Local time as file names carry it: YYYYmmdd_HHMMSS."""
    return time.strftime("%Y%m%d_%H%M%S")


def prepare(name: str, spec: Spec, job_folder: str) -> Prepared:
    """Make the files of a step and find its program.

    Raises:
        CannotRun: a folder cannot be made or a program is not there.
    """
    if name == "shell":
        return _shell(spec, job_folder)
    return _llamafactory(name, spec, job_folder)


def _llamafactory(name: str, spec: Spec, job_folder: str) -> Prepared:
    """`llamafactory-cli train` or `eval` on the copy of the submitted YAML."""
    program = find_program(PROGRAM, spec["environment"].get("PATH", ""))
    if not program:
        raise CannotRun(f"{PROGRAM} is no longer on the PATH of the jobs; run `lfsvc setup` where it is installed.")
    warnings: list[str] = []
    stamp = timestamp()
    config = spec["snapshot"]
    folder = spec["output_dir"]
    if folder:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise CannotRun(f"output_dir {folder} cannot be made: {error.strerror}.") from error
        config = _copy(spec, stamp, warnings)
    log_path, log = _open_log(folder or job_folder, f"llamafactory_{name}_{stamp}", job_folder, warnings)
    return Prepared(program, [PROGRAM, spec["llamafactory_command"], config], log_path, log, warnings)


def _copy(spec: Spec, stamp: str, warnings: list[str]) -> str:
    """Keep the submitted YAML beside the results, byte for byte; give the path that is to run."""
    stem = os.path.basename(spec["source"]).removesuffix(".yaml")
    with open(spec["snapshot"], "rb") as file:
        data = file.read()
    try:
        path, fd = create_fresh(spec["output_dir"], f"{stem}_{stamp}", ".yaml", 0o666)
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        warnings.append(f"the config was not copied to {spec['output_dir']}: {error.strerror}")
        return spec["snapshot"]
    # The launcher splits its arguments on white space under FORCE_TORCHRUN=1.
    return spec["snapshot"] if len(path.split()) != 1 else path


def _shell(spec: Spec, job_folder: str) -> Prepared:
    """`bash` on the script at its own path, or on its snapshot where it is no longer what was submitted."""
    bash = find_program("bash", spec["environment"].get("PATH", "")) or "/bin/bash"
    warnings: list[str] = []
    script = spec["source"]
    problem = _changed(script, spec["snapshot"])
    if problem:
        warnings.append(f"{script} {problem} since it was submitted: what runs is the copy taken then")
        script = spec["snapshot"]
    log_path, log = _open_log(job_folder, f"shell_{timestamp()}", job_folder, warnings)
    return Prepared(bash, ["bash", script], log_path, log, warnings)


def _changed(path: str, snapshot: str) -> str:
    with open(snapshot, "rb") as file:
        submitted = file.read()
    try:
        with open(path, "rb") as file:
            return "" if file.read(len(submitted) + 1) == submitted else "was edited"
    except OSError:
        return "cannot be read any more"


def _open_log(folder: str, stem: str, job_folder: str, warnings: list[str]) -> tuple[str, int]:
    """Make the log; where its folder takes none, beside the job's documents, and at worst nowhere."""
    mode = 0o600 if folder == job_folder else 0o666
    try:
        return create_fresh(folder, stem, ".log", mode)
    except OSError as error:
        warnings.append(f"no log could be made in {folder}: {error.strerror}")
    if folder != job_folder:
        try:
            return create_fresh(job_folder, stem, ".log", 0o600)
        except OSError as error:
            warnings.append(f"no log could be made in {job_folder}: {error.strerror}")
    return "", os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)


def describe_end(name: str, exit_status: int, log_path: str) -> str:
    """One sentence for a step that failed."""
    where = f" Its output is in {log_path}." if log_path else ""
    if exit_status > 128:
        number = exit_status - 128
        why = {9: ", which is nearly always the kernel short of memory: see `journalctl -k`"}.get(number, "")
        return f"The {name} step died of signal {number} ({_signal_name(number)}){why}.{where}"
    return f"The {name} step ended with exit status {exit_status}.{where}"


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
