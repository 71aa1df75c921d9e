"""What an evaluation wrote → its row in summary.csv, which people edit and which is never lost."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.errors import LfsvcError
from lfsvc.llamafactory import results

# What LLaMA-Factory 0.9.3 wrote: an evaluation of the tests' tiny model.
EVAL = b"""{
    "eval_accuracy": 0.0,
    "eval_loss": 6.046798229217529,
    "eval_model_preparation_time": 0.0002,
    "eval_runtime": 0.8427,
    "eval_samples_per_second": 23.734,
    "eval_steps_per_second": 3.56
}"""
# A training that evaluated at its end keeps its own numbers in the same all_results.json.
ALL = b"""{
    "epoch": 2.0,
    "eval_loss": 5.46739387512207,
    "total_flos": 7453900800.0,
    "train_loss": 3.093255851579749,
    "train_runtime": 10.0953
}"""
PREDICT = b'{"predict_bleu-4": 12.5, "predict_rouge-l": 30.1, "predict_runtime": 4.2}'
# As Evaluator._save_results of 0.9.3 writes it: names to the right in 15 columns, no newline at the end.
BENCHMARK = b"""\
        Average: 93.21
           STEM: 90.00
Social Sciences: 95.50
     Humanities: 93.00
          Other: 94.00"""

ROOT = Path(__file__).parent.parent.parent

FIXED = "run,mode,type,model,finished_at,path"
FINISHED = 1_790_000_000_123_456


def evaluation(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def run(path: Path, **keys: str) -> results.Run:
    base: results.Run = {
        "run": "sums",
        "mode": "eval",
        "type": "lora",
        "model": "/m/merged",
        "path": str(path),
        "finished_at": FINISHED,
    }
    return {**base, **keys}  # type: ignore[typeddict-item]  # of known keys


def table(root: Path) -> list[dict[str, str]]:
    with (root / "summary.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "eval_results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "elsewhere" / "sums_eval", eval_results__json=EVAL, all_results__json=EVAL)


def test_an_evaluation_becomes_a_row_with_its_metrics_sorted(root: Path, folder: Path) -> None:
    assert results.collect(str(root), run(folder), {}) == []
    header, row = (root / "summary.csv").read_text().splitlines()
    assert header == FIXED + (
        ",eval_accuracy,eval_loss,eval_model_preparation_time,eval_runtime,eval_samples_per_second,eval_steps_per_second"
    )
    assert row == (
        f"sums,eval,lora,/m/merged,2026-09-21T14:13:20Z,{folder},0.0,6.046798229217529,0.0002,0.8427,23.734,3.56"
    )


def test_only_what_this_step_wrote_counts_whatever_the_clock_says(root: Path, folder: Path) -> None:
    before = results.snapshot(str(folder))
    assert set(before) == {"eval_results.json", "all_results.json"}
    warnings = results.collect(str(root), run(folder), before)
    assert len(warnings) == 1 and str(folder) in warnings[0]
    assert not root.exists()
    # The same content at the same size, and older by its date.
    os.utime(folder / "eval_results.json", ns=(1, 1))
    assert results.changed(str(folder), before) == ["eval_results.json"]
    assert results.collect(str(root), run(folder), before) == []
    assert table(root)[0]["eval_accuracy"] == "0.0"


def test_a_folder_that_is_not_there_has_an_empty_snapshot(tmp_path: Path) -> None:
    assert results.snapshot(str(tmp_path / "none")) == {}


def test_predictions_and_evaluation_of_one_step_share_the_row(root: Path, folder: Path) -> None:
    evaluation(folder, predict_results__json=PREDICT)
    assert results.collect(str(root), run(folder, mode="predict"), {}) == []
    (row,) = table(root)
    assert (row["mode"], row["predict_bleu-4"], row["eval_accuracy"]) == ("predict", "12.5", "0.0")


def test_all_results_counts_only_alone_and_without_the_numbers_of_the_training(root: Path, tmp_path: Path) -> None:
    alone = evaluation(tmp_path / "alone", all_results__json=ALL)
    both = evaluation(tmp_path / "both", all_results__json=ALL, eval_results__json=b'{"eval_accuracy": 0.5}')
    assert results.collect(str(root), run(alone), {}) == []
    assert results.collect(str(root), run(both), {}) == []
    assert [row["eval_loss"] for row in table(root)] == ["5.46739387512207", ""]
    assert (root / "summary.csv").read_text().splitlines()[0] == FIXED + ",eval_accuracy,eval_loss"


def test_a_benchmark_gives_its_average_and_its_categories(root: Path, tmp_path: Path) -> None:
    path = evaluation(tmp_path / "mmlu", results__log=BENCHMARK)
    assert results.collect(str(root), run(path, mode="benchmark", type="base"), {}) == []
    header, row = (root / "summary.csv").read_text().splitlines()
    assert header == FIXED + ",average,humanities,other,social_sciences,stem"
    assert row.endswith(",93.21,93.0,94.0,95.5,90.0")


def test_only_numbers_are_metrics() -> None:
    data = b'{"eval_loss": NaN, "eval_perplexity": Infinity, "a": true, "b": "1", "c": [1], "path": 3, "n": 7}'
    found = results.parse_results(data)
    assert {key: str(value) for key, value in found.items()} == {"eval_loss": "nan", "eval_perplexity": "inf", "n": "7"}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_result_that_cannot_be_read_is_a_warning_and_touches_no_row(root: Path, folder: Path, data: bytes) -> None:
    assert results.collect(str(root), run(folder), {}) == []
    before = (root / "summary.csv").read_bytes()
    evaluation(folder, eval_results__json=data)
    warnings = results.collect(str(root), run(folder), {})
    assert len(warnings) == 1 and "eval_results.json" in warnings[0]
    assert (root / "summary.csv").read_bytes() == before
    # What can be read beside it still counts.
    evaluation(folder, predict_results__json=PREDICT)
    assert len(results.collect(str(root), run(folder), {})) == 1
    assert table(root)[0]["predict_bleu-4"] == "12.5"


def test_a_run_evaluated_again_replaces_its_row_and_keeps_what_was_written_beside_it(root: Path, folder: Path) -> None:
    assert results.collect(str(root), run(folder), {}) == []
    other = evaluation(folder.parent / "other", eval_results__json=b'{"eval_loss": 1.5}')
    assert results.collect(str(root), run(other, run="other"), {}) == []
    path = root / "summary.csv"
    lines = path.read_text().splitlines()
    # Notes in a column of their own, and one that is named as a metric.
    lines = [
        "note," + lines[0] + ",eval_remark,rating",
        "mine," + lines[1] + ",good,5",
        "yours," + lines[2] + ",,",
    ]
    path.write_text("\n".join(lines) + "\n")
    evaluation(folder, eval_results__json=b'{"eval_loss": 0.25, "eval_zeta": 1}')
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert results.collect(str(root), run(link, run="renamed"), {}) == []
    first, second = table(root)
    assert list(first)[:6] == FIXED.split(",")
    assert list(first)[-4:] == ["eval_zeta", "note", "eval_remark", "rating"]
    assert (first["run"], first["path"], first["eval_loss"], first["eval_zeta"]) == (
        "renamed",
        str(folder),
        "0.25",
        "1",
    )
    assert first["eval_accuracy"] == "", "a number of the run before"
    assert (first["note"], first["eval_remark"], first["rating"]) == ("mine", "good", "5")
    assert (second["run"], second["note"], second["eval_loss"]) == ("other", "yours", "1.5")


def test_a_row_whose_folder_was_deleted_stays(root: Path, folder: Path, tmp_path: Path) -> None:
    assert results.collect(str(root), run(folder), {}) == []
    (folder / "eval_results.json").unlink()
    (folder / "all_results.json").unlink()
    folder.rmdir()
    other = evaluation(tmp_path / "other", eval_results__json=EVAL)
    assert results.collect(str(root), run(other), {}) == []
    assert [row["path"] for row in table(root)] == [str(folder), str(other)]


def test_of_rows_that_were_copied_the_last_is_replaced(root: Path, folder: Path) -> None:
    root.mkdir()
    rows = f"old,eval,lora,m,2020,{folder},9\n" * 2
    (root / "summary.csv").write_text(f"{FIXED},eval_loss\n{rows}")
    assert results.collect(str(root), run(folder), {}) == []
    assert [row["run"] for row in table(root)] == ["old", "sums"]


# What spreadsheets, locales and hands make of one table with a column `note`.
ROW = "{p},1.5,a,eval,lora,m,2026-01-01T00:00:00Z,gut"
HEADER = "path,eval_loss,run,mode,type,model,finished_at,note"
EDITED = {
    "a byte order mark": b"\xef\xbb\xbf" + f"{HEADER}\n{ROW}\n".encode(),
    "Windows line ends": f"{HEADER}\r\n{ROW}\r\n".encode(),
    "old line ends": f"{HEADER}\r{ROW}\r".encode(),
    "semicolons": f"{HEADER}\n{ROW}\n".replace(",", ";").encode(),
    "semicolons that are announced": b"sep=;\r\n" + f"{HEADER}\r\n{ROW}\r\n".replace(",", ";").encode(),
    "tabs in UTF-16": f"{HEADER}\r\n{ROW}\r\n".replace(",", "\t").encode("utf-16"),
    "blank lines and columns": f"\n{HEADER},,\n,,,,,,,,\n\n{ROW},,\n   \n".encode(),
    "no last newline": f"{HEADER}\n{ROW}".encode(),
    "blanks in the header": f"{HEADER}\n{ROW}\n".replace(",run,", ", run ,").encode(),
    "quotes everywhere": "\n".join('"' + line.replace(",", '","') + '"' for line in (HEADER, ROW)).encode(),
}


@pytest.mark.parametrize("kind", EDITED)
def test_a_table_is_read_whatever_an_editor_made_of_it(root: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    root.mkdir()
    other = tmp_path / "gone"
    (root / "summary.csv").write_bytes(
        EDITED[kind].replace(b"{p}", str(other).encode())
        if b"{p}" in EDITED[kind]
        else EDITED[kind].replace("{p}".encode("utf-16-le"), str(other).encode("utf-16-le"))
    )
    assert results.collect(str(root), run(folder), {}) == []
    first, second = table(root)
    assert list(first) == [*FIXED.split(","), *[c for c in first if c.startswith("eval_")], "note"]
    assert [first[key] for key in (*FIXED.split(","), "eval_loss", "note")] == [
        "a", "eval", "lora", "m", "2026-01-01T00:00:00Z", str(other), "1.5", "gut",
    ]  # fmt: skip
    assert (second["run"], second["note"]) == ("sums", "")


@given(st.binary(max_size=120), st.sampled_from([b"", FIXED.encode() + b"\n", b"run;mode;path\n"]))
def test_any_file_can_be_read_or_is_no_table(data: bytes, header: bytes) -> None:
    try:
        read = results.parse(header + data)
    except results.Damaged:
        return
    assert results.parse(results.render(read)).header == read.header


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=6)


@given(st.lists(CELLS.map(str.strip), max_size=4), st.lists(st.lists(CELLS, min_size=8, max_size=10), max_size=4))
def test_a_new_row_changes_no_other_cell(names: list[str], rows: list[list[str]]) -> None:
    rows = [[*row[:5], "", *row[6:]] for row in rows if "".join(row).strip()]
    before = results.Table([*FIXED.split(","), *names], rows)
    read = results.parse(results.render(results.updated(before, run(Path("/none")), {"eval_loss": 1.0})))
    assert read.header[:6] == FIXED.split(",")
    for old, new in zip((row for row in before.rows if "".join(row).strip()), read.rows, strict=False):
        assert new[:6] == old[:6]
        assert sorted(filter(None, new)) == sorted(filter(None, old))


def test_the_byte_order_mark_that_excel_needs_stays(root: Path, folder: Path) -> None:
    root.mkdir()
    (root / "summary.csv").write_bytes(b"\xef\xbb\xbf" + FIXED.encode())
    assert results.collect(str(root), run(folder), {}) == []
    assert (root / "summary.csv").read_bytes().startswith(b"\xef\xbb\xbfrun,")


def test_short_and_long_rows_and_repeated_names_lose_nothing(root: Path, folder: Path) -> None:
    root.mkdir()
    content = f"{FIXED},note,note,\nshort,eval\nlong,eval,lora,m,t,/x,one,two,three,four\n"
    (root / "summary.csv").write_text(content)
    assert results.collect(str(root), run(folder), {}) == []
    lines = list(csv.reader((root / "summary.csv").read_text().splitlines()))
    assert lines[0][-4:] == ["note", "note", "", ""]
    assert lines[1][:2] == ["short", "eval"] and lines[2][-4:] == ["one", "two", "three", "four"]
    columns, rows = results.read_table(str(root))
    assert columns[-4:] == ["note", "note (14)", "column 15", "column 16"]
    assert [rows[1][column] for column in columns[-4:]] == ["one", "two", "three", "four"]


def test_a_column_of_ours_that_was_deleted_comes_back(root: Path, folder: Path) -> None:
    root.mkdir()
    (root / "summary.csv").write_text("run,mode,eval_loss,path\na,eval,1,/x\n")
    assert results.collect(str(root), run(folder), {}) == []
    assert [row["model"] for row in table(root)] == ["", "/m/merged"]


def test_bytes_that_are_no_utf8_are_kept(root: Path, folder: Path) -> None:
    root.mkdir()
    note = "实验".encode("gbk")
    (root / "summary.csv").write_bytes(f"{FIXED},note\na,eval,full,m,t,/x,".encode() + note + b"\n")
    assert results.collect(str(root), run(folder), {}) == []
    assert note + b"\n" in (root / "summary.csv").read_bytes()


@pytest.mark.parametrize("data", [b"PK\x03\x04\0\0\0", b"hello\nworld\n", b"a,b,c\n1,2,3\n", b"\xff" * 50])
def test_what_is_no_table_is_kept_aside_and_a_new_one_begun(root: Path, folder: Path, data: bytes) -> None:
    root.mkdir()
    (root / "summary.csv.damaged-1").write_text("of an earlier day")
    (root / "summary.csv").write_bytes(data)
    warnings = results.collect(str(root), run(folder), {})
    assert len(warnings) == 1 and "summary.csv.damaged-2" in warnings[0]
    assert (root / "summary.csv.damaged-1").read_text() == "of an earlier day"
    assert (root / "summary.csv.damaged-2").read_bytes() == data
    assert [row["run"] for row in table(root)] == ["sums"]


def test_a_quote_without_a_partner_harms_its_own_line_only(root: Path, folder: Path) -> None:
    root.mkdir()
    data = f'{FIXED},note\na,eval,full,m,t,/a,"wow\nb,eval,full,m,t,/b,fine\n'.encode()
    (root / "summary.csv").write_bytes(data)
    warnings = results.collect(str(root), run(folder), {})
    assert len(warnings) == 1 and "quote" in warnings[0]
    assert (root / "summary.csv.damaged-1").read_bytes() == data
    assert [(row["run"], row["note"]) for row in table(root)] == [("a", "wow"), ("b", "fine"), ("sums", "")]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_table_without_rows(root: Path, folder: Path, data: bytes) -> None:
    root.mkdir()
    (root / "summary.csv").write_bytes(data)
    assert results.collect(str(root), run(folder), {}) == []
    assert len(table(root)) == 1
    assert not list(root.glob("*.damaged*"))


def test_a_spreadsheet_takes_no_name_for_a_formula(root: Path, folder: Path) -> None:
    name = "=HYPERLINK(1)"
    assert results.collect(str(root), run(folder, run=name, model="@org\r\n/x"), {}) == []
    assert (table(root)[0]["run"], table(root)[0]["model"]) == ("'" + name, "'@org  /x")
    _, rows = results.read_table(str(root))
    assert (rows[0]["run"], rows[0]["model"]) == (name, "@org  /x")
    # Also once the row has been read and written again.
    other = evaluation(folder.parent / "other", eval_results__json=EVAL)
    assert results.collect(str(root), run(other), {}) == []
    assert results.read_table(str(root))[1][0]["run"] == name


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_table_keeps_its_mode_and_a_link_its_target(root: Path, folder: Path, tmp_path: Path, mode: int) -> None:
    target = tmp_path / "shared" / "all.csv"
    target.parent.mkdir()
    target.write_text(FIXED + "\n")
    target.chmod(mode)
    root.mkdir()
    (root / "summary.csv").symlink_to(target)
    umask = os.umask(0o077)
    try:
        assert results.collect(str(root), run(folder), {}) == []
    finally:
        os.umask(umask)
    assert (root / "summary.csv").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert len(table(root)) == 1


def test_a_new_table_is_private(root: Path, folder: Path) -> None:
    assert results.collect(str(root), run(folder), {}) == []
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "summary.csv").stat().st_mode) == 0o600


def test_what_cannot_be_written_leaves_the_table_as_it_was(root: Path, folder: Path) -> None:
    root.mkdir()
    (root / "summary.csv").mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        results.collect(str(root), run(folder), {})
    (root / "summary.csv").rmdir()
    # Nobody reads from it, and nobody may wait for it.
    os.mkfifo(root / "summary.csv")
    with pytest.raises(OSError, match="not a regular file"):
        results.collect(str(root), run(folder), {})


def test_a_lock_that_is_never_given_back_is_an_error(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    monkeypatch.setattr(results, "LOCK_SECONDS", 0.0)
    with (root / ".summary.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            results.collect(str(root), run(folder), {})
    assert results.collect(str(root), run(folder), {}) == []


PROGRAM = """
import sys
from lfsvc.llamafactory import results
root, folder, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(first, first + 20):
    row = {"run": str(number), "mode": "eval", "type": "full", "model": "m", "path": f"{folder}/{number}"}
    assert results.collect(root, {**row, "finished_at": 0}, {}) == []
