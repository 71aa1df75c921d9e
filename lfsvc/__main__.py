"""`python -m lfsvc` and the console script `lfsvc`."""

import sys


def main() -> int:
    """Run the command line; return its exit status."""
    from lfsvc.client.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
