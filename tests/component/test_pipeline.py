"""Train → merge and eval → collect: real spec, real runner, real follow-ups; the stand-in for llamafactory-cli."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lfsvc.config import Config
from lfsvc.job import Job, State, StepState
from lfsvc.runner import merge
from lfsvc.service.database import Database
from lfsvc.service.evaluations import follow_ups, is_due
from lfsvc.service.specs import Surroundings, spec_of
from lfsvc.service.verdict import Verdict, judge
from lfsvc.task import parse

from .conftest import LAUNCH

STANDIN = Path(__file__).parent.parent / "support" / "llamafactory-cli"
TRAINING = """\
model_name_or_path: {folder}/base
stage: sft
do_train: true
dataset: sums
val_size: 0.1
template: default
output_dir: saves/run
"""


class Lab:
    """A folder with a base model, and jobs that run in it one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
        (folder / "bin").mkdir()
        (folder / "bin" / "llamafactory-cli").symlink_to(STANDIN)
        self.output_dir = folder / "saves" / "run"
        self.config = Config(results_root=str(folder / "results"))
        self.environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "STANDIN_LINES": "3"}
        (folder / "state").mkdir(mode=0o700)
        self._database = Database(str(folder / "state"))

    def yaml(self, text: str = TRAINING, name: str = "run.yaml") -> str:
        path = self.folder / name
        path.write_text(text.format(folder=self.folder))
        return str(path)

    def job(self, task: str, output_dir: str = "") -> Job:
        return Job(
            id=0, task=parse(task), text=task, working_directory=str(self.folder), umask=0o027,
            output_dir=output_dir or str(self.output_dir), environment={"OWN": "1"},
        )  # fmt: skip

    def start(self, job: Job, snapshot: bytes) -> tuple[Job, subprocess.Popen[bytes]]:
        job = self._database.add(job, snapshot)
        job = self._database.change(job.id, State.RUNNING, attempt=1)
        surroundings = Surroundings(
            environment=self.environment, umask=0o022, nudge_socket="/nowhere", environment_file=dict
        )
        folder = self._database.job_folder(job.id)
        spec = spec_of(job, folder=folder, config=self.config, surroundings=surroundings, journal_spent=[])
        Path(folder, "spec.json").write_text(json.dumps(spec))
        return job, subprocess.Popen([sys.executable, "-X", "utf8", "-I", "-S", LAUNCH, folder], start_new_session=True)

    def end(self, job: Job, process: subprocess.Popen[bytes]) -> tuple[Verdict, list[tuple[Job, bytes]], list[str]]:
        process.wait(30)
        folder = self._database.job_folder(job.id)
        result = json.loads(Path(folder, "result.json").read_text())
        if result["stopped"]:
            job = replace(job, kill_requested_at=1)
        verdict = judge(job, result=result, status=None, reason="", interrupted=False, requeue=False)
        found: tuple[list[tuple[Job, bytes]], list[str]] = ([], [])
        if is_due(job, verdict):
            found = follow_ups(job, folder, model=verdict.model, config=self.config)
        return verdict, *found

    def run(self, task: str = "", **environment: str) -> tuple[Verdict, list[tuple[Job, bytes]], list[str]]:
        self.environment.update(environment)
        task = task or f"train:{self.yaml()}"
        job = self.job(task)
        return self.end(*self.start(job, Path(job.task.path).read_bytes()))

    def run_job(self, job: Job, snapshot: bytes) -> Verdict:
        return self.end(*self.start(job, snapshot))[0]

    def table(self) -> list[dict[str, str]]:
        with open(self.folder / "results" / "summary.csv", newline="") as file:
            return list(csv.DictReader(file))

    def log(self, kind: str) -> str:
        return "".join(path.read_text() for path in sorted(self.output_dir.glob(f"{kind}_*.log")))

    def close(self) -> None:
        self._database.close()


@pytest.fixture
def lab(tmp_path: Path) -> Any:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def steps(verdict: Verdict) -> dict[str, str]:
    return {step.name: step.state.value for step in verdict.steps}


def note_of(verdict: Verdict, name: str) -> str:
    return next(step.note for step in verdict.steps if step.name == name)


def standin(lab: Lab, before: str) -> None:
    """Put lines of sh before the stand-in."""
    program = lab.folder / "bin" / "llamafactory-cli"
    program.unlink()
    program.write_text(f'#!/bin/sh\n{before}\nexec {STANDIN} "$@"\n')
    program.chmod(0o755)


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".merged")]


