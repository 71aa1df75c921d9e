"""Finding `llamafactory-cli`, and the interpreter it runs under."""

from __future__ import annotations

import os

from lfsvc.errors import LlamaFactoryNotFound

PROGRAM = "llamafactory-cli"


def find_program(name: str, path: str) -> str:
    """Look a program up on a PATH; "" where it is not there. (shutil.which costs the client 6 ms of imports.)"""
    for folder in path.split(os.pathsep):
        candidate = os.path.join(folder, name)
        # An empty or relative entry means the working directory, which is another one for each job.
        if folder.startswith("/") and os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return ""


def require(path: str) -> str:
    """Find llamafactory-cli on a PATH.

    Raises:
        LlamaFactoryNotFound: it is not there.
    """
    found = find_program(PROGRAM, path)
    if not found:
        raise LlamaFactoryNotFound(
            f"{PROGRAM} is not on the PATH of the jobs ({path or 'which is empty'}).",
            "run `lfsvc setup` in the environment that has it, or submit with --env PATH=...",
        )
    return found


def interpreter_folder(program: str) -> str:
    """The folder of the interpreter in a program's first line; "" where it has none.

    torchrun lies there, also where the program itself is a link from a folder such as ~/.local/bin.
    """
    try:
        with open(program, "rb") as file:
            line = file.readline(1024)
    except OSError:
        return ""
    if not line.startswith(b"#!"):
        return ""
    words = os.fsdecode(line[2:]).split()
    if not words or not words[0].startswith("/") or words[0].endswith("/env"):
        return ""
    if words[0] == "/bin/sh":
        # pip's way round a shebang that is too long or has a blank: '''exec' "/the python" "$0" "$@"
        return _exec_line(program)
    return os.path.dirname(words[0])


def _exec_line(program: str) -> str:
    with open(program, "rb") as file:
        text = os.fsdecode(file.read(4096))
    _, found, rest = text.partition("'''exec' ")
    if not found:
        return ""
    quote = rest[:1]
    interpreter = rest[1:].split(quote, 1)[0] if quote in ("'", '"') else rest.split(None, 1)[0]
    return os.path.dirname(interpreter) if interpreter.startswith("/") else ""
