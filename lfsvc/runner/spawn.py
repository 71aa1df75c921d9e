"""Starting a step's process: what it inherits, and how it begins."""

from __future__ import annotations

import os
import signal

from lfsvc.runner.steps import CannotRun

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lfsvc.documents import Spec
    from lfsvc.runner.steps import Prepared

# Signals that Python ignores for itself; a job must have the default.
DEFAULT_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGCHLD,
)


def spawn(prepared: Prepared, environment: dict[str, str], output: int) -> int:
    """Start a step's process with /dev/null as its input; give its PID."""
    return os.posix_spawn(
        prepared.program,
        prepared.arguments,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ],
        setsigmask=[],
        setsigdef=DEFAULT_SIGNALS,
    )


def prepare_process(spec: Spec) -> None:
    """Give this process what the job inherits: working directory, umask, limits.

    Raises:
        CannotRun: the working directory is gone.
    """
    import resource

    os.umask(spec["umask"])
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        try:
            resource.setrlimit(limit, (hard, hard))
        except (OSError, ValueError):
            continue
    try:
        os.chdir(spec["working_directory"])
    except OSError as error:
        folder = spec["working_directory"]
        raise CannotRun(f"The working directory {folder} cannot be entered: {error.strerror}.") from error
