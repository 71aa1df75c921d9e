"""How durations, times and progress are said, and how text of others is made fit for a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc import wording
from lfsvc.wording import cut, printable, text_width, wrap

# Sunday, 1 March 2026, 14:30 UTC.
NOW = 1772375400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0 s"), (0.44, "0.4 s"), (12.4, "12 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (4320, "1 h 12 min"),
     (183600, "2 d 3 h")],
)  # fmt: skip
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s ago"), (0.9, "0 s ago"), (75, "1 min ago"), (7100, "1 h ago"), (3e5, "3 d ago")]
)
def test_an_age_has_one_unit(seconds: float, text: str) -> None:
    assert wording.ago(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(NOW + 300, "14:35"), (NOW - 52200, "00:00"), (NOW + 36000, "Mon 00:30"), (NOW - 86400, "Sat 14:30"),
     (NOW - 7 * 86400, "2026-02-22 14:30")],
)  # fmt: skip
def test_a_time_is_said_with_as_much_of_its_date_as_it_needs(seconds: float, text: str) -> None:
    assert wording.clock(seconds, NOW) == text


def test_progress_is_said_in_the_trainers_words() -> None:
    progress = {"percentage": 38.9, "loss": 0.41234, "remaining_time": 4320}
    assert wording.progress_text(progress) == "38 %, loss 0.4123, 1 h 12 min left"
    assert wording.progress_text({}) == ""


@pytest.mark.parametrize(
    ("text", "width"),
    [("plain", 5), ("实验", 4), ("ｶﾅ", 2), ("한국", 4), ("e\u0301", 1), ("🚀", 2), ("\u2764\ufe0f", 2), ("\u2764", 1),
     ("🇩🇪", 2), ("", 0)],
)  # fmt: skip
def test_the_width_of_a_text_is_what_a_terminal_gives_it(text: str, width: int) -> None:
    assert text_width(text) == width


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a b", "a b"), ("\x1b[31mred\x1b[0m", " [31mred [0m"), ("a\r\n\tb", "a   b"), ("\x9b2J", " 2J"),
     ("\u202eevil", " evil"), ("bad \udcff", "bad \N{REPLACEMENT CHARACTER}"), ("实验🚀", "实验🚀")],
)  # fmt: skip
def test_nothing_that_steers_a_terminal_is_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(), st.integers(1, 40))
def test_a_cut_text_fits_and_says_that_it_was_cut(text: str, width: int) -> None:
    text = printable(text)
    short = cut(text, width)
    assert text_width(short) <= width
    assert short == text or short.endswith(wording.ELLIPSIS)


@given(st.text(), st.integers(2, 40))
def test_wrapped_text_fits_and_loses_nothing(text: str, width: int) -> None:
    text = printable(text)
    lines = wrap(text, width)
    assert max(map(text_width, lines), default=0) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_path_is_broken_behind_a_slash() -> None:
    path = "/home/mei/saves/llama3-70b/dpo/llamafactory_train_20260301_101500.log"
    assert wrap(path, 50) == [
        "/home/mei/saves/llama3-70b/dpo/",
        "llamafactory_train_20260301_101500.log",
    ]
    assert wrap("see /a", 0) == ["see /a"], "a pipe gets it whole"
