"""trainer_log.jsonl as it grows, and what is said of it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.llamafactory.progress import MAX_BYTES, TrainerLog, progress_of, seconds_of
from lfsvc.wording import progress_text

# As LLaMA-Factory 0.9.3 wrote it.
LINE = (
    '{"current_steps": 20, "total_steps": 46, "loss": 5.83, "lr": 0.00082, "epoch": 0.87, "percentage": 43.48, '
    '"elapsed_time": "0:00:04", "remaining_time": "1:12:05"}\n'
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "trainer_log.jsonl"


def test_a_line_is_the_progress(log: Path) -> None:
    trainer = TrainerLog(str(log.parent))
    assert not trainer.read()
    log.write_text(LINE)
    assert trainer.read()
    assert trainer.progress == {
        "current_steps": 20, "total_steps": 46, "loss": 5.83, "lr": 0.00082, "epoch": 0.87, "percentage": 43.48,
        "elapsed_time": 4, "remaining_time": 4325,
    }  # fmt: skip
    assert not trainer.read()


def test_what_an_earlier_run_left_is_not_read(log: Path) -> None:
    log.write_text(LINE)
    trainer = TrainerLog(str(log.parent))
    assert not trainer.read()
    with log.open("a") as file:
        file.write(LINE.replace("5.83", "4.0"))
    assert trainer.read()
    assert trainer.progress["loss"] == 4.0


def test_half_a_line_waits_for_its_rest_and_a_broken_one_is_passed_over(log: Path) -> None:
    trainer = TrainerLog(str(log.parent))
    log.write_text("no json\n[1]\n" + LINE[:30])
    assert not trainer.read()
    with log.open("a") as file:
        file.write(LINE[30:])
    assert trainer.read()
    assert trainer.progress["current_steps"] == 20


@pytest.mark.parametrize("how", ["truncated", "replaced"])
def test_a_log_that_begins_anew_is_read_from_its_beginning(log: Path, how: str) -> None:
    log.write_text(LINE * 3)
    trainer = TrainerLog(str(log.parent))
    if how == "replaced":
        # overwrite_output_dir: removed, then written anew, here to a greater length at once.
        log.unlink()
        log.write_text(LINE.replace("20", "1") * 5)
    else:
        os.truncate(log, 0)
        log.write_text(LINE.replace("20", "1"))
    assert trainer.read()
    assert trainer.progress["current_steps"] == 1


def test_a_loss_that_the_last_line_lacks_stays(log: Path) -> None:
    trainer = TrainerLog(str(log.parent))
    log.write_text(LINE + '{"current_steps": 21, "eval_loss": 1.0}\n')
    assert trainer.read()
    assert (trainer.progress["current_steps"], trainer.progress["loss"]) == (21, 5.83)


def test_far_behind_it_skips_to_the_newest(log: Path) -> None:
    trainer = TrainerLog(str(log.parent))
    log.write_text(LINE * (2 * MAX_BYTES // len(LINE)) + LINE.replace("20", "45"))
    assert trainer.read()
    assert trainer.progress["current_steps"] == 45


@given(st.binary())
def test_no_line_breaks_it(line: bytes) -> None:
    progress_of(line)


@given(
    st.dictionaries(
        st.sampled_from(["current_steps", "loss", "elapsed_time", "percentage"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3),
    )
)
def test_odd_values_are_left_out(entry: dict[str, object]) -> None:
    for value in progress_of(json.dumps(entry).encode()).values():
        assert type(value) in (int, float)


def test_a_loss_that_is_no_number_is_shown_as_that() -> None:
    found = progress_of(b'{"current_steps": 1, "loss": NaN}')
    assert math.isnan(found["loss"])
    assert progress_text(found) == "loss nan"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:00:09", 9), ("12:00:00", 43200), ("1 day, 2:03:04", 93784), ("12 days, 0:00:01", 1036801),
     ("", None), ("soon", None), ("1:2", None), ("-1 day, 23:59:59", None)],
)  # fmt: skip
def test_a_timedelta_is_read(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        ({"percentage": 38.9, "loss": 0.41234, "remaining_time": 4320}, "38 %, loss 0.4123, 1 h 12 min left"),
        ({"percentage": 99.99}, "99 %"),
        ({"percentage": 100.0, "remaining_time": 0}, "100 %"),
        ({"current_steps": 3, "total_steps": 40}, "step 3 of 40"),
        ({}, ""),
    ],
)
def test_progress_is_said_in_one_line(progress: dict[str, float], text: str) -> None:
    assert progress_text(progress) == text
