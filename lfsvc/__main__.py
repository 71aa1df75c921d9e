"""`python -m lfsvc` and the console script `lfsvc`: to the client, or with `serve` to the service."""

import gc
import os
import sys


def main() -> int:
    """Run the command line; return its exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        from lfsvc.service.command import run

        return run(arguments[1:])
    # The client lives for some 30 ms: collecting garbage and tearing modules down would be a tenth of it.
    gc.disable()
    from lfsvc.client.cli import run

    status = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
