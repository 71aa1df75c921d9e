"""What an evaluation wrote → one row of summary.csv, the table of all evaluations.

The table is one that people edit. Its first columns are FIXED, then come the metrics, sorted, then
every other column in the order in which it stood: those are somebody's own, and so are rows whose
folder is no longer there. Whatever a spreadsheet made of the file is read; written is UTF-8 with
commas. The runner imports this before it needs it: the standard library only, nothing imported later.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import itertools
import json
import os
import stat
import time

from lfsvc.errors import LfsvcError
from lfsvc.files import fingerprint, replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypedDict

    Identity = tuple[int, int, int]
    Snapshot = dict[str, Identity]
    Metrics = dict[str, int | float]

    class Run(TypedDict):
        """An evaluation that has ended. `finished_at` in microseconds since the epoch, `path` absolute."""

        run: str
        mode: str
        type: str
        model: str
        path: str
        finished_at: int


SUMMARY = "summary.csv"
LOCK = ".summary.lock"
FIXED = ("run", "mode", "type", "model", "finished_at", "path")

BENCHMARK_LOG = "results.log"
MODE_RESULTS = ("eval_results.json", "predict_results.json")
ALL_RESULTS = "all_results.json"
RESULT_FILES = (*MODE_RESULTS, ALL_RESULTS, BENCHMARK_LOG)

# What LLaMA-Factory calls its metrics: do_eval and do_predict by prefix, benchmarks by category.
# Source: the workflow.py of each stage, eval/evaluator.py and SUBJECTS in extras/constants.py of 0.9.3.
METRIC_PREFIXES = ("eval_", "predict_")
CATEGORIES = ("average", "stem", "social_sciences", "humanities", "other")
# A training's own numbers, beside train_*, which all_results.json keeps with those of an evaluation.
TRAINING_KEYS = ("epoch", "total_flos", "num_input_tokens_seen")

# How the names of metrics end for which a direction is known to be better; bleu-4 and rouge-l end as bleu and rouge.
LOWER = ("loss", "perplexity", "wer", "cer", "runtime", "preparation_time")
HIGHER = ("accuracy", "accuracies", "margins", "f1", "exact_match", "bleu", "rouge", "per_second", *CATEGORIES)

# Others hold the lock for milliseconds; one that is stopped must not keep this job's devices.
LOCK_SECONDS = 10.0
LOCK_PAUSE_SECONDS = 0.05

# A spreadsheet takes a cell for a formula by its first character.
FORMULA = ("=", "+", "-", "@")


class Damaged(Exception):
    """The file is no table of results."""


class Table:
    """summary.csv by position: a header may name a column twice or not at all. All rows are as long as the header.

    `bom`: the file began with a byte order mark, which Excel needs. `intact`: every quote had its partner.
    """

    __slots__ = ("bom", "header", "intact", "rows")

    def __init__(self, header: Sequence[str], rows: list[list[str]], *, bom: bool = False, intact: bool = True) -> None:
        width = max([len(header), *map(len, rows)])
        full = [[*row, *[""] * (width - len(row))] for row in [list(header), *rows]]
        # Spreadsheets leave columns that hold nothing.
        kept = [position for position in range(width) if any(row[position] for row in full)]
        self.header, *self.rows = [[row[position] for position in kept] for row in full]
        self.bom = bom
        self.intact = intact


# -- what a step wrote ------------------------------------------------------------------------------


def snapshot(folder: str) -> Snapshot:
    """Give inode, size and mtime in ns of each result file in a folder; {} where it is not there."""
    found = {name: fingerprint(os.path.join(folder, name)) for name in RESULT_FILES}
    return {name: identity for name, identity in found.items() if identity is not None}


def changed(folder: str, before: Snapshot) -> list[str]:
    """Name the result files that were written since `before`, whatever the clock says."""
    return [name for name, identity in snapshot(folder).items() if before.get(name) != identity]


def collect(root: str, run: Run, before: Snapshot) -> list[str]:
    """Put what an evaluation wrote into `root`/summary.csv, one row for each folder; give warnings.

    The table is replaced whole or not at all, and survives a power cut. Without anything fresh it is
    left alone.

    Raises:
        OSError: it cannot be read, written or locked, and is as it was.
    """
    warnings: list[str] = []
    metrics = read_metrics(run["path"], changed(run["path"], before), warnings)
    if not metrics:
        return warnings or [f"the evaluation wrote no results into {run['path']}: {SUMMARY} is as it was"]
    _refresh(root, run, metrics, warnings)
    return warnings


def read_metrics(folder: str, fresh: Sequence[str], warnings: list[str]) -> Metrics:
    """Read the numbers out of those files that this step wrote; what cannot be read becomes a warning."""
    # all_results.json keeps the numbers of earlier runs as well, so only where there is nothing better.
    names = [name for name in fresh if name != ALL_RESULTS] or fresh
    metrics: Metrics = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            data = _read(path)
            found = parse_benchmark(data) if name == BENCHMARK_LOG else parse_results(data)
        except (OSError, ValueError, RecursionError) as error:
            warnings.append(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no JSON object'}")
            continue
        for key, value in found.items():
            if name != ALL_RESULTS or not (key.startswith("train_") or key in TRAINING_KEYS):
                metrics[key] = value
    return metrics


def parse_results(data: bytes) -> Metrics:
    """Read the numbers of a *_results.json, NaN and Infinity included.

    Raises:
        ValueError, RecursionError: it is no JSON object.
    """
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("no object")
    # type(), for a truth value is an int as well. A name of ours would take a column away.
    numbers = {_line(key): value for key, value in document.items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if name not in FIXED}


def parse_benchmark(data: bytes) -> Metrics:
    """Read the lines `        Average: 93.21` of a results.log; percent, by category in lower snake case."""
    metrics: Metrics = {}
    for line in data.decode("utf-8", "replace").splitlines():
        label, _, text = line.rpartition(":")
        name = "_".join("".join(c if c.isalnum() else " " for c in label.lower()).split())
        value = number(text)
        if name and name not in FIXED and value is not None:
            metrics[name] = value
    return metrics


# -- the table --------------------------------------------------------------------------------------


def read_table(root: str) -> tuple[list[str], list[dict[str, str]]]:
    """Read summary.csv as columns and rows; both empty where there is none yet.

    A name that occurs twice gets a number, a column without one is `column N`.

    Raises:
        LfsvcError: the file cannot be read or is no table.
    """
    path = os.path.join(root, SUMMARY)
    try:
        table = parse(_read(path))
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise LfsvcError(f"{path} cannot be read: {error.strerror or error}.", f"ls -l {path}") from error
    except Damaged:
        raise LfsvcError(
            f"{path} is no table of results: its first line must name the columns {', '.join(FIXED)}.",
            "mend that line, or move the file away: the next evaluation starts a new one",
        ) from None
    columns: list[str] = []
    for position, name in enumerate(table.header, start=1):
        unique = name or f"column {position}"
        columns.append(unique if unique not in columns else f"{unique} ({position})")
    return columns, [dict(zip(columns, map(_unguarded, row), strict=True)) for row in table.rows]


def parse(data: bytes) -> Table:
    """Read a summary.csv, whatever a spreadsheet or a person made of it.

    Bytes that are not UTF-8 are kept as they are (surrogateescape).

    Raises:
        Damaged: it does not have the columns of one.
    """
    bom = data.startswith(b"\xef\xbb\xbf")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        # What Excel calls Unicode text.
        text, bom = data.decode("utf-16", "replace"), True
    else:
        text = data[3 * bom :].decode("utf-8", "surrogateescape")
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    if not text.strip():
        return Table(FIXED, [], bom=bom)
    if "\0" in text:
        raise Damaged
    first, _, rest = text.partition("\n")
    if first.startswith("sep="):
        text, first = rest, rest.partition("\n")[0]
    delimiter = max(",;\t", key=lambda mark: _known(first.replace('"', "").split(mark)))
    intact = True
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error:
        # A quote without a partner would swallow all rows after it: it shall harm its own line only.
        intact = False
        try:
            rows = [row for line in text.split("\n") for row in csv.reader([line], delimiter=delimiter)]
        except csv.Error:
            raise Damaged from None
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    header = [cell.strip() for cell in rows[0]] if rows else []
    if _known(header) < len(FIXED) // 2:
        raise Damaged
    return Table(header, rows[1:], bom=bom, intact=intact)


def _known(cells: Sequence[str]) -> int:
    return len({cell.strip() for cell in cells} & set(FIXED))


def render(table: Table) -> bytes:
    """Write a table as the bytes of summary.csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
    return (b"\xef\xbb\xbf" if table.bom else b"") + text.getvalue().encode("utf-8", "surrogateescape")


