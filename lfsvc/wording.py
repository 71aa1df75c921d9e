"""How durations and progress are said to people: one way, in the client and in the service's status."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def duration(seconds: float) -> str:
    """A duration as people say it: 0.4 s, 12 s, 3 min 5 s, 1 h 12 min, 2 d 3 h."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, unit, next_size, next_unit in UNITS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{whole} s"


def progress_text(progress: Mapping[str, Any]) -> str:
    """How far a step is: `38 %, loss 0.412, 1 h 12 min left`; "" where nothing is known."""
    words = []
    if "percentage" in progress:
        # Rounded down: 100 % is said when it is reached.
        words.append(f"{int(progress['percentage'])} %")
    elif progress.get("total_steps"):
        words.append(f"step {progress.get('current_steps', 0)} of {progress['total_steps']}")
    if "loss" in progress:
        words.append(f"loss {progress['loss']:.4g}")
    if progress.get("remaining_time"):
        words.append(f"{duration(progress['remaining_time'])} left")
    return ", ".join(words)