def test_from_a_training_to_its_row_in_the_table(lab: Lab) -> None:
    verdict, queued, warnings = lab.run(f"train:{lab.yaml()}@0,1")
    assert (verdict.state, steps(verdict), warnings) == (
        State.SUCCEEDED, {"train": "succeeded", "merge": "succeeded"}, [],
    )  # fmt: skip
    assert verdict.model == str(lab.output_dir / "merged")
    assert verdict.progress["current_steps"] == 3
    assert (lab.output_dir / "merged" / "model.safetensors").is_file()
    (config,) = lab.output_dir.glob("merge_lora_*.yaml")
    assert yaml.safe_load(config.read_text())["adapter_name_or_path"] == str(lab.output_dir)
    assert "stand-in export" in lab.log("merge_lora") and leftovers(lab.output_dir) == []

    ((job, snapshot),) = queued
    assert job.text == f"eval:{job.task.path}@0,1"
    assert (job.working_directory, job.environment, job.umask, job.parent) == (
        str(lab.folder), {"OWN": "1"}, 0o027, 1,
    )  # fmt: skip
    generated = Path(job.task.path)
    assert generated.parent == lab.output_dir and generated.name.startswith("eval_run_")
    assert generated.read_bytes() == snapshot and generated.stat().st_mode & 0o777 == 0o640
    values = yaml.safe_load(snapshot)
    assert values["model_name_or_path"] == verdict.model
    assert values["output_dir"] == job.output_dir == f"{lab.folder}/results/run_eval"

    assert steps(lab.run_job(job, snapshot)) == {"eval": "succeeded", "collect": "succeeded"}
    (row,) = lab.table()
    assert (row["run"], row["mode"], row["type"], row["model"]) == ("run", "eval", "lora", verdict.model)
    assert (row["path"], row["eval_accuracy"]) == (job.output_dir, "0.25")
    # By hand it is the same row again.
    lab.run_job(lab.job(f"eval:{generated}", job.output_dir), snapshot)
    assert [row["run"] for row in lab.table()] == ["run"]


def test_a_killed_merge_leaves_the_older_model_and_queues_nothing(lab: Lab) -> None:
    lab.run()
    before = (lab.output_dir / "merged" / "model.safetensors").stat().st_ino
    (lab.folder / "bin" / "llamafactory-cli").unlink()
    fake = lab.folder / "bin" / "llamafactory-cli"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = export ]; then kill -TERM $PPID; sleep 100; fi\nexec {STANDIN} "$@"\n')
    fake.chmod(0o755)
    verdict, queued, _ = lab.run()
    assert (verdict.state, steps(verdict)) == (State.KILLED, {"train": "succeeded", "merge": "killed"})
    assert queued == [] and leftovers(lab.output_dir) == []
    assert (lab.output_dir / "merged" / "model.safetensors").stat().st_ino == before


def test_a_training_that_was_interrupted_in_its_merge_is_not_run_again(lab: Lab) -> None:
    verdict, _, _ = lab.run()
    trained = replace(verdict.steps[0], note="")
    (lab.output_dir / "trainer_log.jsonl").unlink()
    again = replace(lab.job(f"train:{lab.yaml()}"), steps=(trained, replace(verdict.steps[1], state=StepState.KILLED)))
    verdict, queued, _ = lab.end(*lab.start(again, Path(lab.yaml()).read_bytes()))
    assert (verdict.state, verdict.steps[0], steps(verdict)["merge"]) == (State.SUCCEEDED, trained, "succeeded")
    assert len(queued) == 1 and not (lab.output_dir / "trainer_log.jsonl").exists()
    assert len(list(lab.output_dir.glob("llamafactory_train_*.log"))) == 1


def test_a_second_merge_replaces_the_first(lab: Lab) -> None:
    lab.run()
    before = (lab.output_dir / "merged" / "model.safetensors").stat().st_ino
    verdict, _, _ = lab.run()
    assert (verdict.state, verdict.warnings) == (State.SUCCEEDED, ())
    assert (lab.output_dir / "merged" / "model.safetensors").stat().st_ino != before
    assert leftovers(lab.output_dir) == [] and not list(lab.output_dir.glob("merged_*"))


