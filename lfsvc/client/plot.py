"""Training loss curves: trainer_log.jsonl → a PNG or SVG file, with matplotlib where it is installed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import Any

from lfsvc.errors import LfsvcError, WrongUse
from lfsvc.files import replace_file

TRAINER_LOG = "trainer_log.jsonl"
FORMATS = {".png": "png", ".svg": "svg"}
DEFAULT_OUTPUT = "loss.png"

# From this many points on a smoothed line tells more than the points do.
LONG = 40
# The smoothed line is a mean over this part of the curve.
SMOOTHED_PART = 1 / 20

LABEL_CHARACTERS = 48

# Colours of Okabe and Ito, which colour-blind people tell apart; then the same with other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
# matplotlib's own font has no Chinese, Japanese or Korean; the first of these that is installed has.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "SimHei",
    "Microsoft YaHei",
    "PingFang SC",
)

Points = list[tuple[int, float]]


def plot(words: Sequence[str], output: str) -> int:
    """Draw the losses of trainings, given by job ID or folder, into a file; those without a loss are left out.

    Raises:
        LfsvcError: nothing can be drawn.
    """
    format_of(output)
    if not words:
        raise WrongUse("--plot needs the IDs or folders of trainings.", "lfsvc results --plot loss 12 13")
    require_matplotlib()
    trainings = find_trainings(words)
    curves: list[Curve] = []
    problems: list[LfsvcError] = []
    for training, label in zip(trainings, labels(trainings), strict=True):
        try:
            curves.append(Curve(label=label, points=load_points(training.folder, training.who)))
        except LfsvcError as error:
            problems.append(error)
    if not curves:
        raise problems[0]
    for problem in problems:
        print(f"lfsvc: {problem}", file=sys.stderr)
    draw(curves, output)
    print(output)
    return 0


# -- trainings --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be drawn. `distinct` is a name that no other has, `who` begins a sentence about it."""

    name: str
    distinct: str
    who: str
    folder: str


def find_trainings(words: Sequence[str]) -> list[Training]:
    """Find trainings by job ID or folder, each folder once. A folder named by digits is asked for as ./12.

    Raises:
        LfsvcError: there is no such job or folder, or the job is no training.
    """
    client: Any = None
    found: dict[str, Training] = {}
    for word in words:
        if word.isascii() and word.isdigit():
            number = _number(word)
            if client is None:
                from lfsvc.client.api import Client

                client = Client.connect()
            training = training_of(client.call("GetJob", "t", number))
        else:
            training = _training_in(word)
        found.setdefault(os.path.realpath(training.folder), training)
    return list(found.values())


def _number(word: str) -> int:
    # A job's ID is 64 bits wide on the bus.
    number = int(word[:20])
    if not 0 < number < 2**63:
        raise WrongUse(f"{word} is not the number of a job.", "lfsvc list shows the IDs")
    return number


def _training_in(word: str) -> Training:
    folder = os.path.abspath(word)
    if not os.path.isdir(folder):
        raise WrongUse(f"{word} is neither the ID of a job nor a folder.", "lfsvc list shows the IDs")
    return Training(name=os.path.basename(folder), distinct=folder, who=word, folder=folder)


def training_of(job: dict[str, Any]) -> Training:
    """Give the training that a job is.

    Raises:
        LfsvcError: it does not train.
    """
    if job["command"] != "train" or not job.get("output_dir"):
        hint = f"its training is job {job['parent']}" if job.get("parent") else "name a training"
        raise LfsvcError(f"Job {job['id']} ({job['command']}) has no training loss.", hint)
    name = job.get("name") or os.path.basename(job["path"]).removesuffix(".yaml")
    return Training(name=name, distinct=f"{name} ({job['id']})", who=f"Job {job['id']}", folder=job["output_dir"])


def labels(trainings: Sequence[Training]) -> list[str]:
    """Name each curve: a name that occurs twice gets the job's ID, or gives way to the folder."""
    names = [training.name for training in trainings]
    return [training.distinct if names.count(training.name) > 1 else training.name for training in trainings]


# -- losses -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss of one training: (step, loss) in the order of the steps."""

    label: str
    points: Points


def read_points(data: bytes) -> Points:
    """Read (step, loss) out of a trainer_log.jsonl, of its last run; lines that are broken are passed over.

    LLaMA-Factory appends to the file. Where the steps do not go on, either a new training began, and only
    it counts, or the training was resumed from a checkpoint, and what it did before that one counts as
    well. A new one begins no later than its own logging interval.
    """
    runs: list[Points] = []
    for line in data.splitlines():
        point = _point(line)
        if point is None:
            continue
        if not runs or point[0] <= runs[-1][-1][0]:
            runs.append([])
        runs[-1].append(point)
    points: Points = []
    for run in runs:
        start = run[0][0]
        interval = run[1][0] - start if len(run) > 1 else 0
        points = [point for point in points if point[0] < start] if start > interval else []
        points += run
    return points


