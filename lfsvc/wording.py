"""How durations, times and progress are said to people: one way, in the client and in the service's status.

Pure, and cheap to import. What comes from outside (names, paths, failures) passes `printable` first.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))

DAY = 86400
# Emoji that are drawn as text, one column wide, become two wide with this behind them.
EMOJI_STYLE = "\ufe0f"
ELLIPSIS = "…"


def duration(seconds: float) -> str:
    """A duration as people say it: 0.4 s, 12 s, 3 min 5 s, 1 h 12 min, 2 d 3 h."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, unit, next_size, next_unit in UNITS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{whole} s"


def ago(seconds: float) -> str:
    """How long ago something was, with one unit: tenths of a second tell nothing here."""
    whole = max(0, int(seconds))
    for size, unit, _, _ in UNITS:
        if whole >= size:
            return f"{whole // size} {unit} ago"
    return f"{whole} s ago"


def progress_text(progress: Mapping[str, Any]) -> str:
    """How far a step is: `38 %, loss 0.412, 1 h 12 min left`; "" where nothing is known."""
    words = [text for text in (percentage(progress), loss(progress)) if text]
    if progress.get("remaining_time"):
        words.append(f"{duration(progress['remaining_time'])} left")
    return ", ".join(words)


def percentage(progress: Mapping[str, Any]) -> str:
    """`38 %`, rounded down, so that 100 % is said when it is reached; else `step 3 of 40`; else ""."""
    if "percentage" in progress and progress["percentage"] == progress["percentage"]:
        return f"{int(progress['percentage'])} %"
    if progress.get("total_steps"):
        return f"step {progress.get('current_steps', 0)} of {progress['total_steps']}"
    return ""


def loss(progress: Mapping[str, Any]) -> str:
    """`loss 0.4123`, or ""."""
    return f"loss {progress['loss']:.4g}" if "loss" in progress else ""


def local_time(usec: int) -> str:
    """A time (microseconds since the epoch) for people, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(usec / 1e6))


def clock(seconds: float, now: float) -> str:
    """A time near `now` (both in seconds since the epoch): `14:35`, `Fri 14:35`, or with its date."""
    then, today = time.localtime(seconds), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %H:%M" if abs(seconds - now) < 6 * DAY else "%Y-%m-%d %H:%M", then)


# -- text of others on a terminal ------------------------------------------------------------------


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded: a file's name that is no UTF-8 has halves of surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: str) -> str:
    """A text as one line for a terminal or a pipe: no control characters, no escape sequences, no bare surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\ufffd" if "\ud800" <= c <= "\udfff" else " " for c in text)


def text_width(text: str) -> int:
    """Columns of the terminal that a printable text takes: two for East Asian wide characters and emoji."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    width, last = 0, 0
    for c in text:
        if c == EMOJI_STYLE and last == 1:
            width, last = width + 1, 2
        elif category(c) not in ("Mn", "Me", "Cf") and not "\u1160" <= c <= "\u11ff":
            last = 1 + (east_asian_width(c) in "WF")
            width += last
    return width


def cut(text: str, width: int) -> str:
    """Cut a text to a width, with an ellipsis at its end."""
    if width <= 0 or text_width(text) <= width:
        return text
    # From the left, so that what is looked at stays short for a text of any length.
    kept = text[:width]
    while kept and text_width(kept) > width - 1:
        kept = kept[:-1]
    return kept.rstrip() + ELLIPSIS


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of a width: at blanks, within a longer word behind a `/` or `,`, and else anywhere."""
    if width <= 0 or text_width(text) <= width:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        if line and text_width(line) + 1 + text_width(word) <= width:
            line += f" {word}"
            continue
        if line:
            lines.append(line)
        while text_width(word) > width:
            piece = _head(word, width)
            lines.append(piece)
            word = word[len(piece) :]
        line = word
    return [*lines, line] if line else lines


def _head(word: str, width: int) -> str:
    head = word[:width]
    while text_width(head) > width and len(head) > 1:
        head = head[:-1]
    # At least a third of the line, or a path of long names takes a line for each.
    place = max(head.rfind("/"), head.rfind(",")) + 1
    return head[:place] if place > width // 3 else head


def iso_time(usec: int) -> str:
    """A time for programs."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(usec // 1_000_000)) + f".{usec % 1_000_000:06d}Z"


def with_iso_times(value: Any) -> Any:
    """Copy a value as the schema has it: times (keys in _at, microseconds) in ISO 8601, null for NaN and infinity."""
    if isinstance(value, dict):
        return {
            key: iso_time(item) if key.endswith("_at") and isinstance(item, int) else with_iso_times(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_iso_times(item) for item in value]
    # NaN is the one number that differs from itself, and infinity minus itself is NaN.
    return None if isinstance(value, float) and value - value != 0 else value
