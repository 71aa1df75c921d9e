"""JSON for programs: the dictionaries of the bus, with times as ISO 8601."""

from __future__ import annotations

import time
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    import json

    print(json.dumps(with_iso_times(value), indent=2, ensure_ascii=False))


def with_iso_times(value: Any) -> Any:
    """Copy a value, with every time (a key that ends in _at, in microseconds) as ISO 8601 in UTC."""
    if isinstance(value, dict):
        return {
            key: iso_time(item) if key.endswith("_at") and isinstance(item, int) else with_iso_times(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_iso_times(item) for item in value]
    return value


def iso_time(usec: int) -> str:
    """A time for programs."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(usec // 1_000_000)) + f".{usec % 1_000_000:06d}Z"