def test_what_a_user_put_into_a_merged_model_is_kept(lab: Lab) -> None:
    lab.run()
    (lab.output_dir / "merged" / "model-q4.gguf").write_text("hours of conversion")
    verdict, _, _ = lab.run()
    (kept,) = lab.output_dir.glob("merged_before_*")
    assert (kept / "model-q4.gguf").read_text() == "hours of conversion"
    assert verdict.warnings == (f"the merged model before this one had files of yours in it: it is kept as {kept}",)
    assert verdict.model == f"{lab.output_dir}/merged" and leftovers(lab.output_dir) == []


def test_a_merged_folder_that_appears_during_the_export_is_left_alone(lab: Lab) -> None:
    standin(lab, f'if [ "$1" = export ]; then mkdir -p {lab.output_dir}/merged; touch {lab.output_dir}/merged/own; fi')
    verdict, queued, _ = lab.run()
    assert (verdict.failed_step, verdict.exit_status, verdict.model) == ("merge", 1, "")
    assert (lab.output_dir / "merged" / "own").exists() and leftovers(lab.output_dir) == []
    assert yaml.safe_load(queued[0][1])["adapter_name_or_path"] == str(lab.output_dir)


def test_a_fault_after_a_step_fails_that_step_and_not_the_runner(lab: Lab) -> None:
    # What the export leaves is no file: its size cannot be read, nor can it be made durable.
    standin(lab, 'if [ "$1" = export ]; then kill -9 $$; fi')
    verdict, _, _ = lab.run()
    assert (verdict.state, verdict.failed_step, verdict.exit_status) == (State.FAILED, "merge", 137)
    assert leftovers(lab.output_dir) == []


def test_a_failed_merge_fails_the_job_and_the_adapter_is_evaluated_on_its_base(lab: Lab) -> None:
    lab.output_dir.mkdir(parents=True)
    (lab.output_dir / "merged").mkdir()
    (lab.output_dir / "merged" / "own.txt").write_text("precious")
    verdict, queued, _ = lab.run()
    assert (verdict.state, verdict.failed_step, verdict.exit_status, verdict.model) == (State.FAILED, "merge", 1, "")
    assert verdict.failure.startswith(f"The adapter was not merged: {lab.output_dir}/merged is there and was not made")
    assert (lab.output_dir / "merged" / "own.txt").read_text() == "precious"
    values = yaml.safe_load(queued[0][1])
    assert (values["model_name_or_path"], values["adapter_name_or_path"], values["finetuning_type"]) == (
        f"{lab.folder}/base", str(lab.output_dir), "lora",
    )  # fmt: skip


def test_too_little_room_is_seen_before_anything_is_written(lab: Lab) -> None:
    with open(lab.folder / "base" / "model.safetensors", "wb") as file:
        # Sparse: larger than any disk that tests run on.
        file.truncate(2**42)
    verdict, _, _ = lab.run()
    assert (verdict.failed_step, leftovers(lab.output_dir)) == ("merge", [])
    assert "a merged model takes about 4398.0 GB" in verdict.failure and "merge.enabled: false" in verdict.failure


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ("finetuning_type: full\n", "finetuning_type is full: output_dir is the model already"),
        ("pissa_init: true\n", "pissa_init changes the base model"),
    ],
)
def test_a_skipped_merge_says_why_in_the_log_too(lab: Lab, change: str, note: str) -> None:
    verdict, queued, _ = lab.run(f"train:{lab.yaml(TRAINING + change)}")
    assert (verdict.state, steps(verdict)["merge"]) == (State.SUCCEEDED, "skipped")
    assert note_of(verdict, "merge").startswith(note)
    assert f"[lfsvc] merge skipped: {note}" in lab.log("llamafactory_train")
    assert len(queued) == 1


def test_only_an_adapter_of_this_very_step_is_merged(lab: Lab) -> None:
    lab.output_dir.mkdir(parents=True)
    (lab.output_dir / "adapter_model.safetensors").write_bytes(b"of an earlier run")
    standin(lab, "exit 0")
    verdict, _, _ = lab.run()
    assert note_of(verdict, "merge") == f"the training has written no adapter into {lab.output_dir}"


