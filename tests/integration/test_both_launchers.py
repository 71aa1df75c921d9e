"""What holds with a systemd unit for each job and without systemd alike: the same tests on both launchers."""

from __future__ import annotations

import time

from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"


def processes_named(machine: Machine, word: str) -> str:
    return machine.sh(f"pgrep -af '^{word}' ; true").strip()


def test_a_script_runs_where_it_was_submitted_with_its_environment(scheduler: Scheduler) -> None:
    scheduler.machine.write(f"{W}/beside.sh", "echo sourced")
    job = scheduler.script(
        "env",
        'pwd; echo "$SECRET|$LFSVC_JOB_ID|$FORCE_TORCHRUN|$0"; . "$(dirname "$0")/beside.sh"; umask; cat; ulimit -Sn;'
        " [ $(ulimit -Sn) = $(ulimit -Hn) ] && echo raised; tty",
        "--env", "SECRET=a b $HOME %i",
    )  # fmt: skip
    scheduler.wait(job)
    lines = scheduler.log(job).splitlines()
    assert lines[:4] == [HOME, f"a b $HOME %i|{job}|1|{W}/env.sh", "sourced", "0022"]
    assert lines[-2:] == ["raised", "not a tty"]
    assert "a b" not in scheduler.cli("show", "--json", str(job)).stdout


def test_jobs_run_one_after_another_in_their_order_and_a_failure_does_not_stop_them(scheduler: Scheduler) -> None:
    text = f"echo start-{{0}} >>{W}/order; sleep 0.2; echo end-{{0}} >>{W}/order; exit {{1}}"
    jobs = [scheduler.script(name, text.format(name, status)) for name, status in (("a", 0), ("b", 7), ("c", 0))]
    ended = [scheduler.wait(job) for job in jobs]
    assert [job["state"] for job in ended] == ["succeeded", "failed", "succeeded"]
    assert [job["exit_status"] for job in ended] == [0, 7, 0]
    order = scheduler.machine.sh(f"cat {W}/order").split()
    assert order == ["start-a", "end-a", "start-b", "end-b", "start-c", "end-c"]


def test_a_kill_reaches_sessions_of_their_own_and_leaves_nothing(scheduler: Scheduler) -> None:
    job = scheduler.script(
        "tree", f"for i in $(seq 32); do setsid sleep 98765 & done; touch {W}/up; setsid setsid sleep 98765; wait"
    )
    scheduler.wait_for_file(f"{W}/up")
    begin = time.monotonic()
    scheduler.cli("kill")
    ended = scheduler.wait(job)
    assert time.monotonic() - begin < 5, "those that obey SIGTERM are not waited for until the grace is over"
    assert ended["state"] == "killed" and ended["exit_status"] == 143
    assert "failure" not in ended
    assert processes_named(scheduler.machine, "sleep 98765") == ""


def test_stubborn_processes_are_gone_after_the_grace_time(scheduler: Scheduler) -> None:
    scheduler.machine.write(f"{HOME}/.config/lfsvc/config.yaml", "kill_grace: 1\n")
    if scheduler.mode == "systemd":
        scheduler.machine.run(["systemctl", "--user", "reload", "lfsched"])
    else:
        scheduler.machine.run(["kill", "-HUP", str(scheduler.pid())])
    wait_until(lambda: scheduler.cli("status").returncode == 0, "no answer")
    job = scheduler.script(
        "stubborn",
        "trap '' TERM; for i in 1 2 3; do setsid bash -c 'trap \"\" TERM; while :; do sleep 98764; done' & done;"
        f" touch {W}/up; while :; do sleep 98764; done",
    )
    scheduler.wait_for_file(f"{W}/up")
    begin = time.monotonic()
    scheduler.cli("kill", str(job))
    ended = scheduler.wait(job)
    # A second for the grace, and a second more as the promise has it; waiting and asking included.
    assert 0.9 < time.monotonic() - begin < 3
    assert ended["state"] == "killed"
    assert processes_named(scheduler.machine, "(sleep 98764|bash -c trap)") == ""


