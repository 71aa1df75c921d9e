"""`lfsvc results`: the table of all evaluations for people and programs, and loss curves of trainings."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfsvc.client.output import has_colour, print_json, terminal_width
from lfsvc.errors import LfsvcError, WrongUse
from lfsvc.llamafactory import results
from lfsvc.wording import printable, text_width

if TYPE_CHECKING:
    from argparse import Namespace

    Row = dict[str, str]

# What an evaluation says of itself rather than of the model: shown with --all.
NOISE = ("epoch", "runtime", "preparation_time", "per_second", "total_flos", "num_input_tokens_seen")
GAP = "  "
# A path or a name that is cut shorter than this tells nothing.
SHORTEST = 16
# What is given up last where there is no room.
RANK_RUN, RANK_SORTED = 1000, 999
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def results_command(arguments: Namespace) -> int:
    """Print summary.csv, or draw the losses of trainings.

    Raises:
        LfsvcError: the table cannot be read, or there is nothing to draw.
    """
    if arguments.plot:
        from lfsvc.client import plot

        return plot.plot(arguments.ids, arguments.output or plot.DEFAULT_OUTPUT)
    if arguments.ids or arguments.output:
        raise WrongUse("IDs and -o go with --plot.", "lfsvc results --plot loss 12 13 -o loss.png")
    from lfsvc import config

    root = config.load().results_folder
    if arguments.csv:
        return _print_bytes(root)
    columns, rows = results.read_table(root)
    if rows:
        rows = _sorted(columns, rows, arguments.sort)
    if arguments.json:
        print_json(_documents(columns, rows))
    elif rows:
        view = View(
            width=terminal_width(sys.stdout),
            bold=has_colour(sys.stdout),
            everything=arguments.all,
            first_metric=find_metric(arguments.sort, columns, rows) if arguments.sort else "",
            home=os.path.expanduser("~"),
        )
        print("\n".join(table_lines(columns, rows, view)))
    else:
        print(_nothing_yet(root))
    return 0


def _print_bytes(root: str) -> int:
    path = os.path.join(root, results.SUMMARY)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        print(_nothing_yet(root), file=sys.stderr)
        return 0
    except OSError as error:
        raise LfsvcError(f"{path} cannot be read: {error.strerror}.", f"ls -l {path}") from error
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return 0


def _nothing_yet(root: str) -> str:
    return f"No evaluation has ended yet; the first one begins {os.path.join(root, results.SUMMARY)}."


# -- rows -------------------------------------------------------------------------------------------


def metrics_of(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Name the columns that hold numbers: LLaMA-Factory's metrics, and what people rate by numbers."""
    found = []
    for column in columns:
        numeric = [results.number(row[column]) is not None for row in rows if row[column].strip()]
        # A word that somebody wrote into a metric, such as n/a, does not end it.
        if column not in results.FIXED and any(numeric) and (all(numeric) or results.is_metric(column, ())):
            found.append(column)
    return found


