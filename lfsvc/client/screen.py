"""The screens of status, list, show and watch: dictionaries of the bus → lines of styled text. Pure.

Names, paths and failures come from outside: each passes `printable` before it becomes part of a line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfsvc.client.output import Line, plain
from lfsvc.wording import (
    ELLIPSIS,
    ago,
    clock,
    cut,
    duration,
    local_time,
    loss,
    percentage,
    printable,
    progress_text,
    text_width,
    wrap,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


Job = dict[str, Any]

GAP = "  "
# A name that is cut shorter than this tells nothing.
SHORTEST_NAME = 12
WIDEST_BAR, SHORTEST_BAR = 40, 10
FAILURE_LINES = 2
# Of a long queue, so many are shown however low the terminal is.
FEWEST_WAITING = 3

NOTHING_YET = "Nothing has been submitted yet. Try: lfsvc submit train:/abs/config.yaml@0,1"


def fitted(line: Line, width: int) -> Line:
    """Cut a line to a width; 0 cuts nothing."""
    if width <= 0 or text_width(plain(line)) <= width:
        return line
    kept: Line = []
    left = width
    for text, style in line:
        if text_width(text) >= left:
            return [*kept, (cut(text + ELLIPSIS, left), style)]
        kept.append((text, style))
        left -= text_width(text)
    return kept


# -- what is said of a job --------------------------------------------------------------------------


def title(job: Job) -> str:
    """The name that the user gave it, or that of its file."""
    return printable(job.get("name") or job["path"].rsplit("/", 1)[-1])


def devices(job: Job, *, short: bool = False) -> str:
    """`@0,1,2,3`, which a task may be given; `short`: `@0-3`; "" where it names none."""
    numbers: list[int] = job.get("devices", [])
    if not numbers:
        return ""
    if short and len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"@{numbers[0]}-{numbers[-1]}"
    return "@" + ",".join(map(str, numbers))


def took(job: Job, now: float = 0.0) -> str:
    """How long it ran, or has run until `now` (seconds since the epoch); "" where it never did."""
    if not job.get("started_at"):
        return ""
    end = job["finished_at"] / 1e6 if job.get("finished_at") else now
    return duration(end - job["started_at"] / 1e6) if end else ""


def _ended(job: Job, now: float) -> str:
    words = ago(now - job["finished_at"] / 1e6) if job.get("finished_at") else ""
    # A failure says more.
    return (
        f"{words}, exit status {job['exit_status']}"
        if job.get("exit_status", 0) > 0 and "failure" not in job
        else words
    )


def _step(job: Job) -> str:
    """What the running job does beside its command: `merge for 3 min 5 s`; "" while it does that."""
    return job["step"] if job.get("step") not in (None, job["command"]) else ""


def progress_line(job: Job, width: int, now: float) -> Line:
    """How far a running job is, with a bar where `width` (columns) has room for one; [] where nothing is known."""
    progress = job.get("progress", {})
    words = [percentage(progress)]
    if "percentage" in progress and progress.get("total_steps"):
        words.append(f"step {progress.get('current_steps', 0)}/{progress['total_steps']}")
    words.append(loss(progress))
    if progress.get("remaining_time"):
        words.append(f"{duration(progress['remaining_time'])} left")
    if step := _step(job):
        begin = next((item.get("started_at", 0) for item in job.get("steps", ()) if item["name"] == step), 0)
        words.insert(0, f"step {step}" + (f" for {duration(now - begin / 1e6)}" if begin and not progress else ""))
    text = GAP.join(word for word in words if word)
    if "percentage" not in progress or width <= 0:
        return [(text, "")] if text else []
    room = min(WIDEST_BAR, width - text_width(text) - len(GAP))
    return [*bar(progress["percentage"], room), (GAP + text, "")] if room >= SHORTEST_BAR else [(cut(text, width), "")]


def bar(percent: float, width: int) -> Line:
    """A progress bar; full at 100 and only then."""
    share = min(max(percent, 0.0), 100.0) / 100 if percent == percent else 0.0
    halves = int(share * width * 2)
    done = "\u2501" * (halves // 2) + "\u2578" * (halves % 2)
    return [(done, "bar"), ("\u2500" * (width - len(done)), "dim")]


# -- tables -----------------------------------------------------------------------------------------


def table(rows: Sequence[Line], width: int, *, name: int, right: tuple[int, ...] = (0,)) -> list[Line]:
    """Align cells in columns. Where there is no room, column `name` is cut first, then the line's end.

    `right` are the columns that are aligned at their right.
    """
    widths = [max(text_width(text) for text, _ in column) for column in zip(*rows, strict=True)]
    surplus = sum(widths) + len(GAP) * (sum(map(bool, widths)) - 1) - width
    if width > 0 and surplus > 0:
        widths[name] = max(min(SHORTEST_NAME, widths[name]), widths[name] - surplus)
    lines = []
    for row in rows:
        line: Line = []
        for place, ((text, style), room) in enumerate(zip(row, widths, strict=True)):
            if not room:
                continue
            shown = cut(text, room) if width > 0 else text
            blanks = " " * (room - text_width(shown))
            line += [(GAP, "")] if line else []
            line += [(blanks, ""), (shown, style)] if place in right else [(shown, style), (blanks, "")]
        lines.append(fitted([span for span in line if span[0]], width))
    return lines


def _failure(job: Job, indent: int, width: int, lines: int) -> list[Line]:
    if not job.get("failure"):
        return []
    text = printable(job["failure"])
    if width <= 0:
        return [[(" " * indent + text, job["state"])]]
    wrapped = wrap(text, width - indent)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], cut(" ".join(wrapped[lines - 1 :]), width - indent)]
    return [fitted([(" " * indent, ""), (text, job["state"])], width) for text in wrapped]


def list_lines(jobs: Sequence[Job], now: float, width: int) -> list[Line]:
    """The screen of `lfsvc list`; `now` in seconds since the epoch. A heading only on a terminal (a width)."""
    if not jobs:
        return []
    heading = [(word, "dim") for word in ("id", "state", "command", "name", "devices", "took", "ended")]
    rows: list[Line] = [heading] if width else []
    for job in jobs:
        ended = clock(job["finished_at"] / 1e6, now) if job.get("finished_at") else ""
        rows.append([*_cells(job, width), (took(job, now), ""), (ended, "dim")])
    lines = table(rows, width, name=3, right=(0, 5))
    shown = lines[:1] if width else []
    indent = _indent(jobs)
    for job, line in zip(jobs, lines[len(shown) :], strict=True):
        shown += [line, *_failure(job, indent, width, 1)]
    return shown


def _cells(job: Job, width: int) -> Line:
    state, where = job["state"], devices(job, short=width > 0)
    return [(str(job["id"]), ""), (state, state), (job["command"], ""), (title(job), "title"), (where, "")]


# -- status -----------------------------------------------------------------------------------------


def status_lines(
    status: dict[str, Any],
    recent: Sequence[Job],
    now: float,
    *,
    width: int = 0,
    height: int = 0,
    below: Mapping[int, list[Line]] | None = None,
) -> list[Line]:
    """The screen of `lfsvc status`; `now` in seconds since the epoch.

    In a terminal of `height` lines a long queue is cut; 0 shows all of it. `below` are lines that go below
    the job of this number while it runs.
    """
    running, waiting = status["running"], status["queue_length"]
    recent = sorted(recent, key=lambda job: job.get("finished_at", 0), reverse=True)
    head: Line = [(f"lfsvc {status['version']}", "title"), (f": {status['state']}, {waiting} waiting", "")]
    jobs = [*running, *status["queued"], *recent]
    if not jobs:
        return [fitted(head, width), *([(line, "")] for line in wrap(NOTHING_YET, width))]
    extra = _extra_lines(running, recent, jobs, now, width, below or {})
    taken = 4 + len(running) + len(recent) + sum(map(len, extra.values()))
    shown = status["queued"]
    if height and taken + len(shown) > height - 1:
        shown = shown[: max(height - 2 - taken, FEWEST_WAITING)]
        # Below what is shown; a longer id that is not would move them.
        jobs = [*running, *shown, *recent]
        extra = _extra_lines(running, recent, jobs, now, width, below or {})
    whens = [f"for {took(job, now)}" if took(job, now) else "" for job in running]
    # Nothing starts in a queue that is held.
    whens += positions([] if status["state"] == "paused" else running, shown, recent, now)
    whens += [_ended(job, now) for job in recent]
    groups = [running, shown, recent]
    rows = [[*_cells(job, width), (when, "")] for job, when in zip([*running, *shown, *recent], whens, strict=True)]
    lines_of_jobs = iter(table(rows, width, name=3))
    screen = [fitted(head, width)]
    for group in groups:
        screen += [[]] if group else []
        for job in group:
            screen += [next(lines_of_jobs), *extra.get(job["id"], [])]
        if group is shown and waiting > len(shown):
            screen.append(fitted([(" " * _indent(jobs) + f"and {waiting - len(shown)} more waiting", "dim")], width))
    return screen


def _indent(jobs: Sequence[Job]) -> int:
    """Where the second column of a table of these jobs begins."""
    return max(len(str(job["id"])) for job in jobs) + len(GAP)


def _extra_lines(
    running: Sequence[Job],
    recent: Sequence[Job],
    jobs: Sequence[Job],
    now: float,
    width: int,
    below: Mapping[int, list[Line]],
) -> dict[int, list[Line]]:
    """Job → the lines below its own: progress and `below`, or the failure."""
    indent = _indent(jobs)
    extra = {job["id"]: _failure(job, indent, width, FAILURE_LINES) for job in recent}
    for job in running:
        line = progress_line(job, max(width - indent, 1) if width else 0, now)
        lines = [*([line] if line else []), *below.get(job["id"], [])]
        extra[job["id"]] = [fitted([(" " * indent, ""), *line], width) if line else [] for line in lines]
    return extra


def positions(running: Sequence[Job], queued: Sequence[Job], recent: Sequence[Job], now: float) -> list[str]:
    """What is said of each waiting job: its position, and when it is expected to start where that is known."""
    words = []
    for place, (_, expected) in enumerate(zip(queued, expected_starts(running, queued, recent, now), strict=True), 1):
        start = ""
        if expected is not None:
            start = f", {'about' if expected[1] else 'after'} {clock(expected[0], now)}"
        words.append(f"position {place}{start}")
    return words


def expected_starts(
    running: Sequence[Job], queued: Sequence[Job], recent: Sequence[Job], now: float
) -> list[tuple[float, bool] | None]:
    """When each waiting job may start (seconds since the epoch), and whether that is more than the earliest time.

    The first starts when the running one ends, as far as the trainer knows. A later one starts when those
    before it have ended: so long as the same file took when it last succeeded; where that is not known
    (and from there on), only the earliest time is.
    """
    left = [job.get("progress", {}).get("remaining_time") for job in running]
    if not left or None in left:
        return [None] * len(queued)
    past = {
        (job["command"], job["path"]): (job["finished_at"] - job["started_at"]) / 1e6
        for job in reversed(recent)
        if job["state"] == "succeeded" and job.get("started_at") and job.get("finished_at")
    }
    start, known = now + min(left), True
    found: list[tuple[float, bool] | None] = []
    for job in queued:
        found.append((start, known))
        length = past.get((job["command"], job["path"]))
        known = known and length is not None
        start += length or 0.0
    return found


# -- show -------------------------------------------------------------------------------------------


def show_lines(
    job: Job,
    evaluations: Sequence[Job] = (),
    details: Mapping[str, Any] | None = None,
    *,
    now: float = 0.0,
    width: int = 0,
) -> list[Line]:
    """The screen of `lfsvc show`. Nothing is cut: what is too long is wrapped.

    `evaluations` are the jobs that its end queued; `details` is what else is known: `position` (of a waiting
    job), and from the job's folder `commands` (step → command line), `environment` (names), `files` (what → path).
    """
    details = details or {}
    rows: list[tuple[str, str, str]] = [("job", str(job["id"]), "title")]
    rows += [(key, str(job[key]), "") for key in ("name", "task") if key in job]
    rows.append(("state", job["state"] + details.get("position", ""), job["state"]))
    for key, style in (("failure", "failed"), ("failed_step", ""), ("exit_status", ""), ("parent", "")):
        if job.get(key):
            rows.append((key.replace("_", " "), str(job[key]), style))
    rows += [("warning", warning, "warning") for warning in job.get("warnings", ())]
    rows.append(PART)
    rows += [(key, local_time(job[f"{key}_at"]), "") for key in ("queued", "started", "finished") if f"{key}_at" in job]
    if job.get("started_at") and took(job, now):
        rows.append(("took" if job.get("finished_at") else "runs for", took(job, now), ""))
    if job.get("attempts", 1) > 1:
        rows.append(("attempts", str(job["attempts"]), ""))
    if job.get("progress"):
        rows += _how_far(job)
    rows += [PART, *_steps(job, details.get("commands", {})), PART]
    rows += [("evaluation", _evaluation(item), item["state"]) for item in evaluations]
    rows.append(PART)
    rows += [(key.replace("_", " "), job[key], "") for key in ("output_dir", "model") if key in job]
    rows += [(what, path, "") for what, path in details.get("files", {}).items()]
    if details.get("environment"):
        rows.append(("environment", ", ".join(details["environment"]), "dim"))
    return _pairs(rows, width)


PART = ("", "", "")


def _pairs(rows: list[tuple[str, str, str]], width: int) -> list[Line]:
    """Keys at the right of their column, values beside them, wrapped at a width; PART parts two groups."""
    column = max(len(key) for key, _, _ in rows)
    lines: list[Line] = []
    for key, value, style in rows:
        if (key, value, style) == PART:
            # Never two in a row: a group may be empty.
            if lines and lines[-1]:
                lines.append([])
            continue
        room = width - column - len(GAP)
        pieces = wrap(printable(value), room) if width and room >= SHORTEST_NAME else [printable(value)]
        for piece in pieces:
            lines.append([(f"{key:>{column}}", "dim"), (GAP, ""), (piece, style)])
            key = ""
    return lines if lines[-1] else lines[:-1]


def _how_far(job: Job) -> list[tuple[str, str, str]]:
    """What the trainer said last: of a job that has ended, that it was at 100 % tells nothing."""
    progress = job["progress"]
    if job["state"] != "succeeded":
        return [("progress", progress_text(progress), "")]
    words = [f"{progress['current_steps']} steps"] if progress.get("current_steps") else []
    words += [f"{key} {progress[key]:.4g}" for key in ("loss", "epoch") if key in progress]
    # An evaluation has trained nothing.
    return [("trained", ", ".join(words), "")] if words else []


def _steps(job: Job, commands: Mapping[str, str]) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for step in job.get("steps", ()):
        text = step["state"]
        if took(step):
            text += f" in {took(step)}"
        if step.get("exit_status"):
            text += f", exit status {step['exit_status']}"
        if step.get("note"):
            text += f": {step['note']}"
        rows.append((f"step {step['name']}", text, step["state"]))
        more = [("command", commands[step["name"]], "")] if step["name"] in commands else []
        if step.get("log"):
            more.append(("log", step["log"], ""))
        rows += [*more, PART] if more else []
    return rows


def _evaluation(job: Job) -> str:
    failure = f": {job['failure']}" if job.get("failure") else ""
    return f"job {job['id']}, {job['state']}{failure}"