def updated(table: Table, run: Run, metrics: Mapping[str, int | float]) -> Table:
    """Give the table with the row of this run: in place of its folder's last row, else at the end.

    What stands in that row under somebody's own columns stays; metrics that this run lacks go.
    """
    own: dict[str, int] = {}
    for position, name in enumerate(table.header):
        if name in FIXED or name in metrics or is_metric(name, (row[position] for row in table.rows)):
            own.setdefault(name, position)
    names = [*FIXED, *sorted((own.keys() | metrics.keys()) - set(FIXED))]
    others = [position for position in range(len(table.header)) if position not in own.values()]
    order = [*[own.get(name, -1) for name in names], *others]
    rows = [[row[position] if position >= 0 else "" for position in order] for row in table.rows]
    folder = os.path.realpath(run["path"])
    values = {
        **{key: _text(run[key]) for key in ("run", "mode", "type", "model")},
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run["finished_at"] // 1_000_000)),
        "path": folder,
        **{name: repr(value) for name, value in metrics.items()},
    }
    fresh = [values.get(name, "") for name in names]
    place = FIXED.index("path")
    same = [row for row in rows if row[place].startswith("/") and os.path.realpath(row[place]) == folder]
    if same:
        # The last one: whoever copied a row keeps the copy as a record.
        same[-1][: len(names)] = fresh
    else:
        rows.append([*fresh, *[""] * len(others)])
    header = [*names, *[table.header[position] for position in others]]
    return Table(header, rows, bom=table.bom)


