"""`lfsvc results --plot loss`: trainer_log.jsonl → a picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from lfsvc.client import plot
from lfsvc.errors import LfsvcError

# What LLaMA-Factory 0.9.3 wrote; the last line of a training has no loss.
LINE = (
    '{"current_steps": 2, "total_steps": 46, "loss": 6.0333, "lr": 0.0009782608695652175, "epoch": 0.08695652173913043,'
    ' "percentage": 4.35, "elapsed_time": "0:00:01", "remaining_time": "0:00:33"}\n'
)
END = '{"current_steps": 46, "total_steps": 46, "epoch": 2.0, "percentage": 100.0, "elapsed_time": "0:00:11"}\n'


def log(*steps: int, loss: float = 1.0) -> str:
    return "".join(json.dumps({"current_steps": step, "total_steps": 50, "loss": loss}) + "\n" for step in steps)


def read(text: str) -> list[tuple[int, float]]:
    return plot.read_points(text.encode())


def training(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_log.jsonl").write_text(text)
    return folder


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (it is an optional extra)")


def test_a_training_gives_its_losses() -> None:
    assert read(LINE + END) == [(2, 6.0333)]


def test_broken_lines_are_passed_over() -> None:
    broken = (
        '{"current_steps": 4, "lo\n\n[]\n3\n{"current_steps": "5", "loss": 1}\n{"current_steps": 6, "loss": null}\n'
    )
    huge = '{"current_steps": 7, "loss": ' + "9" * 400 + "}\n"
    assert plot.read_points((LINE + broken + huge).encode() + b"\xff\xfe\0\n" + log(8).encode()) == [
        (2, 6.0333),
        (8, 1),
    ]


def test_of_two_trainings_in_one_log_the_last_counts() -> None:
    assert read(log(2, 4, 6, loss=9) + log(2, 4)) == [(2, 1), (4, 1)]
    # Also where it logs less often than the one before.
    assert read(log(1, 2, 3, 4, 5, loss=9) + log(5, 10)) == [(5, 1), (10, 1)]
    assert read(log(10, 20, loss=9) + log(1, 10, 20)) == [(1, 1), (10, 1), (20, 1)]


def test_a_training_that_was_resumed_keeps_what_it_did_before_the_checkpoint() -> None:
    resumed = read(log(10, 20, 30, 40, 50, loss=9) + log(40, 50) + log(50, loss=0.5))
    assert resumed == [(10, 9), (20, 9), (30, 9), (40, 1), (50, 0.5)]


def test_smoothing_keeps_a_straight_line_straight_and_a_constant_constant() -> None:
    assert plot.smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    line = [100.0 - step for step in range(100)]
    assert plot.smoothed(line)[:95] == pytest.approx(line[:95])


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    values = [1.0, 1.0, math.nan, 1.0, math.inf, 1.0, 1.0]
    assert plot.smoothed(values) == pytest.approx([1.0] * 7)
    assert math.isnan(plot.smoothed([math.nan])[0])


def job(**keys: object) -> dict[str, object]:
    return {"id": 17, "command": "train", "path": "/c/sums.yaml", "output_dir": "/o", **keys}


def test_a_job_is_named_as_it_was_submitted() -> None:
    assert plot.training_of(job()).name == "sums"
    assert plot.training_of(job(name="best")).name == "best"


def test_an_evaluation_points_to_its_training() -> None:
    with pytest.raises(LfsvcError, match="no training loss") as caught:
        plot.training_of(job(command="eval", parent=12))
    assert caught.value.hint == "its training is job 12"
    with pytest.raises(LfsvcError, match="no training loss"):
        plot.training_of(job(command="shell", output_dir=""))


def test_the_same_name_twice_gets_what_tells_them_apart() -> None:
    jobs = [plot.training_of(job(id=number)) for number in (3, 4)] + [plot.training_of(job(name="other"))]
    assert plot.labels(jobs) == ["sums (3)", "sums (4)", "other"]


def test_folders_are_trainings_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = training(tmp_path / "a" / "sums", ""), training(tmp_path / "b" / "sums", "")
    monkeypatch.chdir(tmp_path)
    found = plot.find_trainings(["a/sums", "a/sums/", str(first), "b/sums"])
    assert plot.labels(found) == [str(first), str(second)]


@pytest.mark.parametrize(
    ("words", "sentence"), [(["nowhere"], "nowhere is neither"), (["9" * 30], "is not the number")]
)
def test_what_is_no_training_is_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(LfsvcError, match=sentence):
        plot.find_trainings(words)


def test_a_missing_or_empty_log_is_a_sentence_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(LfsvcError, match=r"Job 3 has no training log: .*/trainer_log.jsonl: No such file"):
        plot.load_points(str(tmp_path), "Job 3")
    for text in ("", END, log(2, loss=math.nan)):
        (tmp_path / "trainer_log.jsonl").write_text(text)
        with pytest.raises(LfsvcError, match=r"Job 3 has no loss yet in .*/trainer_log.jsonl"):
            plot.load_points(str(tmp_path), "Job 3")


@pytest.mark.parametrize("output", ["loss.pdf", "loss", ".png", "png"])
def test_other_formats_are_refused_before_anything_is_done(output: str) -> None:
    with pytest.raises(LfsvcError, match=r"must end in \.png or \.svg"):
        plot.plot(["1"], output)


def test_nothing_to_plot_is_wrong_use() -> None:
    with pytest.raises(LfsvcError, match="IDs or folders"):
        plot.plot([], "loss.png")


def test_without_matplotlib_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if not hasattr(finder, "known_source_files")]
    )
    with pytest.raises(LfsvcError, match=r"^Drawing curves needs matplotlib\.$") as caught:
        plot.plot(["1"], "loss.png")
    assert caught.value.hint == "pip install 'lfsvc[plot]'"


@pytest.mark.usefixtures("_matplotlib")
def test_curves_become_a_picture_and_what_has_no_loss_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = training(tmp_path / "a", log(*range(2, 200, 2)))
    second = training(tmp_path / "_$b_实验", LINE + END)
    third = training(tmp_path / "c", "")
    output = tmp_path / "out.PNG"
    output.write_text("an older one")
    assert plot.plot([str(first), str(second), str(third)], str(output)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{output}\n"
    assert printed.err.splitlines() == [f"lfsvc: {third} has no loss yet in {third}/trainer_log.jsonl."]
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(tmp_path.glob("*.new"))
    with pytest.raises(LfsvcError, match="has no loss yet"):
        plot.plot([str(third)], str(output))


@pytest.mark.usefixtures("_matplotlib")
def test_the_same_curves_give_the_same_svg(tmp_path: Path) -> None:
    curves = [
        plot.Curve(label=f"run {number}", points=[(step, 1 / (step + number)) for step in range(1, 60)])
        for number in range(1, 10)
    ]
    for name in ("one.svg", "two.svg"):
        plot.draw(curves, str(tmp_path / name))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


@pytest.mark.usefixtures("_matplotlib")
def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LfsvcError, match="cannot be written"):
        plot.draw([plot.Curve(label="a", points=[(1, 1.0)])], str(tmp_path / "none" / "x.png"))
