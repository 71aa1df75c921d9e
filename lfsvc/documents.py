"""The three documents between service and runner: spec.json, status.json, result.json.

Each has a format version and is replaced atomically. They outlive either side: a runner that was
started by an older lfsvc is read by a newer service, so a key is added, never given another meaning.

The runner imports this before its job starts; hence the types exist for the type checker only.
"""

from __future__ import annotations

import json
import os

from lfsvc.files import replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypedDict

    class JournalShare(TypedDict):
        """What a runner may send to the journal: `lines` in any `seconds`; `spent` is what jobs before it used.

        `spent` holds [second of CLOCK_BOOTTIME, lines sent in that second].
        """

        lines: int
        seconds: int
        spent: list[list[int]]

    class Merge(TypedDict):
        """The merge of a training: `skip` says why there is none; the rest is for one that there is.

        `adapter` is the folder that the training writes its adapter to, `config` the YAML of the export
        without its export_dir.
        """

        skip: str
        adapter: str
        base: str
        cache_dir: str
        config: str
        delete_checkpoints: bool

    class Results(TypedDict):
        """The row of an evaluation in `root`/summary.csv; `path` is the folder that it writes to.

        `trained_by` is the job whose end queued it, 0 where it was submitted by itself.
        """

        root: str
        run: str
        mode: str
        type: str
        model: str
        path: str
        trained_by: int

    class Spec(TypedDict):
        """What the service asks of a runner. Steps that the job does not have are None.

        `done` are the steps that succeeded before an interruption: they are not run again.
        """

        format: int
        job_id: int
        attempt: int
        name: str
        command: str
        task: str
        llamafactory_command: str
        source: str
        snapshot: str
        working_directory: str
        output_dir: str
        umask: int
        environment: dict[str, str]
        grace_seconds: float
        nudge: str
        journal: JournalShare
        merge: Merge | None
        results: Results | None
        done: list[StepDocument]

    class StepDocument(TypedDict):
        """One step so far. Times in microseconds since the epoch, 0 where not yet."""

        name: str
        state: str
        started_at: int
        finished_at: int
        exit_status: int | None
        log: str
        note: str

    class Status(TypedDict):
        """What a runner is doing. `pid` and `pid_start` (clock ticks since the boot) are the runner's own."""

        format: int
        job_id: int
        attempt: int
        pid: int
        pid_start: int
        step: str
        steps: list[StepDocument]
        progress: dict[str, Any]
        warnings: list[str]
        journal_spent: list[list[int]]

    class Result(TypedDict):
        """How a job ended. `stopped`: the runner was told to stop before its steps were through.

        `model` is the folder of the merged model that this job made, "" where it made none.
        """

        format: int
        job_id: int
        attempt: int
        state: str
        stopped: bool
        exit_status: int
        failed_step: str
        failure: str
        model: str
        finished_at: int
        steps: list[StepDocument]
        progress: dict[str, Any]
        warnings: list[str]
        journal_spent: list[list[int]]


FORMAT = 1

SPEC = "spec.json"
STATUS = "status.json"
RESULT = "result.json"

# What is kept free on the disk for result.json, so that a full disk cannot lose the end of a job.
RESULT_BYTES = 64 * 1024
RESULT_RESERVE = "result.json.reserve"


class Unreadable(Exception):
    """A document that is there and cannot be used; the message says which and why."""


def write(folder: str, name: str, document: Spec | Status) -> None:
    """Replace a document in a job's folder; not durable: after a power cut the job is another attempt anyway.

    Raises:
        OSError: the old document is untouched.
    """
    replace_file(os.path.join(folder, name), json.dumps(document).encode("ascii"), durable=False)


def read(folder: str, name: str, *, attempt: int | None = None) -> dict[str, Any] | None:
    """Read a document; None where there is none, or where it is of another attempt.

    Raises:
        Unreadable: it is damaged, or of a format that this version does not know.
    """
    path = os.path.join(folder, name)
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Unreadable(f"{path} is not of format {FORMAT}, the only one that this version of lfsvc reads")
    if attempt is not None and document.get("attempt") != attempt:
        return None
    return document


def reserve_result(folder: str) -> None:
    """Take the space of result.json now. On a file system that cannot reserve, nothing is promised."""
    path = os.path.join(folder, RESULT_RESERVE)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, RESULT_BYTES)
    except OSError:
        pass
    finally:
        os.close(fd)


def write_result(folder: str, result: Result) -> None:
    """Write result.json into the reserved space and give it its name, durably.

    A failed fsync (a disk that is going) does not keep the result back: the running service still
    learns of the end; after a power cut it may be gone.

    Raises:
        OSError: there was no reserve and no space.
    """
    data = json.dumps(result).encode("ascii")
    reserve = os.path.join(folder, RESULT_RESERVE)
    # Not O_TRUNC: that would give the reserved blocks back before they are used.
    fd = os.open(reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        offset = 0
        while offset < len(data):
            offset += os.pwrite(fd, data[offset:], offset)
        os.ftruncate(fd, len(data))
        try:
            os.fsync(fd)
        except OSError:
            pass
    finally:
        os.close(fd)
    os.rename(reserve, os.path.join(folder, RESULT))
