"""`lfsvc completion SHELL`: what bash or zsh needs to complete command lines of lfsvc, made from its own parser.

As `python -m lfsvc.client.completion SHELL` it is how distribution packages make their files.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from lfsvc.errors import LfsvcError
from lfsvc.job import State

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser, Namespace
    from collections.abc import Iterator

SHELLS = ("bash", "zsh")

# Functions of the scripts; shtab knows by "file" in a name that it gives file names.
# bash takes a colon for the end of a word, so it asks for what follows `train:`.
PREAMBLE = {
    "bash": """\
_lfsvc_task_files() {
  local word=${1#:}
  compgen -f -X '!*.yaml' -- "$word"
  compgen -f -X '!*.sh' -- "$word"
  compgen -d -- "$word"
}
_lfsvc_files() {
  compgen -f -- "$1"
}
""",
    "zsh": """\
_lfsvc_task_files() {
  compset -P '(train|eval):'
  _files -g '*.(yaml|sh)'
}
""",
}

# What an argument stands for is said by the name that its help shows.
FUNCTIONS = {
    "TASK": {"bash": "_lfsvc_task_files", "zsh": "_lfsvc_task_files"},
    "FILE": {"bash": "_lfsvc_files", "zsh": "_files"},
}
WORDS = {"STATE": [state.value for state in State]}


def completion_command(arguments: Namespace) -> int:
    """Print the completion script of a shell."""
    print(script(arguments.shell), end="")
    return 0


def script(shell: str) -> str:
    """Make the completion script of a shell.

    Raises:
        LfsvcError: shtab is not installed.
    """
    try:
        # Neither a dependency nor, in every version, typed.
        shtab = import_module("shtab")
    except ImportError:
        raise LfsvcError(
            "Completions are made with shtab, which is not installed.", "pip install 'lfsvc[completion]'"
        ) from None
    from lfsvc.client.cli import make_parser

    parser = make_parser()
    preamble = dict(PREAMBLE)
    for number, action in enumerate(action for sub in _parsers(parser) for action in sub._actions):
        if isinstance(action.metavar, str) and action.metavar in FUNCTIONS:
            _set(action, FUNCTIONS[action.metavar])
        elif words := list(action.choices or WORDS.get(str(action.metavar), [])):
            # A function for choices, too: of those, the bash of shtab 1.5 (Debian 12) offers the first alone.
            name = f"_lfsvc_words_{number}"
            preamble["bash"] += f"{name}() {{\n  local IFS=' '\n  compgen -W '{' '.join(words)}' -- \"$1\"\n}}\n"
            if action.dest == "command":
                # Later versions look for commands only where nothing else is set.
                preamble["bash"] += f"_shtab_lfsvc_pos_0_COMPGEN={name}\n"
            else:
                _set(action, {"bash": name, "zsh": f"({' '.join(words)})"})
    text = str(shtab.complete(parser, shell=shell, preamble=preamble))
    return text.rstrip("\n") + "\n"


def _set(action: Action, functions: dict[str, str]) -> None:
    """Say by which function of each shell an argument is completed."""
    action.complete = functions  # type: ignore[attr-defined]  # where shtab looks for it


def _parsers(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    """A parser and those of its commands."""
    import argparse

    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _parsers(sub)


if __name__ == "__main__":
    print(script(sys.argv[1]), end="")
