"""`python -m lfsvc` and the console script `lfsvc`: to the client, or with `serve` to the service."""

import sys


def main() -> int:
    """Run the command line; return its exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        from lfsvc.service.command import run
    else:
        from lfsvc.client.cli import run
    return run(arguments[1:] if arguments[:1] == ["serve"] else arguments)


if __name__ == "__main__":
    sys.exit(main())
