"""systemd's EnvironmentFile format: read as systemd reads it, written so that it reads back the same.

Source: systemd.exec(5), EnvironmentFile=, and the state machine of src/basic/env-file.c in systemd 252.
Bytes that are not UTF-8 are carried as lone surrogates, as os.environ does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Within double quotes a backslash escapes these and nothing else.
_ESCAPED_IN_QUOTES = '"\\`$'
_WHITESPACE = " \t\n\r"


def valid_name(name: str) -> bool:
    """Whether systemd takes this as the name of a variable: ASCII letters, digits, _; no digit first."""
    return name.isascii() and name.replace("_", "a").isalnum() and not name[0].isdigit()


def parse(data: bytes) -> dict[str, str]:
    """Read assignments; a later one of the same name wins, a line that is none is passed over.

    Passing over is systemd's own behaviour: one bad line must not keep a machine's jobs from running.
    """
    text = os.fsdecode(data)
    result: dict[str, str] = {}
    position = 0
    while position < len(text):
        character = text[position]
        if character in _WHITESPACE:
            position += 1
        elif character in "#;":
            position = _skip_comment(text, position)
        else:
            position = _assignment(text, position, result)
    return result


def _skip_comment(text: str, position: int) -> int:
    while position < len(text) and text[position] != "\n":
        position += 2 if text[position] == "\\" else 1
    return position + 1


def _assignment(text: str, position: int, result: dict[str, str]) -> int:
    start = position
    while position < len(text) and text[position] not in "=\n":
        position += 1
    if position >= len(text) or text[position] == "\n":
        return position + 1
    name = text[start:position].rstrip(_WHITESPACE)
    value, position = _value(text, position + 1)
    if name and valid_name(name) and "\0" not in value:
        result[name] = value
    return position


def _value(text: str, position: int) -> tuple[str, int]:
    """Read a value up to the end of its line; give it and the position behind it."""
    value: list[str] = []
    unquoted = False
    # How much of the value stays when the white space at its end is cut off.
    keep = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character == "\n":
            break
        if character == "\\":
            if position < len(text) and text[position] != "\n":
                value.append(text[position])
                keep = len(value)
                unquoted = True
            position += 1
        elif not unquoted and character in "'\"":
            # Quotes have a meaning only where no bare character came before them.
            position = _quoted(text, position, character, value)
            keep = len(value)
        elif not unquoted and character in _WHITESPACE:
            continue
        else:
            unquoted = True
            value.append(character)
            if character not in _WHITESPACE:
                keep = len(value)
    return "".join(value[:keep]), position


def _quoted(text: str, position: int, quote: str, value: list[str]) -> int:
    while position < len(text):
        character = text[position]
        position += 1
        if character == quote:
            break
        if character == "\\" and quote == '"' and position < len(text):
            escaped = text[position]
            position += 1
            if escaped in _ESCAPED_IN_QUOTES:
                value.append(escaped)
            elif escaped != "\n":
                value += ["\\", escaped]
        else:
            value.append(character)
    return position


def render(variables: Mapping[str, str], header: str = "") -> bytes:
    """Write variables, sorted, each in double quotes; `header` goes above as comment lines."""
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for name in sorted(variables):
        escaped = "".join("\\" + c if c in _ESCAPED_IN_QUOTES else c for c in variables[name])
        lines.append(f'{name}="{escaped}"')
    return os.fsencode("\n".join(lines) + "\n")
