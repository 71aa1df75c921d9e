"""`lfsvc serve` on the command line."""

from __future__ import annotations

import argparse
import sys

from lfsvc.errors import LfsvcError


def run(arguments: list[str]) -> int:
    """Run the service; give its exit status."""
    parser = argparse.ArgumentParser(
        prog="lfsvc serve",
        description="Run the scheduler here, in the foreground. What this shell exports is the jobs' environment.",
    )
    parser.add_argument(
        "--launcher",
        choices=("auto", "systemd", "process"),
        default="",
        help="systemd: a unit for each job; process: without systemd (default: the config's, else what is there)",
    )
    namespace = parser.parse_args(arguments)
    from lfsvc.service.main import serve

    try:
        return serve(launcher=namespace.launcher)
    except LfsvcError as error:
        print(f"lfsvc: {error.text}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