def test_a_quantised_base_takes_no_merge(lab: Lab) -> None:
    (lab.folder / "base" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    verdict, _, _ = lab.run()
    assert (
        note_of(verdict, "merge")
        == f"the base model {lab.folder}/base is quantised (awq), and such a one takes no merge"
    )


def test_a_failed_training_is_neither_merged_nor_evaluated(lab: Lab) -> None:
    verdict, queued, _ = lab.run(STANDIN_EXIT="3")
    assert (verdict.state, verdict.failed_step, steps(verdict)["merge"]) == (State.FAILED, "train", "skipped")
    assert note_of(verdict, "merge") == "the train step failed"
    assert "RuntimeError: the stand-in was told to fail" in verdict.failure
    assert queued == []


def test_merging_can_be_turned_off(lab: Lab) -> None:
    lab.config = replace(lab.config, merge_enabled=False)
    verdict, queued, _ = lab.run()
    assert note_of(verdict, "merge") == "merging is turned off (merge.enabled in config.yaml)"
    assert yaml.safe_load(queued[0][1])["adapter_name_or_path"] == str(lab.output_dir)


def test_checkpoints_go_only_when_the_config_says_so_and_the_model_is_there(lab: Lab) -> None:
    checkpoint, best = lab.output_dir / "checkpoint-20", lab.output_dir / "checkpoint-best"
    for folder in (checkpoint, best):
        folder.mkdir(parents=True)
    lab.run()
    assert checkpoint.is_dir()
    lab.config = replace(lab.config, merge_delete_checkpoints=True)
    lab.run(STANDIN_EXIT="1")
    assert checkpoint.is_dir()
    lab.run(STANDIN_EXIT="0")
    assert not checkpoint.exists() and best.is_dir()


def test_no_eval_and_no_data_queue_nothing(lab: Lab) -> None:
    assert lab.run(f"train:{lab.yaml()}#no_eval")[1:] == ([], [])
    assert lab.run(f"train:{lab.yaml(TRAINING.replace('val_size: 0.1', ''))}")[1:] == ([], [])


def test_every_template_is_an_evaluation_of_its_own(lab: Lab) -> None:
    predict = lab.yaml("# ours\ndo_predict: true\npredict_with_generate: true\neval_dataset: bench\n", "gsm8k.yaml")
    bench = lab.yaml("task: mmlu_test\ntemplate: fewshot\nlang: en\n", "mmlu.yaml")
    lab.config = replace(lab.config, evaluation_template=(predict, bench, "/nowhere/gone.yaml"))
    for round_number in (1, 2):
        verdict, queued, warnings = lab.run()
        assert verdict.state is State.SUCCEEDED
        (warning,) = warnings
        assert warning.startswith("no evaluation was queued: the evaluation template /nowhere/gone.yaml cannot be read")
        (first, first_yaml), (second, second_yaml) = queued
        assert first.output_dir == f"{lab.folder}/results/run_gsm8k"
        assert b"# ours\ndo_predict: true\n" in first_yaml
        values = yaml.safe_load(second_yaml)
        # A benchmark refuses a folder that is there, so each run gets its own.
        assert values["save_dir"] == f"{lab.folder}/results/run_mmlu" + ("" if round_number == 1 else "_2")
        assert second.output_dir == "" and values["template"] == "fewshot"
        lab.run_job(first, first_yaml)
        lab.run_job(second, second_yaml)
    rows = {(row["run"], row["mode"]): row for row in lab.table()}
    assert rows["run", "gsm8k"]["predict_bleu-4"] == "12.5"
    assert rows["run", "mmlu"]["average"] == "25.0"
    assert len(lab.table()) == 3


def test_two_benchmarks_that_wait_do_not_share_a_folder(lab: Lab) -> None:
    lab.config = replace(lab.config, evaluation_template=(lab.yaml("task: mmlu_test\n", "mmlu.yaml"),))
    queued = [lab.run()[1][0] for _ in range(2)]
    folders = [yaml.safe_load(snapshot)["save_dir"] for _, snapshot in queued]
    assert folders == [f"{lab.folder}/results/run_mmlu", f"{lab.folder}/results/run_mmlu_2"]
    assert [lab.run_job(job, snapshot).state for job, snapshot in queued] == [State.SUCCEEDED] * 2


def test_an_evaluation_says_that_its_model_was_made_anew_meanwhile(lab: Lab) -> None:
    _, ((job, snapshot),), _ = lab.run()
    lab.run()
    verdict = lab.run_job(job, snapshot)
    assert verdict.warnings == (f"{lab.output_dir}/merged is no longer the model of job 1: job 2 made it anew",)


def test_two_runs_of_one_name_do_not_share_a_folder(lab: Lab) -> None:
    _, ((job, _),), _ = lab.run()
    other = lab.yaml(TRAINING.replace("saves/run", "other/run"), "other.yaml")
    lab.output_dir = lab.folder / "other" / "run"
    _, ((second, _),), _ = lab.run(f"train:{other}")
    assert (job.output_dir, second.output_dir) == (f"{lab.folder}/results/run_eval", f"{lab.folder}/results/run_eval_2")
    lab.output_dir = lab.folder / "saves" / "run"
    assert lab.run()[1][0][0].output_dir == job.output_dir


def test_a_yaml_that_only_predicts_is_collected_and_queues_nothing(lab: Lab) -> None:
    text = "model_name_or_path: m\nadapter_name_or_path: a\ndo_predict: true\noutput_dir: saves/run\n"
    verdict, queued, _ = lab.run(lab.yaml(text))
    assert steps(verdict) == {"train": "succeeded", "merge": "skipped", "collect": "succeeded"}
    assert queued == []
    (row,) = lab.table()
    assert (row["run"], row["mode"], row["type"], row["model"]) == ("run", "predict", "lora", "a")


def test_a_table_that_cannot_be_written_fails_the_step_and_keeps_the_results(lab: Lab) -> None:
    (lab.folder / "results").write_text("in the way")
    text = "model_name_or_path: m\ndo_eval: true\noutput_dir: saves/run\n"
    verdict, _, _ = lab.run(f"eval:{lab.yaml(text)}")
    assert (verdict.state, verdict.failed_step) == (State.FAILED, "collect")
    assert f"The results themselves are in {lab.output_dir}" in verdict.failure
    assert (lab.output_dir / "eval_results.json").is_file()


def test_results_that_cannot_be_kept_are_a_warning_of_the_training(lab: Lab) -> None:
    (lab.folder / "results").write_text("in the way")
    verdict, queued, warnings = lab.run()
    assert (verdict.state, queued) == (State.SUCCEEDED, [])
    assert warnings[0].startswith(f"no evaluation was queued: results_root {lab.folder}/results cannot be written to: ")


def test_a_full_output_dir_does_not_cost_the_evaluation(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    _, queued, _ = lab.run()
    job = replace(lab.job(f"train:{lab.yaml()}"), id=1, output_dir="/proc/run")
    found, warnings = follow_ups(job, str(lab.folder / "state/jobs/1"), model="", config=lab.config)
    assert warnings == [] and queued
    assert found[0][0].task.path.startswith(f"{lab.folder}/state/jobs/1/eval_run_")


@pytest.mark.parametrize("exchange", [True, False])
def test_what_a_crash_left_is_mended_by_the_next_merge(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(name: str, content: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / merge.MARKER).write_text('{"files": ["content"]}')
        (tmp_path / name / "content").write_text(content)
        return tmp_path / name

    if not exchange:
        # As on a file system without RENAME_EXCHANGE.
        monkeypatch.setattr(merge, "exchange", lambda one, other: False)
    merged = model("merged", "old")
    merge.swap(str(model(merge.PARTIAL, "new")), str(merged))
    assert (merged / "content").read_text() == "new"
    assert os.listdir(tmp_path) == ["merged"]
    # Cut off between the two renames.
    merged.rename(tmp_path / merge.OLD)
    model(merge.PARTIAL, "half")
    foreign = tmp_path / f"{merge.PARTIAL}_2"
    foreign.mkdir()
    (foreign / "own").touch()
    # Cut off before its marker was written.
    (tmp_path / f"{merge.PARTIAL}_3").mkdir()
    merge.recover(str(tmp_path))
    assert (merged / "content").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "merged"]


def test_the_merged_model_is_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not merge.exchange(str(tmp_path / "a"), str(tmp_path / "b")):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError):
        merge.exchange(str(tmp_path / "a"), str(tmp_path / "gone"))


def test_progress_arrives_while_the_step_runs(lab: Lab) -> None:
    lab.environment["STANDIN_SLEEP"] = "100"
    job, process = lab.start(lab.job(f"train:{lab.yaml()}"), Path(lab.yaml()).read_bytes())
    status = lab.folder / "state" / "jobs" / "1" / "status.json"
    found: dict[str, Any] = {}
    while not found.get("progress") and process.poll() is None:
        found = json.loads(status.read_text()) if status.exists() else {}
    assert (found["progress"]["current_steps"], found["progress"]["total_steps"]) == (3, 3)
    process.send_signal(signal.SIGTERM)
    verdict, queued, _ = lab.end(job, process)
    assert (verdict.state, steps(verdict)["merge"], queued) == (State.KILLED, "skipped", [])
    assert note_of(verdict, "merge") == "the job was killed"
