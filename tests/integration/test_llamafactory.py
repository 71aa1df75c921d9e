"""The real llamafactory-cli under the real systemd: a tiny model, trained for seconds."""

from __future__ import annotations

import os

import pytest
from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"
OPTIONS = ["--env", "HF_HUB_OFFLINE=1", "--env"]


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


def test_a_real_training_leaves_its_adapter_its_log_and_its_journal(real: Scheduler) -> None:
    job = real.wait(real.submit(f"{W}/train.yaml#no_eval", *OPTIONS, "NPROC_PER_NODE=1"), 180)
    assert job["state"] == "succeeded", real.log(job["id"])[-2000:]
    names = real.machine.sh(f"ls {W}/saves/sums").split()
    assert {"adapter_model.safetensors", "adapter_config.json", "train_results.json"} <= set(names)
    text = real.machine.sh(f"cat {job['log']}")
    assert "***** train metrics *****" in text
    shown = real.machine.sh(f"journalctl --user -u lfsched JOB_ID={job['id']} -o cat --since=@{real.machine.begin}")
    # Progress bars are thinned out in the journal; all other lines are there.
    for line in text.splitlines():
        if line.startswith("[INFO|") and "\r" not in line:
            assert line.rstrip() in shown


def test_a_kill_of_a_real_two_rank_training_reaches_every_rank(real: Scheduler) -> None:
    yaml = real.machine.sh(f"sed 's/num_train_epochs: .*/num_train_epochs: 2000.0/' {W}/train.yaml")
    path = real.machine.write(f"{W}/long.yaml", yaml)
    job = real.submit(f"{path}#no_eval", *OPTIONS, "NPROC_PER_NODE=2")
    ranks = "pgrep -cf '[l]auncher.py'; true"
    wait_until(lambda: "trainer_log.jsonl" in real.machine.sh(f"ls {W}/saves/sums; true"), "training not begun", 120)
    assert int(real.machine.sh(ranks)) >= 3, "torchrun and two ranks"
    real.cli("kill")
    ended = real.wait(job)
    assert ended["state"] == "killed"
    assert real.machine.sh(ranks).strip() == "0"
    assert real.wait(real.script("after", "true"))["state"] == "succeeded"
