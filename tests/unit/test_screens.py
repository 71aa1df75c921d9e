"""The screens, compared with stored ones at 80 and 140 columns.

LFSVC_UPDATE_SCREENS=1 stores them anew; then look at each.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.client import output, screen, show, watch
from lfsvc.client.output import Line, ansi, plain
from lfsvc.errors import LfsvcError, NoSuchJob, WrongUse
from lfsvc.wording import text_width

PATH = os.pathsep.join(sys.path)
SCREENS = Path(__file__).parent.parent / "data" / "screens"
UPDATE = os.environ.get("LFSVC_UPDATE_SCREENS")

Job = dict[str, Any]

# Sunday, 1 March 2026, 14:30 UTC.
NOW = 1772375400


def at(seconds_ago: float) -> int:
    """A time on the bus."""
    return int((NOW - seconds_ago) * 1_000_000)


H, MIN = 3600, 60
HOME = "/home/mei"


def job(number: int, command: str, path: str, state: str, **more: Any) -> Job:
    prefix = "" if command == "shell" else f"{command}:"
    suffix = "@" + ",".join(map(str, more["devices"])) if "devices" in more else ""
    return {
        "id": number, "task": f"{prefix}{path}{suffix}", "command": command, "path": path,
        "evaluate": command == "train", "state": state, "queued_at": at(9 * H), "attempts": 1, **more,
    }  # fmt: skip


def step(name: str, state: str, begin: float = 0, end: float = 0, **more: Any) -> Job:
    times = {"started_at": at(begin)} if begin else {}
    return {"name": name, "state": state, **times, **({"finished_at": at(end)} if end else {}), **more}


RUNS = f"{HOME}/saves/qwen3-8b/lora-r16"

TRAINING = job(
    42, "train", f"{HOME}/configs/qwen3_8b_lora_r16.yaml", "running", name="qwen3-8b-r16", devices=[0, 1, 2, 3],
    step="train", started_at=at(43 * MIN + 10), output_dir=RUNS, log=f"{RUNS}/llamafactory_train_20260301_134650.log",
    progress={"current_steps": 380, "total_steps": 1000, "percentage": 38.0, "loss": 0.41234, "lr": 8.2e-5,
              "epoch": 1.14, "elapsed_time": 2580, "remaining_time": 4320},
    steps=[step("train", "running", 43 * MIN + 10, log=f"{RUNS}/llamafactory_train_20260301_134650.log"),
           step("merge", "pending")],
)  # fmt: skip
WAITING = [
    job(43, "eval", f"{HOME}/bench/mmlu.yaml", "queued", devices=[0], parent=40),
    job(44, "train", f"{HOME}/configs/实验_对照组_学习率扫描_第三轮.yaml", "queued", devices=[0, 1, 2, 3, 4, 5, 6, 7]),
    job(45, "train", f"{HOME}/configs/llama3_dpo.yaml", "queued", name="🚀 dpo with the new preference pairs of March"),
    job(46, "shell", f"{HOME}/bin/upload_checkpoints.sh", "queued"),
]  # fmt: skip
OUT_OF_MEMORY = (
    "The train step failed: CUDA ran out of memory on GPU 0 (23.6 GiB): lower per_device_train_batch_size or"
    " cutoff_len, or set gradient_checkpointing. Its output is in"
    f" {HOME}/saves/llama3-70b/dpo/llamafactory_train_20260301_101500.log."
)
ENDED = [
    job(41, "train", f"{HOME}/configs/llama3_70b_dpo.yaml", "failed", devices=[0], exit_status=1, failed_step="train",
        failure=OUT_OF_MEMORY, started_at=at(50 * MIN), finished_at=at(44 * MIN)),
    job(40, "train", f"{HOME}/configs/sums.yaml", "succeeded", name="sums", devices=[0, 1], exit_status=0,
        started_at=at(3 * H), finished_at=at(51 * MIN), evaluations=[43]),
    job(39, "eval", f"{HOME}/bench/mmlu.yaml", "succeeded", devices=[0], exit_status=0, started_at=at(3.5 * H),
        finished_at=at(3.1 * H)),
    job(38, "shell", f"{HOME}/bin/prepare.sh", "killed", exit_status=143, started_at=at(8 * H), finished_at=at(7 * H)),
    job(37, "train", f"{HOME}/configs/old.yaml", "interrupted", exit_status=-1, started_at=at(60 * H),
        finished_at=at(50 * H),
        failure="The machine went down while it ran; it is queued again."),
]  # fmt: skip
CANCELLED = job(36, "shell", f"{HOME}/bin/later.sh", "cancelled", exit_status=-1, finished_at=at(51 * H))


def status(running: list[Job], queued: list[Job], length: int | None = None) -> Job:
    state = "running" if running else "idle"
    length = len(queued) if length is None else length
    return {"version": "0.2.0", "state": state, "running": running, "queued": queued, "queue_length": length}


LONG_QUEUE = [job(50 + n, "train", f"{HOME}/sweep/lr_{n:03}.yaml", "queued", devices=[n % 8]) for n in range(100)]
MERGING = {
    **TRAINING, "step": "merge", "progress": {},
    "steps": [step("train", "succeeded", 43 * MIN, 3 * MIN), step("merge", "running", 3 * MIN)],
}  # fmt: skip

SUCCEEDED = job(
    40, "train", f"{HOME}/configs/sums.yaml", "succeeded", name="sums", devices=[0, 1], exit_status=0,
    started_at=at(3 * H), finished_at=at(51 * MIN), evaluations=[43], output_dir=f"{HOME}/saves/sums",
    log=f"{HOME}/saves/sums/merge_lora_20260301_133200.log", model=f"{HOME}/saves/sums/merged",
    progress={"current_steps": 1000, "total_steps": 1000, "percentage": 100.0, "loss": 0.31, "epoch": 3.0},
    steps=[
        step("train", "succeeded", 3 * H, 58 * MIN, exit_status=0,
             log=f"{HOME}/saves/sums/llamafactory_train_20260301_113000.log"),
        step("merge", "succeeded", 58 * MIN, 51 * MIN, exit_status=0,
             log=f"{HOME}/saves/sums/merge_lora_20260301_133200.log"),
    ],
    warnings=["val_size is not set, so nothing is held back; the evaluation takes eval_dataset."],
)  # fmt: skip
DETAILS = {
    "commands": {
        "train": f"llamafactory-cli train {HOME}/saves/sums/sums_20260301_113000.yaml",
        "merge": f"llamafactory-cli export {HOME}/saves/sums/merge_lora_20260301_133200.yaml",
    },
    "files": {
        "working dir": HOME,
        "submitted": f"{HOME}/.local/state/lfsvc/jobs/40/snapshot.yaml",
        "job folder": f"{HOME}/.local/state/lfsvc/jobs/40",
    },
    "environment": [
        "ASCEND_RT_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "FORCE_TORCHRUN", "HF_HUB_OFFLINE",
        "HOME", "LANG", "LD_LIBRARY_PATH", "LFSVC_JOB_ID", "LLAMABOARD_WORKDIR", "PATH", "PYTHONUNBUFFERED",
    ],
}  # fmt: skip
FAILED = {
    **ENDED[0],
    "output_dir": f"{HOME}/saves/llama3-70b/dpo",
    "log": f"{HOME}/saves/llama3-70b/dpo/llamafactory_train_20260301_101500.log",
    "progress": {"current_steps": 12, "total_steps": 400, "percentage": 3.0, "loss": float("nan")},
    "steps": [
        step("train", "failed", 50 * MIN, 44 * MIN, exit_status=1,
             log=f"{HOME}/saves/llama3-70b/dpo/llamafactory_train_20260301_101500.log"),
        step("merge", "skipped", note="the training did not succeed"),
    ],
}  # fmt: skip
KILLED = {**ENDED[3], "log": f"{HOME}/.local/state/lfsvc/jobs/38/shell_20260301_063000.log",
          "steps": [step("shell", "killed", 8 * H, 7 * H, exit_status=143)]}  # fmt: skip

RUNNING = status([TRAINING], WAITING)
ERROR = NoSuchJob("There is no job 17.", "lfsvc list shows the last 100").text

# Screen → how it is made at a width.
CASES: dict[str, Callable[[int], list[Line]]] = {
    "status-idle": lambda width: screen.status_lines(status([], []), ENDED, NOW, width=width),
    "status-empty": lambda width: screen.status_lines(status([], []), [], NOW, width=width),
    "status-busy": lambda width: screen.status_lines(RUNNING, ENDED, NOW, width=width),
    "status-merging": lambda width: screen.status_lines(status([MERGING], []), ENDED[:1], NOW, width=width),
    "status-long-queue": lambda width: screen.status_lines(
        status([TRAINING], LONG_QUEUE, 250), ENDED[1:], NOW, width=width, height=30
    ),
    "list": lambda width: screen.list_lines([TRAINING, *ENDED, CANCELLED], NOW, width),
    "show-succeeded": lambda width: screen.show_lines(
        SUCCEEDED, [{**WAITING[0], "state": "succeeded"}], DETAILS, now=NOW, width=width
    ),
    "show-failed": lambda width: screen.show_lines(FAILED, now=NOW, width=width),
    "show-killed": lambda width: screen.show_lines(KILLED, now=NOW, width=width),
    "show-queued": lambda width: screen.show_lines(
        WAITING[1], details={"position": ", position 2, about 16:06"}, now=NOW, width=width
    ),
    "show-running": lambda width: screen.show_lines(TRAINING, now=NOW, width=width),
    "error": lambda width: output.error_lines(ERROR, width),
}


def compare(name: str, text: str) -> None:
    path = SCREENS / f"{name}.txt"
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{path.name} differs; LFSVC_UPDATE_SCREENS=1 stores it anew"


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", CASES)
def test_a_screen_is_as_stored(name: str, width: int) -> None:
    lines = CASES[name](width)
    assert max(text_width(plain(line)) for line in lines) <= width
    compare(f"{name}-{width}", "".join(plain(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", CASES)
def test_a_pipe_gets_everything_whole(name: str) -> None:
    text = "\n".join(map(plain, CASES[name](0)))
    assert "…" not in text and "━" not in text
    if "failed" in name or name in ("status-busy", "list"):
        assert OUT_OF_MEMORY in text


# What is to be read whole is left to the terminal to wrap where that is narrow.
NARROW = [(name, width) for name in CASES for width in (1, 20) if not name.startswith(("show", "error"))]
WIDE = [(name, width) for name in CASES for width in (40, 60, 100, 200)]


@pytest.mark.parametrize(("name", "width"), NARROW + WIDE)
def test_no_screen_is_wider_than_its_terminal(name: str, width: int) -> None:
    assert max(text_width(plain(line)) for line in CASES[name](width)) <= width


def test_status_is_one_screen_however_long_the_queue_is() -> None:
    assert len(screen.status_lines(status([TRAINING], LONG_QUEUE, 250), ENDED, NOW, width=80, height=30)) < 30
    whole = screen.status_lines(status([TRAINING], LONG_QUEUE, 250), ENDED, NOW)
    assert sum("  queued  " in plain(line) for line in whole) == 100
    assert any("and 150 more waiting" in plain(line) for line in whole)


@pytest.mark.parametrize("name", CASES)
def test_colours_change_no_character(name: str) -> None:
    import re

    for line in CASES[name](80):
        assert re.sub("\x1b\\[[0-9;]*m", "", ansi(line)).rstrip() == plain(line)


# -- what comes from outside ------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202e\x00name"


def test_no_escape_sequence_of_a_name_or_failure_reaches_the_terminal() -> None:
    bad = {**ENDED[0], "name": HOSTILE, "failure": HOSTILE, "warnings": [HOSTILE], "path": f"/x/{HOSTILE}.yaml",
           "steps": [step("train", "failed", note=HOSTILE, log=HOSTILE)]}  # fmt: skip
    running = {**TRAINING, "name": HOSTILE}
    screens = [
        screen.status_lines(status([running], [bad]), [bad], NOW, width=80),
        screen.list_lines([bad], NOW, 80),
        screen.show_lines(bad, [bad], {"commands": {"train": HOSTILE}, "environment": [HOSTILE]}, width=80),
        output.error_lines(HOSTILE, 80),
    ]
    for lines in screens:
        assert all(plain(line).isprintable() for line in lines)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.integers(20, 200))
def test_any_name_stays_in_its_column(names: list[str], width: int) -> None:
    jobs = [{**ENDED[0], "name": name or "x", "failure": ""} for name in names]
    _, *lines = screen.list_lines(jobs, NOW, width)
    assert max(text_width(plain(line)) for line in lines) <= width
    if width >= 80:
        # What follows the name begins in the same column in all rows.
        places = {text_width(plain(line).rpartition("@0")[0]) for line in lines}
        assert len(places) == 1


# -- colours, width, encoding -----------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", tty: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    def text(self) -> bytes:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


LINE: Line = [("failed", "failed"), (" ━╸ 实…", "")]


@pytest.mark.parametrize(
    ("tty", "environment", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": ""}, True),
     (True, {"TERM": "dumb"}, False)],
)  # fmt: skip
def test_colours_are_only_for_terminals_that_want_them(
    tty: bool, environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal(tty=tty)
    output.emit([LINE], terminal)
    assert (b"\x1b" in terminal.text()) is coloured


def test_a_terminal_of_another_encoding_gets_what_it_can_write() -> None:
    terminal = Terminal("latin-1", tty=False)
    output.emit([LINE], terminal)
    assert terminal.text() == b"failed #- ?~\n"


def test_status_imports_nothing_that_costs() -> None:
    costly = "'asyncio dataclasses json rich shutil subprocess unicodedata yaml'"
    code = f"import sys, lfsvc.client.cli, lfsvc.client.show; print(*set({costly}.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": PATH})
    assert (done.stdout, done.stderr) == ("\n", "")


# -- when a waiting job starts ----------------------------------------------------------------------


def test_the_start_of_a_waiting_job_is_expected_as_far_as_it_is_known() -> None:
    past = [{**ENDED[2], "path": WAITING[0]["path"], "started_at": at(1000), "finished_at": at(400)}]
    starts = screen.expected_starts([TRAINING], WAITING, past, NOW)
    first = NOW + 4320
    assert starts == [(first, True), (first + 600, True), (first + 600, False), (first + 600, False)]


def test_no_start_is_expected_of_a_queue_that_is_held() -> None:
    held = {**RUNNING, "state": "paused"}
    assert "about" not in "".join(map(plain, screen.status_lines(held, [], NOW)))


def test_a_state_of_a_newer_service_is_shown_plain() -> None:
    lines = screen.list_lines([{**TRAINING, "state": "stalled"}], NOW, 80)
    assert "stalled" in ansi(lines[1])


@pytest.mark.parametrize("running", [[], [MERGING], [TRAINING, MERGING]])
def test_no_start_is_expected_where_the_remaining_time_is_unknown(running: list[Job]) -> None:
    assert screen.expected_starts(running, WAITING, ENDED, NOW) == [None] * 4


# -- list --since -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", NOW - 7200), ("3d", NOW - 3 * 86400), ("90 min", NOW - 5400), ("30m", NOW - 1800), ("1w", NOW - 604800),
        ("45s", NOW - 45), ("today", 1772323200), ("Yesterday", 1772236800), ("2026-03-01", 1772323200),
        ("2026-03-01T12:00", 1772366400), ("2026-03-01 12:00:30", 1772366430), ("2026-03-01T12:00:30.5Z", 1772366430),
    ],
)  # fmt: skip
def test_since_takes_ages_days_and_times(text: str, seconds: int) -> None:
    assert show.since_usec(text, NOW) == seconds * 1_000_000


@pytest.mark.parametrize("text", ["", "soon", "2", "h", "2y", "-2h", "2026-13-01", "²h", "99999999d", "1.5h"])
def test_a_wrong_since_gets_a_sentence(text: str) -> None:
    with pytest.raises(WrongUse, match="is no time") as caught:
        show.since_usec(text, NOW)
    assert "yesterday" in caught.value.hint


def test_list_collects_pages_and_stops_where_all_ended_earlier() -> None:
    jobs = [{"id": number, "finished_at": number} for number in range(2000, 0, -1)]
    asked: list[Job] = []

    def ask(page: Job) -> list[Job]:
        asked.append(page)
        before = page.get("before", ("t", 2001))[1]
        return [item for item in jobs if item["id"] < before][: page["limit"][1]]

    assert [item["id"] for item in show.newest(ask, None)] == list(range(2000, 1900, -1))
    assert len(show.newest(ask, 1200)) == 1200
    asked.clear()
    assert [item["id"] for item in show.newest(ask, None, 1600)] == list(range(2000, 1599, -1))
    assert len(asked) == 2
    assert len(show.newest(ask, 3, 1600)) == 3
    assert len(show.newest(ask, 5000)) == 2000
    assert show.newest(lambda page: [], None) == []
    # What has not ended yet has not ended earlier.
    assert show.newest(lambda page: [{"id": 1}], None, 99) == [{"id": 1}]


# -- show: the command lines ------------------------------------------------------------------------

SPEC = {"source": f"{HOME}/my sums.yaml", "snapshot": "/state/jobs/40/snapshot.yaml", "llamafactory_command": "train"}


def test_command_lines_can_be_typed() -> None:
    spec = {**SPEC, "source": f"{HOME}/configs/sums.yaml"}
    assert show.command_lines(SUCCEEDED, spec, lambda path: True) == DETAILS["commands"]
    found = show.command_lines(SUCCEEDED, SPEC, lambda path: True)
    assert found["train"] == "llamafactory-cli train /state/jobs/40/snapshot.yaml", "a blank cannot be taken"
    assert show.command_lines(SUCCEEDED, spec, lambda path: False)["train"] == found["train"]
    script = {"source": "/x/a b.sh", "snapshot": "/state/jobs/38/snapshot.sh"}
    assert show.command_lines(KILLED, script, lambda path: True) == {"shell": "bash '/x/a b.sh'"}
    edited = {**KILLED, "warnings": ["/x/a b.sh was edited since it was submitted: what runs is the copy taken then"]}
    assert show.command_lines(edited, script, lambda path: True) == {"shell": "bash /state/jobs/38/snapshot.sh"}
    assert show.command_lines({"steps": [step("collect", "succeeded")]}, spec, lambda path: True) == {}


# -- watch ------------------------------------------------------------------------------------------


def view(running: list[Job], queued: list[Job], recent: list[Job], losses: list[float]) -> watch.View:
    made = watch.View()
    made.status, made.recent = status(running, queued), recent
    history = watch.LossHistory("/nonexistent")
    history.values = losses
    made.histories = {item["id"]: history for item in running}
    return made


LOSSES = [0.4 + 2.2 / (1 + n / 12) + 0.05 * ((n * 7919) % 13 - 6) / 6 for n in range(380)]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 36)])
def test_watch_is_as_stored(width: int, height: int) -> None:
    console_module = pytest.importorskip("rich.console")
    from rich.screen import Screen
    from rich.text import Text

    shown = view([TRAINING], WAITING, ENDED, LOSSES)
    console = console_module.Console(
        width=width, height=height, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False
    )
    console.print(Screen(watch.to_text(shown.lines(NOW, width, height), Text)), end="")
    lines = console.export_text(clear=False).split("\n")
    assert len(lines) == height
    compare(f"watch-{width}", "".join(line.rstrip() + "\n" for line in lines))


@pytest.mark.parametrize("height", [1, 3, 8, 24, 50])
@pytest.mark.parametrize("width", [10, 80])
def test_watch_fills_the_terminal_and_no_more(width: int, height: int) -> None:
    lines = view([TRAINING], LONG_QUEUE, ENDED, LOSSES).lines(NOW, width, height)
    assert len(lines) == height
    assert max(text_width(plain(line)) for line in lines) <= width


def test_watch_says_that_the_scheduler_is_away_and_goes_on_with_what_is_known() -> None:
    shown = view([TRAINING], [], ENDED, [])
    shown.away = True
    text = "\n".join(map(plain, shown.lines(NOW, 80, 24)))
    assert "The scheduler is away; jobs go on." in text and "qwen3-8b-r16" in text


def test_without_rich_watch_says_what_to_install() -> None:
    with pytest.raises(LfsvcError, match="cannot be used") as caught:
        watch.rich_module("no_such_module_of_rich")
    assert caught.value.hint == "pip install rich; lfsvc status needs none"


@pytest.mark.parametrize(
    ("keys", "leaves"),
    [(b"q", True), (b"xQ", True), (b"", True), (b"\x03", True), (b"\x1b[A", False), (b"\x1bq", False), (b"x", False),
     (b"\x1b[Aq", True), (b"\x1b", False), (b"\x1bOA", False), (b"\x1b[1;5q", False)],
)  # fmt: skip
def test_q_leaves_and_an_arrow_key_does_not(keys: bytes, leaves: bool) -> None:
    assert watch._is_leave(keys) is leaves


def entry(number: int, loss: float) -> str:
    return f'{{"current_steps": {number}, "total_steps": 9, "loss": {loss}}}\n'


def test_losses_are_read_on_and_begin_anew_with_a_new_run(tmp_path: Path) -> None:
    log = tmp_path / "trainer_log.jsonl"
    history = watch.LossHistory(str(tmp_path))
    history.read()
    assert history.values == []
    log.write_text(entry(1, 2.5) + entry(2, 2.0) + entry(3, 1.5)[:-5])
    history.read()
    assert history.values == [2.5, 2.0]
    with log.open("a") as file:
        file.write(entry(3, 1.5)[-5:] + "no json\n[]\n" + '{"current_steps": 3, "loss": null}\n')
    history.read()
    assert history.values == [2.5, 2.0, 1.5]
    with log.open("a") as file:
        file.write(entry(1, 9.0))
    history.read()
    assert history.values == [9.0], "LLaMA-Factory appends across runs"
    (tmp_path / "new").write_text(entry(1, 7.0))
    (tmp_path / "new").rename(log)
    history.read()
    assert history.values == [7.0], "overwrite_output_dir removes it"


def test_losses_of_an_earlier_run_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text(entry(1, 2.5) + entry(2, 2.0))
    os.utime(tmp_path / "trainer_log.jsonl", (NOW, NOW))
    history = watch.LossHistory(str(tmp_path))
    history.read(since=NOW + 1)
    assert history.values == []
    history.read(since=NOW)
    assert history.values == [2.5, 2.0]


def test_many_losses_are_thinned_not_cut(tmp_path: Path) -> None:
    count = 4 * watch.MAX_POINTS
    (tmp_path / "trainer_log.jsonl").write_text("".join(entry(n, n) for n in range(1, count)))
    history = watch.LossHistory(str(tmp_path))
    history.read()
    assert history.values[0] == 1 and history.values[-1] > count * 0.9
    assert len(history.values) <= watch.MAX_POINTS


@pytest.mark.parametrize(
    ("values", "width", "height", "rows"),
    [
        ([], 10, 1, [""]),
        ([8, 7, 6, 5, 4, 3, 2, 1], 10, 1, ["█▇▆▅▄▃▂▁"]),
        ([1, 1, 1], 10, 1, ["▅▅▅"]),
        ([4, 4, 2, 2], 2, 1, ["█▁"]),
        ([2.0, float("nan"), 1.0], 10, 1, ["█x▁"]),
        ([float("nan")], 10, 1, ["x"]),
        ([2, 1], 10, 2, ["█ ", "█▁"]),
        ([float("inf"), 1], 1, 1, ["▅"]),
    ],
)
def test_a_curve_is_the_shape_of_its_values(values: list[float], width: int, height: int, rows: list[str]) -> None:
    assert watch.curve_rows(values, width, height) == rows


@given(st.lists(st.floats(), max_size=50), st.integers(1, 60), st.integers(1, 5))
def test_any_losses_make_a_curve(values: list[float], width: int, height: int) -> None:
    rows = watch.curve_rows(values, width, height)
    assert len(rows) == height
    assert {len(row) for row in rows} == {min(width, len(values))}


@given(st.floats(), st.integers(1, 100))
def test_a_bar_is_as_wide_as_asked_and_full_only_at_the_end(percent: float, width: int) -> None:
    text = plain(screen.bar(percent, width))
    assert len(text) == width
    assert ("─" not in text and "╸" not in text) == (percent >= 100)