def _point(line: bytes) -> tuple[int, float] | None:
    try:
        entry = json.loads(line)
        step, loss = entry["current_steps"], entry["loss"]
        return (step, float(loss)) if type(step) is int and type(loss) in (int, float) else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def load_points(folder: str, who: str) -> Points:
    """Read the losses of the training in a folder; `who` begins the sentence where there are none.

    Raises:
        LfsvcError: there is no log, or no loss in it.
    """
    path = os.path.join(folder, TRAINER_LOG)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise LfsvcError(f"{who} has no training log: {path}: {error.strerror}.") from error
    points = read_points(data)
    if not any(math.isfinite(loss) for _, loss in points):
        raise LfsvcError(f"{who} has no loss yet in {path}.", "LLaMA-Factory writes one every logging_steps")
    return points


def smoothed(values: Sequence[float]) -> list[float]:
    """Give the mean around each value, so that the line does not lag.

    The window is narrower at the start, where losses fall steeply, and lacks its right side at the end,
    or the last values alone would be a hook. What is not finite is left out of the means; where nothing
    else is near, it stays.
    """
    reach = max(2, round(len(values) * SMOOTHED_PART / 2))
    sums = [0.0, *accumulate(value if math.isfinite(value) else 0.0 for value in values)]
    counts = [0, *accumulate(math.isfinite(value) for value in values)]
    means = []
    for place, value in enumerate(values):
        near = min(reach, place)
        first, end = place - near, min(place + near + 1, len(values))
        count = counts[end] - counts[first]
        means.append((sums[end] - sums[first]) / count if count else value)
    return means


# -- drawing ----------------------------------------------------------------------------------------


def format_of(output: str) -> str:
    """Give the format that a file's name asks for.

    Raises:
        WrongUse: it is neither .png nor .svg.
    """
    extension = os.path.splitext(output)[1].lower()
    if extension not in FORMATS:
        raise WrongUse(f"{output} must end in {' or '.join(FORMATS)}.", f"-o {DEFAULT_OUTPUT}")
    return FORMATS[extension]


def require_matplotlib() -> None:
    """See that curves can be drawn.

    Raises:
        LfsvcError: matplotlib is not installed, or broken.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "matplotlib"
        why = "" if missing else f", which cannot be imported: {error}"
        raise LfsvcError(f"Drawing curves needs matplotlib{why}.", "pip install 'lfsvc[plot]'") from None


def draw(curves: Sequence[Curve], output: str) -> None:
    """Draw curves into a file, which is replaced whole or not at all.

    Raises:
        LfsvcError: matplotlib is missing, or the file cannot be written.
    """
    file_format = format_of(output)
    require_matplotlib()
    data = _render(curves, file_format)
    try:
        replace_file(os.path.realpath(output), data, mode=0o666, durable=False)
    except OSError as error:
        raise LfsvcError(f"{output} cannot be written: {error.strerror}.", "name another file with -o") from error


def _render(curves: Sequence[Curve], file_format: str) -> bytes:
    """Without pyplot, which would look for a display and keep state."""
    import io
    import warnings

    matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    style = {"font.family": ["sans-serif"], "font.sans-serif": _fonts(), "text.usetex": False, "svg.hashsalt": "lfsvc"}
    buffer = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A character that no font has is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = figures.Figure(figsize=(8, 4.8), dpi=160, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        handles = [_draw_curve(axes, curve, place) for place, curve in enumerate(curves)]
        _dress(axes, curves, handles)
        figure.savefig(buffer, format=file_format, metadata={"Date": None} if file_format == "svg" else None)
    return buffer.getvalue()


def _draw_curve(axes: Any, curve: Curve, place: int) -> Any:
    """Draw a curve and give the line that stands for it in the legend."""
    steps = [step for step, _ in curve.points]
    losses = [loss if math.isfinite(loss) else math.nan for _, loss in curve.points]
    look = {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
        "zorder": 3,
    }
    if len(losses) < LONG:
        (line,) = axes.plot(steps, losses, linewidth=1.6, marker="o", markersize=3, **look)
        return line
    axes.plot(steps, losses, color=look["color"], linewidth=0.7, alpha=0.3, zorder=2)
    (line,) = axes.plot(steps, smoothed(losses), linewidth=1.8, **look)
    return line


def _dress(axes: Any, curves: Sequence[Curve], handles: list[Any]) -> None:
    ticker = import_module("matplotlib.ticker")
    one = len(curves) == 1
    axes.set_title(f"Training loss of {_plain(curves[0].label)}" if one else "Training loss", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if not one:
        # matplotlib leaves out a label that begins with _.
        labels = [" " * label.startswith("_") + label for label in (_plain(curve.label) for curve in curves)]
        outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(curves) > 6 else {"loc": "upper right"}
        axes.legend(handles, labels, frameon=False, fontsize="small", **outside)


def _plain(label: str) -> str:
    """A label that is text and no mathematics (`$`), and not so long that it covers the curves."""
    text = "".join(c if c.isprintable() else "?" for c in label)
    if len(text) > LABEL_CHARACTERS:
        text = "\N{HORIZONTAL ELLIPSIS}" + text[1 - LABEL_CHARACTERS :]
    return text.replace("$", r"\$")


def _fonts() -> list[str]:
    manager = import_module("matplotlib.font_manager")
    installed = set(manager.get_font_names())
    return ["DejaVu Sans", *[font for font in CJK_FONTS if font in installed][:1]]
