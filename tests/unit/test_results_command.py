"""`lfsvc results`: the table for people, in any width, and for programs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from lfsvc.client import results
from lfsvc.client.results import View
from lfsvc.errors import LfsvcError
from lfsvc.wording import printable, text_width

COLUMNS = [
    "run", "mode", "type", "model", "finished_at", "path", "average", "eval_accuracy", "eval_loss",
    "eval_rewards/chosen", "eval_runtime", "stem", "note",
]  # fmt: skip


def row(**cells: str) -> dict[str, str]:
    return {**dict.fromkeys(COLUMNS, ""), **cells}


ROWS = [
    row(
        run="sums_r8", mode="eval", type="lora", model="/home/ml/saves/a/merged", finished_at="2026-03-01T10:00:00Z",
        path="/home/ml/.local/share/lfsvc/eval_results/sums_r8_eval", eval_accuracy="0.93751", eval_loss="0.5",
        eval_runtime="84.2", note="keep",
        **{"eval_rewards/chosen": "-3.25"},
    ),
    row(
        run="实验_r16", mode="eval", type="full", finished_at="2026-03-02T10:00:00Z", path="/data/out",
        eval_accuracy="0.93750", eval_loss="nan", eval_runtime="80.0",
        **{"eval_rewards/chosen": "1"},
    ),
    row(
        run="base", mode="benchmark", type="base", finished_at="by hand", path="/home/ml", average="93.21", stem="90.0"
    ),
]  # fmt: skip

HOME = "/home/ml"


def screen(view: View) -> list[str]:
    return results.table_lines(COLUMNS, ROWS, view)


def test_a_pipe_gets_every_column_that_matters() -> None:
    assert screen(View(home=HOME)) == [
        "run       mode       type  average  eval_accuracy  eval_loss  eval_rewards/chosen    stem  note  finished"
        "          path",
        "sums_r8   eval       lora                 0.9375*    0.5000               -3.250           keep"
        "  2026-03-01 10:00  ~/.local/share/lfsvc/eval_results/sums_r8_eval",
        "实验_r16  eval       full                 0.9375        nan                    1                 "
        "2026-03-02 10:00  /data/out",
        "base      benchmark  base   93.21                                                  90.00         "
        "by hand           ~",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 140, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    *lines, last = screen(View(home=HOME, width=width))
    if not last.startswith("No room for"):
        lines.append(last)
    assert max(map(text_width, lines)) <= width
    assert lines[0].startswith("run")


def test_eighty_columns_show_names_and_metrics_and_say_what_has_no_room() -> None:
    lines = screen(View(home=HOME, width=80))
    assert lines[0].split() == ["run", "mode", "type", "average", "eval_accuracy", "eval_loss"]
    assert lines[-1] == "No room for eval_rewards/chosen, stem, note, finished, path: --all shows every column."


def test_a_path_is_cut_where_it_tells_least() -> None:
    lines = screen(View(home=HOME, width=145))
    assert lines[1].endswith("…svc/eval_results/sums_r8_eval")
    assert text_width(lines[1]) == 145


def test_all_shows_every_column_and_cuts_nothing() -> None:
    lines = screen(View(home=HOME, width=80, everything=True))
    assert {"model", "eval_runtime", "note", "path"} <= set(lines[0].split())
    assert lines[1].endswith("~/.local/share/lfsvc/eval_results/sums_r8_eval")
    assert "80.00*" in lines[2]


def test_the_metric_to_sort_by_is_the_last_to_go() -> None:
    lines = screen(View(home=HOME, width=40, first_metric="eval_runtime"))
    assert lines[0].split()[-1] == "eval_runtime"


def test_the_best_is_marked_only_among_several_and_only_where_better_is_known() -> None:
    text = "\n".join(screen(View(home=HOME)))
    # One finite loss, one average; of eval_rewards/chosen nobody knows.
    assert text.count("*") == 1 and "0.9375*" in text


def test_a_terminal_shows_the_best_in_bold() -> None:
    lines = screen(View(home=HOME, bold=True))
    assert "\x1b[1m      0.9375*\x1b[0m" in lines[1]
    assert all("\x1b" not in line for line in [lines[0], *lines[2:]])


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("6.046798229217529", "6.047"),
        ("0.5", "0.5000"),
        ("93.0", "93.00"),
        ("1208.35", "1208"),
        ("12345.6", "12346"),
        ("7453900800.0", "7.454e+09"),
        ("0.00001234", "1.234e-05"),
        ("0.0", "0"),
        ("42", "42"),
        ("nan", "nan"),
        ("-inf", "-inf"),
        ("0,75", "0.7500"),
        ("n/a", "n/a"),
        ("", ""),
    ],
)
def test_numbers_have_four_digits(cell: str, shown: str) -> None:
    assert results.human_number(cell) == shown


def test_a_name_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[31m\nb\t\udcff") == "a [31m b \N{REPLACEMENT CHARACTER}"


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "lfsvc" / "eval_results" / "summary.csv"
    path.parent.mkdir(parents=True)
    return path


TABLE = """\
run,mode,type,model,finished_at,path,eval_accuracy,eval_loss,predict_loss,note
a,eval,lora,m,2026-03-01T10:00:00Z,/a,0.5,2.5,,first
b,eval,lora,m,2026-03-03T10:00:00Z,/b,0.75,nan,1.5,
c,eval,lora,m,2026-03-02T10:00:00Z,/c,n/a,0.5,,
"""


def command(*, sort: str = "", form: str = "", ids: tuple[str, ...] = (), output: str = "") -> int:
    return results.results_command(
        argparse.Namespace(
            sort=sort or None, json=form == "json", csv=form == "csv", plot=None, ids=list(ids), output=output or None,
            all=False,
        )
    )  # fmt: skip


def runs(printed: str) -> list[str]:
    return [line.split()[0] for line in printed.splitlines()[1:]]


def test_the_newest_is_first(summary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.write_text(TABLE)
    assert command() == 0
    assert runs(capsys.readouterr().out) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("metric", "order"),
    [("eval_accuracy", ["b", "a", "c"]), ("accuracy", ["b", "a", "c"]), ("eval_loss", ["c", "a", "b"])],
)
def test_sort_puts_the_best_first_and_what_has_no_number_last(
    summary: Path, capsys: pytest.CaptureFixture[str], metric: str, order: list[str]
) -> None:
    summary.write_text(TABLE)
    assert command(sort=metric) == 0
    assert runs(capsys.readouterr().out) == order


@pytest.mark.parametrize(
    ("word", "listed"),
    [("f1", "eval_accuracy, eval_loss, predict_loss"), ("loss", "eval_loss, predict_loss")],
)
def test_a_metric_that_is_unknown_or_ambiguous_is_a_sentence_with_the_metrics(
    summary: Path, word: str, listed: str
) -> None:
    summary.write_text(TABLE)
    with pytest.raises(LfsvcError, match=repr(word)) as caught:
        command(sort=word)
    assert caught.value.hint == f"the metrics are {listed}"


def test_json_has_numbers_as_numbers_and_stays_json(summary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.write_bytes(TABLE.encode() + b"d,eval,lora,m,,/d\xff,,,,\n")
    assert command(form="json", sort="eval_loss") == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed[0] == {
        "run": "c", "mode": "eval", "type": "lora", "model": "m", "finished_at": "2026-03-02T10:00:00Z", "path": "/c",
        "eval_accuracy": "n/a", "eval_loss": 0.5,
    }  # fmt: skip
    assert printed[1]["eval_accuracy"] == 0.5 and printed[1]["note"] == "first"
    assert printed[2]["eval_loss"] is None
    assert printed[3]["path"] == "/d\N{REPLACEMENT CHARACTER}"


def test_csv_is_the_file_byte_for_byte(summary: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    data = b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode() + b"\xff"
    summary.write_bytes(data)
    assert command(form="csv") == 0
    assert capfdbinary.readouterr().out == data


@pytest.mark.parametrize("content", [None, TABLE.splitlines()[0] + "\n"])
def test_without_results_one_line_says_so(
    summary: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        summary.write_text(content)
    assert command(sort="eval_loss") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert str(summary) in line
    assert command(form="json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_csv_without_results_prints_no_data(summary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(form="csv") == 0
    printed = capsys.readouterr()
    assert printed.out == "" and str(summary) in printed.err


def test_ids_without_plot_are_wrong_use(summary: Path) -> None:
    for wrong in (command, lambda **_: command(output="x.png")):
        with pytest.raises(LfsvcError, match="--plot"):
            wrong(ids=("1",))


def test_a_column_that_was_deleted_by_hand_is_not_missed(summary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.write_text("run,eval_loss,path,mode\na,1.5,/a,eval\n")
    assert command() == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "eval", "1.500", "/a"]