def find_metric(word: str, columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Find the metric that is meant: by its name, or by the end of it where only one ends so.

    Raises:
        WrongUse: there is none or more than one; names them all.
    """
    metrics = metrics_of(columns, rows)
    if word in metrics:
        return word
    close = [metric for metric in metrics if metric.endswith((f"_{word}", f"/{word}"))]
    if len(close) == 1:
        return close[0]
    problem = "is the end of several metrics" if close else "is no metric of the table"
    raise WrongUse(f"{word!r} {problem}.", "the metrics are " + ", ".join(close or metrics))


def by_metric(rows: Sequence[Row], metric: str) -> list[Row]:
    """Sort by a metric, best first (highest first where that is unknown); rows without a number of it last."""
    sign = 1 if results.better(metric) == "lower" else -1

    def key(row: Row) -> tuple[bool, float]:
        value = _finite(row[metric])
        return value is None, 0.0 if value is None else sign * value

    return sorted(rows, key=key)


def _sorted(columns: Sequence[str], rows: Sequence[Row], word: str | None) -> list[Row]:
    # ISO 8601 sorts as text; a row without a time is last.
    newest = sorted(rows, key=lambda row: row.get("finished_at", ""), reverse=True)
    return by_metric(newest, find_metric(word, columns, rows)) if word else newest


def _finite(cell: str) -> float | None:
    value = results.number(cell)
    return value if value is not None and math.isfinite(value) else None


def _documents(columns: Sequence[str], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for programs: numbers as numbers, null for NaN and infinity, which JSON lacks; empty cells left out."""
    metrics = set(metrics_of(columns, rows))
    return [
        {
            printable(column): _finite(row[column])
            if column in metrics and results.number(row[column]) is not None
            else _writable(row[column])
            for column in columns
            if row[column].strip()
        }
        for row in rows
    ]


def _writable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# -- the table --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class View:
    """How the table is to look. `width` in columns of the terminal; 0 cuts nothing."""

    width: int = 0
    bold: bool = False
    everything: bool = False
    first_metric: str = ""
    home: str = ""


@dataclass(kw_only=True)
class Column:
    """A column as it is shown. `rank`: the lowest are given up first where there is no room."""

    title: str
    cells: list[str]
    rank: int
    right: bool = False

    @property
    def width(self) -> int:
        """Columns of the terminal that it takes."""
        return max(map(text_width, [self.title, *self.cells]))


def table_lines(columns: Sequence[str], rows: Sequence[Row], view: View) -> list[str]:
    """The screen of `lfsvc results`: names, metrics with the best of each marked, notes, time and path."""
    chosen = shown_columns(columns, rows, view)
    shown = fit(chosen, 0 if view.everything else view.width)
    left_out = [column.title for column in chosen if column not in shown]
    widths = [column.width for column in shown]
    lines = []
    for place in range(-1, len(rows)):
        cells = [column.title if place < 0 else column.cells[place] for column in shown]
        padded = [_pad(*item) for item in zip(cells, widths, shown, strict=True)]
        if view.bold:
            padded = [f"{BOLD}{text}{PLAIN}" if _is_best(text) and place >= 0 else text for text in padded]
        lines.append(GAP.join(padded).rstrip())
    if left_out:
        lines.append(f"No room for {', '.join(left_out)}: --all shows every column.")
    return lines


def shown_columns(columns: Sequence[str], rows: Sequence[Row], view: View) -> list[Column]:
    """Choose the columns: those with content and without noise, or all; the path last."""
    metrics = metrics_of(columns, rows)
    own = [name for name in columns if name not in results.FIXED and name not in metrics]

    def text(name: str, rank: int, title: str = "") -> Column:
        cells = [_short(printable(row.get(name, "")), view.home) for row in rows]
        return Column(title=title or printable(name), cells=cells, rank=rank)

    shown = [text("run", RANK_RUN), text("mode", 20), text("type", 21)]
    if view.everything:
        shown.append(text("model", 22))
    for name in metrics:
        if view.everything or name == view.first_metric or not name.endswith(NOISE):
            rank = RANK_SORTED if name == view.first_metric else _rank(name)
            shown.append(Column(title=printable(name), cells=_metric_cells(name, rows), rank=rank, right=True))
    shown += [text(name, 1) for name in own]
    finished = text("finished_at", 2, "finished")
    finished.cells = list(map(_local, finished.cells))
    shown += [finished, text("path", 0)]
    return [column for column in shown if any(cell.strip() for cell in column.cells)]


def _rank(metric: str) -> int:
    """What tells more is given up later: the parts of a benchmark first, then what has no better direction."""
    if metric in results.CATEGORIES and metric != "average":
        return 10
    return 100 if results.better(metric) else 15


def fit(columns: list[Column], width: int) -> list[Column]:
    """Give the columns that there is room for; a path is first cut, then left out."""
    while width and columns:
        surplus = sum(column.width for column in columns) + len(GAP) * (len(columns) - 1) - width
        if surplus <= 0:
            break
        # Of equal rank the rightmost goes.
        place = min(range(len(columns)), key=lambda index: (columns[index].rank, -index))
        column = columns[place]
        room = column.width - surplus
        if (column.title in ("path", "run") and room >= SHORTEST) or len(columns) == 1:
            column.cells = [_cut(cell, max(room, 1)) for cell in column.cells]
            break
        columns = columns[:place] + columns[place + 1 :]
    return columns


def _metric_cells(name: str, rows: Sequence[Row]) -> list[str]:
    """The numbers of a metric, the best marked with `*` where more than one row has it."""
    values = [_finite(row[name]) for row in rows]
    numbers = [value for value in values if value is not None]
    choose = {"lower": min, "higher": max}.get(results.better(name))
    best = choose(numbers) if choose is not None and len(numbers) > 1 else None
    # A blank where others have a mark keeps the digits under one another.
    return [
        human_number(row[name]) + ("*" if best is not None and value == best else " ")
        for row, value in zip(rows, values, strict=True)
    ]


def _is_best(cell: str) -> bool:
    return cell.endswith("*") and results.number(cell[:-1]) is not None


def human_number(cell: str) -> str:
    """A number with four significant digits; whole numbers as they are."""
    value = results.number(cell)
    if value is None or not math.isfinite(value) or cell.strip().isdigit():
        return printable(cell.strip())
    if value == 0:
        return "0"
    text = f"{value:#.4g}".rstrip(".")
    return text if "e" not in text else f"{value:.0f}" if 1 <= abs(value) < 1e9 else f"{value:.3e}"


def _pad(text: str, width: int, column: Column) -> str:
    blanks = " " * (width - text_width(text))
    return blanks + text if column.right else text + blanks


def _cut(text: str, width: int) -> str:
    """Cut a text from the left, where a path tells least."""
    if text_width(text) <= width:
        return text
    while text and text_width(text) > width - 1:
        text = text[1:]
    return f"\N{HORIZONTAL ELLIPSIS}{text}"


def _short(path: str, home: str) -> str:
    if home and home != "/" and (path == home or path.startswith(f"{home}/")):
        return "~" + path[len(home) :]
    return path


def _local(iso: str) -> str:
    """The local time of an ISO 8601 time in UTC; what somebody else wrote there as it is."""
    import calendar

    try:
        seconds = calendar.timegm(time.strptime(iso, "%Y-%m-%dT%H:%M:%SZ"))
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError):
        return iso
