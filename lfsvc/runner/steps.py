"""The steps of a job: what each runs, and what it does before and after.

shell   bash SCRIPT
train   llamafactory-cli train CONFIG   → merge
eval    llamafactory-cli train|eval CONFIG   → collect
"""

from __future__ import annotations

import os
import time

from lfsvc.files import create_fresh, write_fresh
from lfsvc.llamafactory.cli import PROGRAM, find_program
from lfsvc.processes import signal_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

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


class Work:
    """One step. Made before the job's first step starts, so that it can see what was there before."""

    name = ""
    output_dir = ""
    """Where its trainer_log.jsonl appears; "" where there is none."""
    model = ""
    """The folder of the model that this step made, once it is complete."""

    def __init__(self, spec: Spec, job_folder: str) -> None:
        self._spec = spec
        self._job_folder = job_folder
        self.warnings: list[str] = []

    def skip(self) -> str:
        """Why this step does not apply; "" where it does. Asked when its turn has come."""
        return ""

    def prepare(self) -> Prepared | None:
        """Make the files of the step and find its program; None where it starts no program.

        Raises:
            CannotRun: a folder cannot be made, a program is not there, …
        """
        raise NotImplementedError

    def finish(self, exit_status: int, stopped: Callable[[], bool]) -> str:
        """What is left to do when its program has ended, or the whole step where it has none (exit status 0).

        Gives the sentence where it failed although the program did not, else "". What takes long asks
        `stopped` in between: somebody wants the job to end.
        """
        del exit_status, stopped  # most steps have nothing left to do
        return ""


def timestamp() -> str:
    """Local time as file names carry it: YYYYmmdd_HHMMSS."""
    return time.strftime("%Y%m%d_%H%M%S")


def require_llamafactory(spec: Spec) -> str:
    """Find llamafactory-cli, which was there at the submission."""
    program = find_program(PROGRAM, spec["environment"].get("PATH", ""))
    if not program:
        raise CannotRun(f"{PROGRAM} is no longer on the PATH of the jobs; run `lfsvc setup` where it is installed.")
    return program


class LlamaFactory(Work):
    """`llamafactory-cli train` or `eval` on the copy of the submitted YAML."""

    def __init__(self, spec: Spec, job_folder: str) -> None:
        super().__init__(spec, job_folder)
        self.name = spec["command"]
        self.output_dir = spec["output_dir"]

    def prepare(self) -> Prepared:
        """Make output_dir, keep the YAML there, open the log."""
        program = require_llamafactory(self._spec)
        warnings: list[str] = []
        stamp = timestamp()
        config = self._spec["snapshot"]
        folder = self.output_dir
        if folder:
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise CannotRun(f"output_dir {folder} cannot be made: {error.strerror}.") from error
            config = self._copy(stamp, warnings)
        stem = f"llamafactory_{self.name}_{stamp}"
        log_path, log = open_log(folder or self._job_folder, stem, self._job_folder, warnings)
        return Prepared(program, [PROGRAM, self._spec["llamafactory_command"], config], log_path, log, warnings)

    def _copy(self, stamp: str, warnings: list[str]) -> str:
        """Keep the submitted YAML beside the results, byte for byte; give the path that is to run."""
        snapshot = self._spec["snapshot"]
        stem = os.path.basename(self._spec["source"]).removesuffix(".yaml")
        with open(snapshot, "rb") as file:
            data = file.read()
        try:
            path = write_fresh(self.output_dir, f"{stem}_{stamp}", ".yaml", data, 0o666)
        except OSError as error:
            warnings.append(f"the config was not copied to {self.output_dir}: {error.strerror}")
            return snapshot
        # The launcher splits its arguments on white space under FORCE_TORCHRUN=1.
        return snapshot if len(path.split()) != 1 else path


class Shell(Work):
    """`bash` on the script at its own path, or on its snapshot where it is no longer what was submitted."""

    name = "shell"

    def prepare(self) -> Prepared:
        """Choose the file, open the log."""
        bash = find_program("bash", self._spec["environment"].get("PATH", "")) or "/bin/bash"
        warnings: list[str] = []
        script = self._spec["source"]
        problem = _changed(script, self._spec["snapshot"])
        if problem:
            warnings.append(f"{script} {problem} since it was submitted: what runs is the copy taken then")
            script = self._spec["snapshot"]
        log_path, log = open_log(self._job_folder, f"shell_{timestamp()}", self._job_folder, warnings)
        return Prepared(bash, ["bash", script], log_path, log, warnings)


def _changed(path: str, snapshot: str) -> str:
    with open(snapshot, "rb") as file:
        submitted = file.read()
    try:
        with open(path, "rb") as file:
            return "" if file.read(len(submitted) + 1) == submitted else "was edited"
    except OSError:
        return "cannot be read any more"


def open_log(folder: str, stem: str, job_folder: str, warnings: list[str]) -> tuple[str, int]:
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


def prepare_for_failure() -> Callable[[str, int], str] | None:
    """Import what explains a failure: early in a step that lasts, since an upgrade may come while it runs.

    None where lfsvc was removed meanwhile: the job goes on, and its end is told without a cause.
    """
    try:
        from lfsvc.llamafactory.failures import explain
    except ImportError:
        return None
    return explain


def describe_end(name: str, exit_status: int, log_path: str, lost_because: str = "") -> str:
    """Why a step failed, what to do, and where its output is.

    `lost_because` is why the log did not take all of it: what stood there would have told.
    """
    where = f" Its output is in {log_path}." if log_path else ""
    # What a signal means for a script of the user's own, lfsvc does not know.
    if log_path and (name != "shell" or exit_status < 128) and (explain := prepare_for_failure()) is not None:
        cause = explain(log_path, exit_status)
        if cause:
            return f"The {name} step failed: {cause}{where}"
    if lost_because:
        return (
            f"The {name} step ended with exit status {exit_status}, and the end of its output could not be written "
            f"({lost_because}), so probably its own files could not be either. Make room on that disk.{where}"
        )
    if exit_status > 128:
        number = exit_status - 128
        why = {9: ", which is nearly always the kernel short of memory: see `journalctl -k`"}.get(number, "")
        return f"The {name} step died of signal {number} ({signal_name(number)}){why}.{where}"
    return f"The {name} step ended with exit status {exit_status}.{where}"
