"""The real llamafactory-cli under the real systemd: a tiny model, trained for seconds."""

from __future__ import annotations

import csv
import os
import re

import pytest
from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"
RESULTS = f"{HOME}/.local/share/lfsvc/eval_results"
OPTIONS = ["--env", "HF_HUB_OFFLINE=1", "--env"]
MINUTES = 60.0


@pytest.fixture
def real(user: Machine) -> Scheduler:
    folder = os.environ.get("LFSVC_LLAMAFACTORY", "")
    if not folder:
        if os.environ.get("LFSVC_REQUIRE_INTEGRATION"):
            pytest.fail("LFSVC_LLAMAFACTORY is not set: run ./tests/run.sh")
        pytest.skip("LFSVC_LLAMAFACTORY is not set: run ./tests/run.sh")
    user.run([f"{folder}/bin/python", "/opt/tiny_model.py", W], timeout=120)
    scheduler = Scheduler(user, "systemd")
    scheduler.env["PATH"] = f"/opt/lfsvc/bin:{folder}/bin:/usr/bin:/bin"
    scheduler.cli("setup", "--no-linger")
    return scheduler


def journal(real: Scheduler, *fields: str) -> str:
    found = " ".join(fields)
    return real.machine.sh(f"journalctl --user -u lfsched {found} -o cat --since=@{real.machine.begin}")


def same_lines(real: Scheduler, step: str, log: str, job_id: int) -> None:
    """Every line of the log is in the journal, but for the states of progress bars, of which one a second is."""
    shown = {line.strip() for line in journal(real, f"JOB_ID={job_id}", f"JOB_STEP={step}").splitlines()}
    lines = [line.rpartition("\r")[2].strip() for line in real.machine.sh(f"cat {log}").split("\n")]
    lines = [line for line in lines if line and not re.search(r"\d+%\||(examples|it)/s\]", line)]
    assert len(lines) > 10
    assert [line for line in lines if line not in shown] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_submitted_training_ends_as_a_row_in_the_table(real: Scheduler, ranks: int) -> None:
    task = f"{W}/train.yaml@0,1"
    job = real.submit(task, "--name", "sums", *OPTIONS, f"NPROC_PER_NODE={ranks}")
    wait_until(lambda: real.job(job).get("progress"), lambda: real.log(job)[-2000:], 2 * MINUTES)
    status = real.machine.sh("systemctl --user show -p StatusText --value lfsched")
    assert re.match(rf"job {job} train sums: \d+ %", status), status
    assert len(real.machine.sh("pgrep -f '[l]auncher.py'").split()) == ranks + 1, "torchrun and its ranks"
    rank = real.machine.sh("pgrep -f '[p]ython.*launcher.py' | tail -n 1").strip()
    environment = real.machine.sh(f"tr '\\0' '\\n' </proc/{rank}/environ").splitlines()
    assert {"CUDA_VISIBLE_DEVICES=0,1", "ASCEND_RT_VISIBLE_DEVICES=0,1", f"LFSVC_JOB_ID={job}"} <= set(environment)

    trained = real.wait(job, 3 * MINUTES)
    assert trained["state"] == "succeeded", real.log(job)[-2000:]
    assert [(step["name"], step["state"]) for step in trained["steps"]] == [
        ("train", "succeeded"), ("merge", "succeeded"),
    ]  # fmt: skip
    assert trained["model"] == f"{W}/saves/sums/merged"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        real.machine.sh(f"ls {trained['model']}").split()
    )
    assert trained["progress"]["current_steps"] == trained["progress"]["total_steps"]

    (number,) = trained["evaluations"]
    evaluated = real.wait(number, 3 * MINUTES)
    assert (evaluated["state"], evaluated["parent"], evaluated["devices"]) == ("succeeded", job, [0, 1]), real.log(
        number
    )[-2000:]
    table = list(csv.DictReader(real.machine.sh(f"cat {RESULTS}/summary.csv").splitlines()))
    assert [(row["run"], row["mode"], row["type"]) for row in table] == [("sums", "eval", "lora")]
    assert float(table[0]["eval_loss"]) > 0 and 0 <= float(table[0]["eval_accuracy"]) <= 1
    assert table[0]["path"] == evaluated["output_dir"] == f"{RESULTS}/sums_eval"

    for step in trained["steps"]:
        same_lines(real, step["name"], step["log"], job)
    same_lines(real, "eval", evaluated["log"], number)
    screen = real.cli("show", str(job)).stdout
    assert f"evaluation  job {number}, succeeded" in screen and "step merge  succeeded in" in screen


def test_a_failing_training_between_two_good_ones(real: Scheduler) -> None:
    good, broken = f"{W}/train.yaml", f"{W}/broken.yaml"
    real.machine.sh(f"sed 's/dataset: sums/dataset: product/' {good} >{broken}")
    first = real.submit(f"{good}#no_eval", *OPTIONS, "NPROC_PER_NODE=1")
    # A job ahead may bring the data set: taken in, with a warning.
    second = real.submit(broken, *OPTIONS, "NPROC_PER_NODE=1")
    last = real.submit(f"{good}#no_eval", *OPTIONS, "FORCE_TORCHRUN=0")
    assert any("product is not in" in warning for warning in real.job(second)["warnings"])
    jobs = [real.wait(job, 4 * MINUTES) for job in (first, second, last)]
    assert [job["state"] for job in jobs] == ["succeeded", "failed", "succeeded"]
    assert "product" in jobs[1]["failure"] and "dataset_info.json" in jobs[1]["failure"], jobs[1]["failure"]
    assert "ChildFailedError" not in jobs[1]["failure"] and "CalledProcessError" not in jobs[1]["failure"]
    assert [step["state"] for step in jobs[1]["steps"]] == ["failed", "skipped"]
    # #no_eval and a failure queue nothing.
    assert [job.get("evaluations") for job in jobs] == [None, None, None]
    assert len(real.cli("list").stdout.splitlines()) == 4, "three jobs and a failure"
    shown = journal(real, f"JOB_ID={second}")
    assert f"Job {second} failed, exit status 1: {jobs[1]['failure']}" in shown


def test_a_kill_of_a_real_two_rank_training_reaches_every_rank(real: Scheduler) -> None:
    yaml = real.machine.sh(f"sed 's/num_train_epochs: .*/num_train_epochs: 2000.0/' {W}/train.yaml")
    path = real.machine.write(f"{W}/long.yaml", yaml)
    job = real.submit(path, *OPTIONS, "NPROC_PER_NODE=2")
    ranks = "pgrep -cf '[l]auncher.py'; true"
    wait_until(lambda: "trainer_log.jsonl" in real.machine.sh(f"ls {W}/saves/sums; true"), "training not begun", 120)
    assert int(real.machine.sh(ranks)) >= 3, "torchrun and two ranks"
    real.cli("kill")
    ended = real.wait(job)
    assert ended["state"] == "killed"
    assert [step["state"] for step in ended["steps"]] == ["killed", "skipped"]
    assert "evaluations" not in ended
    assert real.machine.sh(ranks).strip() == "0"
    assert real.wait(real.script("after", "true"))["state"] == "succeeded"
