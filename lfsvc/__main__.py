"""`python -m lfsvc` and the console script `lfsvc`: to the client, or with `serve` to the service."""

import gc
import os
import sys


def main() -> int:
    """Run the command line; return its exit status."""
    arguments = sys.argv[1:]
    _open_standard_streams()
    if arguments[:1] == ["serve"]:
        from lfsvc.service.command import run

        status = run(arguments[1:])
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread may hang in a file system that does not answer; nothing is left that it could do.
        os._exit(status)
    # The client lives for some 30 ms: collecting garbage and tearing modules down would be a tenth of it.
    gc.disable()
    from lfsvc.client.cli import run

    status = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _open_standard_streams() -> None:
    """Give what was closed (`lfsvc submit x.sh >&-`) a place to write to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