"""


def test_evaluations_that_end_together_lose_no_row(root: Path, tmp_path: Path) -> None:
    for number in range(60):
        evaluation(tmp_path / "runs" / str(number), eval_results__json=json.dumps({"eval_loss": number}).encode())
    # As the runner does: without site-packages.
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"]
    writers = [subprocess.Popen([*command, str(root), str(tmp_path / "runs"), str(first)]) for first in (0, 20, 40)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert sorted(int(row["run"]) for row in table(root)) == list(range(60))
    assert sorted(path.name for path in root.iterdir()) == [".summary.lock", "summary.csv"]


def test_no_table_yet_reads_as_empty_and_a_damaged_one_is_a_sentence(root: Path) -> None:
    assert results.read_table(str(root)) == ([], [])
    root.mkdir()
    (root / "summary.csv").write_text("shopping list\n")
    with pytest.raises(LfsvcError, match="is no table of results") as caught:
        results.read_table(str(root))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("eval_loss", "lower"),
        ("eval_sums_loss", "lower"),
        ("eval_perplexity", "lower"),
        ("eval_runtime", "lower"),
        ("eval_accuracy", "higher"),
        ("eval_rewards/accuracies", "higher"),
        ("predict_bleu-4", "higher"),
        ("predict_rouge-l", "higher"),
        ("eval_samples_per_second", "higher"),
        ("average", "higher"),
        ("stem", "higher"),
        ("eval_rewards/chosen", ""),
        ("system", ""),
        ("", ""),
    ],
)
def test_the_better_direction_of_a_metric_is_known_or_not_claimed(metric: str, direction: str) -> None:
    assert results.better(metric) == direction
