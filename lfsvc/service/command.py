"""`lfsvc serve` on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from lfsvc.errors import LfsvcError


def run(arguments: list[str]) -> int:
    """Run the service; give its exit status."""
    parser = argparse.ArgumentParser(
        prog="lfsvc serve",
        description="Run the scheduler here. What this shell exports is the jobs' environment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  lfsvc serve --detach\n",
    )
    parser.add_argument(
        "--launcher",
        choices=("auto", "systemd", "process"),
        default="",
        help="systemd: a unit for each job; process: without systemd (default: the config's, else what is there)",
    )
    parser.add_argument("--detach", action="store_true", help="in the background; returns when it is ready")
    namespace = parser.parse_args(arguments)
    if not namespace.detach:
        return _printing(lambda: _serve(namespace.launcher))
    from lfsvc.service.detach import detach

    return _printing(lambda: detach(lambda: _printing(lambda: _serve(namespace.launcher))))


def _serve(launcher: str) -> int:
    # Imported in the process that serves: a fork of its threads would not.
    from lfsvc.service.main import serve

    return serve(launcher=launcher)


def _printing(work: Callable[[], int]) -> int:
    """Do something; print its errors as people see them."""
    try:
        return work()
    except LfsvcError as error:
        print(f"lfsvc: {error.text}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