def test_a_waiting_job_is_cancelled_and_never_runs(scheduler: Scheduler) -> None:
    first = scheduler.script("first", f"touch {W}/up; sleep 98763")
    second = scheduler.script("second", f"touch {W}/second")
    scheduler.wait_for_file(f"{W}/up")
    assert "cancelled" in scheduler.cli("kill", str(second)).stdout
    third = scheduler.script("third", "true")
    scheduler.cli("kill", str(first))
    assert scheduler.wait(third)["state"] == "succeeded"
    assert scheduler.job(second)["state"] == "cancelled"
    assert scheduler.machine.run(["test", "-e", f"{W}/second"], check=False).returncode == 1


def test_what_a_script_leaves_behind_is_ended_and_named(scheduler: Scheduler) -> None:
    job = scheduler.script("leaver", "(setsid sleep 98762 >/dev/null 2>&1 &); (sleep 98762 &); sleep 0.2; echo done")
    ended = scheduler.wait(job)
    assert ended["state"] == "succeeded"
    assert "done" in scheduler.log(job)
    assert "[lfsvc] ended 2 processes that the job left behind: sleep 98762 (pid " in scheduler.log(job)
    assert processes_named(scheduler.machine, "sleep 98762") == ""


def test_a_crash_of_the_service_costs_a_job_nothing_and_its_end_is_known(scheduler: Scheduler) -> None:
    job = scheduler.script("long", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done; echo finished; exit 4")
    after = scheduler.script("after", "echo next")
    scheduler.wait_for_file(f"{W}/up")
    scheduler.crash()
    assert scheduler.job(job)["state"] == "running"
    scheduler.machine.run(["touch", f"{W}/go"])
    ended = scheduler.wait(job)
    assert (ended["state"], ended["exit_status"], ended["attempts"]) == ("failed", 4, 1)
    assert scheduler.log(job) == "finished\n"
    assert scheduler.wait(after)["state"] == "succeeded"


def test_an_end_while_the_service_is_down_is_taken_in(scheduler: Scheduler) -> None:
    job = scheduler.script("long", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done; exit 5")
    scheduler.wait_for_file(f"{W}/up")
    scheduler.stop()
    result = f"{HOME}/.local/state/lfsvc/jobs/{job}/result.json"
    scheduler.machine.run(["touch", f"{W}/go"])
    scheduler.wait_for_file(result)
    scheduler.start()
    ended = scheduler.job(job)
    assert (ended["state"], ended["exit_status"]) == ("failed", 5)


def test_a_killed_runner_fails_its_job_with_a_sentence_and_takes_everything_with_it(scheduler: Scheduler) -> None:
    job = scheduler.script("victim", f"setsid sleep 98761 & env -i setsid sleep 98761 & touch {W}/up; sleep 98761")
    after = scheduler.script("after", "true")
    scheduler.wait_for_file(f"{W}/up")
    scheduler.machine.run(["pkill", "-KILL", "-f", "runner/launch.py"])
    ended = scheduler.wait(job)
    assert ended["state"] == "failed" and ended["exit_status"] == 137
    assert "The runner of this job was killed by SIGKILL" in ended["failure"]
    assert processes_named(scheduler.machine, "sleep 98761") == ""
    assert scheduler.wait(after)["state"] == "succeeded"


def test_a_training_gets_its_files_environment_and_arguments(scheduler: Scheduler) -> None:
    yaml = "model_name_or_path: m\nstage: sft\ndo_train: true\noutput_dir: saves/run one\n"
    path = scheduler.machine.write(f"{W}/my.yaml", yaml)
    job = scheduler.wait(scheduler.submit(f"{path}@0,1#no_eval", "--name", "first"))
    assert job["state"] == "succeeded", job
    assert job["output_dir"] == f"{HOME}/saves/run one"
    names = scheduler.machine.sh(f"cd '{HOME}/saves/run one'; ls; rm -rf '{HOME}/saves'").split()
    stamped = [name.rsplit("_", 2)[0] for name in names if name.startswith(("llamafactory_train_", "my_"))]
    assert stamped == ["llamafactory_train", "my"]
    log = scheduler.machine.sh(f"cat {HOME}/.local/state/lfsvc/jobs/{job['id']}/*.log 2>/dev/null; true")
    assert log == "", "the log of a YAML lies in its output_dir"
    assert job["log"].startswith(f"{HOME}/saves/run one/llamafactory_train_")


def test_a_copy_runs_and_later_edits_do_not(scheduler: Scheduler) -> None:
    path = scheduler.machine.write(f"{W}/my.yaml", f"output_dir: {W}/out\ndo_train: true # as submitted\n")
    first = scheduler.script("first", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    script = scheduler.machine.write(f"{W}/edited.sh", "echo as submitted")
    second, third = scheduler.submit(path), scheduler.submit(script)
    scheduler.wait_for_file(f"{W}/up")
    scheduler.machine.write(path, f"output_dir: {W}/other\n")
    scheduler.machine.write(script, "echo edited")
    scheduler.machine.run(["touch", f"{W}/go"])
    assert scheduler.wait(second)["state"] == "succeeded"
    assert "as submitted" in scheduler.machine.sh(f"cat {W}/out/my_*.yaml")
    log = scheduler.log(second)
    assert f"stand-in train {W}/out/my_" in log and f"in {HOME}\n" in log
    for line in ("ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7", "SWANLAB_MODE=disabled", f"LLAMABOARD_WORKDIR={W}/out"):
        assert f"[INFO] {line}\n" in log
    ended = scheduler.wait(third)
    assert "as submitted" in scheduler.log(third)
    assert any("was edited since it was submitted" in warning for warning in ended["warnings"])
    assert scheduler.wait(first)["state"] == "succeeded"


def test_every_byte_reaches_the_file(scheduler: Scheduler) -> None:
    job = scheduler.script("bytes", "printf 'a\\0b\\xff\\xe4\\n'; printf '10%%\\r20%%\\r'; printf 'no end'")
    log = scheduler.wait(job)["log"]
    assert scheduler.machine.sh(f"od -An -tx1 {log} | tr -d ' \\n'").strip() == (
        b"a\0b\xff\xe4\n10%\r20%\rno end".hex()
    )


def test_wait_and_follow_survive_a_restart_of_the_service(scheduler: Scheduler) -> None:
    path = scheduler.machine.write(
        f"{W}/long.sh", f"echo begin; touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done; echo end; exit 9"
    )
    follow = scheduler.machine.popen(["lfsvc", "submit", "--follow", path], env=scheduler.env)
    scheduler.wait_for_file(f"{W}/up")
    wait = scheduler.machine.popen(["lfsvc", "wait", "1"], env=scheduler.env)
    logs = scheduler.machine.popen(["lfsvc", "logs", "-f"], env=scheduler.env)
    assert logs.stdout is not None
    assert logs.stdout.readline() == "begin\n"
    scheduler.crash()
    scheduler.machine.run(["touch", f"{W}/go"])
    outputs = [process.communicate(timeout=30)[0] for process in (follow, wait, logs)]
    assert [process.returncode for process in (follow, wait, logs)] == [9, 9, 0], outputs
    own = ("lfsvc: the scheduler is", "job 1 queued")
    printed = [line for line in outputs[0].splitlines() if not line.startswith(own)]
    assert printed[:2] == ["begin", "end"]


def test_a_second_service_says_that_one_runs(scheduler: Scheduler) -> None:
    second = scheduler.cli("serve", check=False)
    assert second.returncode == 1
    assert f"A scheduler runs already for {HOME}/.local/state/lfsvc (pid {scheduler.pid()})." in second.stderr


def test_sixty_scripts_all_run_once_in_their_order(scheduler: Scheduler) -> None:
    scheduler.machine.write(f"{W}/one.sh", f"echo $LFSVC_JOB_ID >>{W}/ran")
    scheduler.machine.sh(f"lfsvc submit $(for i in $(seq 60); do echo {W}/one.sh; done) >/dev/null", env=scheduler.env)
    scheduler.cli("wait", "--all")
    assert scheduler.machine.sh(f"cat {W}/ran").split() == [str(number) for number in range(1, 61)]


TRAINING = """\
model_name_or_path: {model}
stage: sft
do_train: true
dataset: {dataset}
dataset_dir: {folder}/data
val_size: 0.1
output_dir: {folder}/{name}
"""


def training(scheduler: Scheduler, name: str, *, model: str = "org/base", dataset: str = "sums") -> str:
    """Write a training's YAML and the list of its data sets; give its path."""
    machine = scheduler.machine
    machine.run(["mkdir", "-p", f"{W}/data"])
    machine.write(f"{W}/data/sums.json", "[]")
    machine.write(f"{W}/data/dataset_info.json", '{"sums": {"file_name": "sums.json"}}')
    return machine.write(
        f"{W}/{name}.yaml", TRAINING.format(model=model, dataset=dataset, folder=W, name=f"saves/{name}")
    )


def test_a_training_is_merged_evaluated_and_collected(scheduler: Scheduler) -> None:
    scheduler.machine.write(f"{HOME}/.config/lfsvc/config.yaml", f"results_root: {W}/results\n")
    scheduler.machine.run(["pkill", "-HUP", "-F", f"{HOME}/.local/state/lfsvc/lock"])
    wait_until(
        lambda: scheduler.cli("check", training(scheduler, "one"), check=False).returncode == 0,
        "no answer after a reload",
    )
    job = scheduler.wait(scheduler.submit(f"{training(scheduler, 'one')}@0,1", "--name", "first", "--env", "OWN=1"))
    assert [(step["name"], step["state"]) for step in job["steps"]] == [("train", "succeeded"), ("merge", "succeeded")]
    (number,) = job["evaluations"]
    evaluation = scheduler.wait(number)
    assert (evaluation["state"], evaluation["parent"], evaluation["name"]) == ("succeeded", job["id"], "first")
    assert evaluation["devices"] == [0, 1]
    assert "CUDA_VISIBLE_DEVICES=0,1" in scheduler.log(number)
    table = scheduler.cli("results", "--csv").stdout.splitlines()
    assert table[0].startswith("run,mode,type,model,finished_at,path,eval_accuracy")
    assert table[1].startswith(f"one,eval,lora,{W}/saves/one/merged,")
    # Logs of a training are those of all its steps, in their order.
    log = scheduler.log(job["id"])
    assert log.index("stand-in train") < log.index("stand-in export")


def test_a_chain_can_be_queued_as_a_whole(scheduler: Scheduler) -> None:
    blocker = scheduler.script("blocker", f"while [ ! -e {W}/go ]; do sleep 0.1; done")
    first = scheduler.submit(training(scheduler, "one"))
    second = scheduler.submit(training(scheduler, "two", model=f"{W}/saves/one/merged") + "#no_eval")
    (warning,) = scheduler.job(second)["warnings"]
    assert (
        warning
        == f"model_name_or_path {W}/saves/one/merged is not there yet: job {first}, ahead of it, will have to make it"
    )
    scheduler.machine.run(["touch", f"{W}/go"])
    assert [scheduler.wait(job)["state"] for job in (blocker, first, second)] == ["succeeded"] * 3


def test_what_is_sure_to_fail_is_refused_unless_forced_and_check_says_the_same(scheduler: Scheduler) -> None:
    path = training(scheduler, "one", dataset="sum")
    sentence = f"lfsvc: {path}: data set sum is not in {W}/data/dataset_info.json (did you mean sums?)."
    for command in ("submit", "check"):
        refused = scheduler.cli(command, path, check=False)
        assert (refused.returncode, refused.stderr.splitlines()[0]) == (2, sentence)
    forced = scheduler.cli("submit", "--force", path)
    assert "warning: submitted by force: " in forced.stderr
    assert scheduler.wait(1)["state"] == "succeeded"


def test_no_evaluation_without_data_is_said_at_submit(scheduler: Scheduler) -> None:
    path = training(scheduler, "one")
    scheduler.machine.sh(f"sed -i /val_size/d {path}")
    done = scheduler.cli("submit", path)
    assert "warning: no evaluation will follow: the YAML has neither eval_dataset nor val_size (" in done.stderr
    assert "no evaluation" not in scheduler.cli("submit", f"{path}#no_eval").stderr
    job = scheduler.wait(1)
    assert job["state"] == "succeeded" and "evaluations" not in job


def test_the_evaluation_can_be_put_next(scheduler: Scheduler) -> None:
    scheduler.machine.write(f"{HOME}/.config/lfsvc/config.yaml", "evaluation: {position: front}\n")
    scheduler.machine.run(["pkill", "-HUP", "-F", f"{HOME}/.local/state/lfsvc/lock"])
    first = scheduler.submit(training(scheduler, "one"), "--env", "STANDIN_SLEEP=1")
    scheduler.script("last", "true")
    (evaluation,) = scheduler.wait(first)["evaluations"]
    jobs = [scheduler.wait(job) for job in (evaluation, 2)]
    assert jobs[0]["finished_at"] <= jobs[1]["started_at"]