def is_metric(name: str, cells: Iterable[str]) -> bool:
    """Whether a column is a metric of LLaMA-Factory by its name and its cells; else it is somebody's own."""
    named = name.startswith(METRIC_PREFIXES) or name in CATEGORIES or name in TRAINING_KEYS
    return named and all(not cell.strip() or number(cell) is not None for cell in cells)


def better(metric: str) -> str:
    """Say which direction of a metric is better: "lower", "higher", or "" where unknown."""
    for stem in (metric, metric.rpartition("-")[0]):
        for direction, ends in (("lower", LOWER), ("higher", HIGHER)):
            if any(stem == end or stem.endswith((f"_{end}", f"/{end}")) for end in ends):
                return direction
    return ""


def number(cell: str) -> float | None:
    """Read a cell as a number, with a decimal comma where a spreadsheet put one; None where it is none."""
    text = cell.strip()
    if "," in text and "." not in text:
        text = text.replace(",", ".", 1)
    try:
        return float(text)
    except ValueError:
        return None


def _line(text: str) -> str:
    """A text without line breaks and other control characters, and such that it can be written."""
    text = "".join(c if c.isprintable() or ord(c) >= 0xA0 else " " for c in text)
    return "".join("?" if "\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" else c for c in text)


def _text(text: str) -> str:
    """A cell of ours that no spreadsheet takes for a formula: the apostrophe means text there."""
    text = _line(text)
    return f"'{text}" if text.startswith(FORMULA) else text


def _unguarded(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA) else cell


# -- the file ---------------------------------------------------------------------------------------


def _refresh(root: str, run: Run, metrics: Metrics, warnings: list[str]) -> None:
    os.makedirs(root, mode=0o700, exist_ok=True)
    # Somebody may keep the table elsewhere and a link here.
    path = os.path.realpath(os.path.join(root, SUMMARY))
    lock = _locked(os.path.join(os.path.dirname(path), LOCK))
    try:
        try:
            data, mode = _read(path), stat.S_IMODE(os.stat(path).st_mode)
        except FileNotFoundError:
            data, mode = b"", 0o600
        try:
            table = parse(data)
            problem = "" if table.intact else "had a quote without a partner and was read line by line"
        except Damaged:
            table, problem = Table(FIXED, []), "was no table of results and is begun anew"
        if problem:
            warnings.append(f"{path} {problem}; what it was is kept as {_set_aside(path, data)}")
        replace_file(path, render(updated(table, run, metrics)), mode=mode, durable=True)
        # The umask takes rights away that the file had.
        os.chmod(path, mode)
    finally:
        os.close(lock)


def _read(path: str) -> bytes:
    # A FIFO by that name would be waited for.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def _set_aside(path: str, data: bytes) -> str:
    """Keep the bytes of a table beside it; give the path. To be called under the lock."""
    names = (f"{path}.damaged-{place}" for place in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    replace_file(free, data, mode=0o600, durable=True)
    return free


def _locked(path: str) -> int:
    """Take the lock at `path`, by a descriptor to close; without one where the file system knows no locks.

    Raises:
        OSError: somebody holds it for longer than anybody needs it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return fd
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR) or time.monotonic() > deadline:
                os.close(fd)
                raise
        time.sleep(LOCK_PAUSE_SECONDS)
