"""`lfsvc logs`, `submit --follow` and `wait`: complete, in order, quick, and ended with the job."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from machine import HOME, Machine, wait_until
from scheduler import Scheduler

W = f"{HOME}/work"

TRAINING = (
    "model_name_or_path: m\nstage: sft\ndo_train: true\nfinetuning_type: lora\ntemplate: default\n"
    f"output_dir: {W}/saves/x\n"
)


@pytest.fixture
def scheduler(user: Machine) -> Iterator[Scheduler]:
    scheduler = Scheduler(user, "systemd")
    scheduler.start()
    yield scheduler


def train(scheduler: Scheduler, *settings: str) -> int:
    path = scheduler.machine.write(f"{W}/x.yaml", TRAINING)
    options = [word for setting in settings for word in ("--env", setting)]
    return scheduler.submit(f"{path}#no_eval", *options, "--force")


def content(scheduler: Scheduler, job: int, *steps: str) -> str:
    """What the log files of a job hold."""
    logs = [step["log"] for step in scheduler.job(job)["steps"] if step.get("log") and step["name"] in steps]
    assert len(logs) == len(steps)
    return scheduler.machine.sh(f"cat {' '.join(logs)}")


def test_following_goes_on_from_train_to_merge_without_losing_or_repeating_a_line(scheduler: Scheduler) -> None:
    job = train(scheduler, "STANDIN_LINES=3000", "STANDIN_SLEEP=1")
    done = scheduler.cli("logs", "-f", str(job))
    merge = scheduler.cli("logs", "-f", "--step", "merge", str(job))
    assert scheduler.job(job)["state"] == "succeeded"
    assert done.stdout == content(scheduler, job, "train", "merge")
    assert "stand-in train" in done.stdout and "stand-in export" in done.stdout
    assert merge.stdout == content(scheduler, job, "merge")


def test_following_the_last_lines_shows_all_that_comes_later(scheduler: Scheduler) -> None:
    job = train(scheduler, "STANDIN_LINES=300", "STANDIN_SLEEP=1")
    wait_until(lambda: "'epoch': 299" in scheduler.cli("logs", check=False).stdout, "the training does not print")
    done = scheduler.cli("logs", "-f", "-n", "2", str(job))
    whole = content(scheduler, job, "train", "merge").splitlines()
    # From two lines before the end of the training's log on, and the whole of the merge's.
    first = next(number for number, line in enumerate(whole) if "'epoch': 298" in line)
    assert done.stdout.splitlines() == whole[first:]


def test_logs_of_a_job_that_ended(scheduler: Scheduler) -> None:
    job = train(scheduler, "STANDIN_LINES=5")
    scheduler.wait(job)
    whole = content(scheduler, job, "train", "merge")
    assert scheduler.cli("logs").stdout == scheduler.cli("logs", "-f", str(job)).stdout == whole
    merge = content(scheduler, job, "merge")
    assert scheduler.cli("logs", "--step", "merge").stdout == merge
    for count in (1, 3, len(merge.splitlines()), len(merge.splitlines()) + 2, 5000):
        tail = "".join(line + "\n" for line in whole.splitlines()[-count:])
        assert scheduler.cli("logs", "-n", str(count)).stdout == tail, count
    wrong = scheduler.cli("logs", "--step", "eval", check=False)
    assert (wrong.returncode, wrong.stderr) == (
        2, f"lfsvc: Job {job} has no step 'eval'.\nhint: its steps are train, merge\n",
    )  # fmt: skip


def test_the_last_lines_of_a_huge_log_are_found_from_its_end(scheduler: Scheduler) -> None:
    job = scheduler.script("huge", "echo begin")
    log = scheduler.wait(job)["log"]
    # Sparse: whoever read all of it would not end before the test's timeout.
    scheduler.machine.sh(f"truncate -s 500G {log}; printf '\\none\\ntwo\\n' >>{log}")
    assert scheduler.cli("logs", "-n", "2", str(job)).stdout == "one\ntwo\n"
    assert scheduler.cli("logs", "-f", "-n", "1", str(job)).stdout == "two\n"


def test_logs_without_a_job_are_of_the_running_one_else_of_the_last_that_ran(scheduler: Scheduler) -> None:
    none = scheduler.cli("logs", check=False)
    assert (none.returncode, none.stderr) == (1, "lfsvc: There is no job yet.\nhint: lfsvc submit TASK\n")
    first = scheduler.script("first", "echo first")
    scheduler.wait(first)
    second = scheduler.script("second", f"echo second; touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    third = scheduler.script("third", "echo third")
    scheduler.wait_for_file(f"{W}/up")
    assert scheduler.cli("logs").stdout == "second\n"
    waits = scheduler.cli("logs", str(third), check=False)
    assert waits.stderr == f"lfsvc: Job {third} has no output: it waits.\nhint: lfsvc show {third}\n"
    scheduler.cli("kill", str(third))
    scheduler.machine.run(["touch", f"{W}/go"])
    scheduler.wait(second)
    assert scheduler.cli("logs").stdout == "second\n", "the newest never ran"


def test_follow_of_a_waiting_job_says_that_it_waits(scheduler: Scheduler) -> None:
    first = scheduler.script("first", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    second = scheduler.script("second", "echo second")
    follow = scheduler.machine.popen(["lfsvc", "logs", "-f", str(second)], env=scheduler.env)
    assert follow.stdout is not None
    assert follow.stdout.readline() == f"lfsvc: job {second} waits; its output follows when it runs\n"
    scheduler.machine.run(["touch", f"{W}/go"])
    assert follow.communicate(timeout=30)[0] == "second\n"
    assert scheduler.job(first)["state"] == "succeeded"


def test_a_reader_that_has_enough_ends_the_following(scheduler: Scheduler) -> None:
    job = scheduler.script("long", f"echo one; touch {W}/up; sleep 98753")
    scheduler.wait_for_file(f"{W}/up")
    # bash waits for both sides; the job prints nothing more that would meet the broken pipe.
    assert scheduler.machine.sh(f"lfsvc logs -f {job} | head -n 1") == "one\n"
    scheduler.cli("kill")
    scheduler.wait(job)


def test_the_journal_has_the_job_and_no_other(scheduler: Scheduler) -> None:
    job = train(scheduler, "STANDIN_LINES=5")
    other = scheduler.script("other", "echo of another")
    scheduler.wait(other)
    wait_until(
        lambda: f"Job {job} succeeded" in scheduler.cli("logs", "--journal", str(job)).stdout, "not in the journal"
    )
    shown = scheduler.cli("logs", "--journal", str(job)).stdout
    assert "stand-in train" in shown and "stand-in export" in shown and "of another" not in shown
    merge = scheduler.cli("logs", "--journal", "--step", "merge", str(job)).stdout
    assert "stand-in export" in merge and "stand-in train" not in merge
    # Beside what journalctl itself says in its first line.
    last = scheduler.cli("logs", "--journal", "-n", "1", str(job)).stdout.splitlines()
    assert [f"Job {job} succeeded" in line for line in last if not line.startswith("--")] == [True]


def test_without_journalctl_there_is_a_sentence(scheduler: Scheduler) -> None:
    scheduler.wait(scheduler.script("one", "echo one"))
    done = scheduler.machine.run(["/opt/lfsvc/bin/lfsvc", "logs", "--journal"], env={"PATH": "/none"}, check=False)
    assert (done.returncode, done.stderr) == (
        1, "lfsvc: journalctl cannot be run: No such file or directory.\nhint: without --journal, the log files\n",
    )  # fmt: skip


def test_follow_and_wait_exit_as_the_job_does(scheduler: Scheduler) -> None:
    path = scheduler.machine.write(f"{W}/seven.sh", "echo out; echo err >&2; exit 7")
    follow = scheduler.cli("submit", "--follow", path, check=False)
    assert (follow.returncode, follow.stdout) == (7, f"job 1 queued (0 ahead): shell {path}\nout\nerr\n")
    wait = scheduler.cli("submit", "--wait", path, check=False)
    assert (wait.returncode, wait.stdout) == (7, f"job 2 queued (0 ahead): shell {path}\n")
    assert wait.stderr.startswith("lfsvc: job 2 failed: ")
    ended = scheduler.cli("wait", "--json", "1", "2", check=False)
    assert ended.returncode == 7
    assert [(job["id"], job["state"], job["exit_status"]) for job in json.loads(ended.stdout)] == [
        (1, "failed", 7), (2, "failed", 7),
    ]  # fmt: skip
    assert scheduler.cli("wait", "--all", "--json").stdout == "[]\n"


@pytest.mark.parametrize("option", ["--follow", "--wait"])
def test_ctrl_c_leaves_the_job_running_and_says_so(scheduler: Scheduler, option: str) -> None:
    path = scheduler.machine.write(f"{W}/long.sh", f"touch {W}/up; while [ ! -e {W}/go ]; do sleep 0.1; done")
    submit = scheduler.machine.popen(["lfsvc", "submit", option, path], env=scheduler.env)
    scheduler.wait_for_file(f"{W}/up")
    scheduler.machine.sh("pkill -INT -f '[l]fsvc submit'")
    printed = submit.communicate(timeout=20)[0]
    assert submit.returncode == 130
    assert "lfsvc: job 1 goes on; lfsvc kill 1 ends it" in printed and "Traceback" not in printed
    assert scheduler.job(1)["state"] == "running"
    scheduler.machine.run(["touch", f"{W}/go"])
    assert scheduler.wait(1)["state"] == "succeeded"


def test_list_since_and_a_wrong_one(scheduler: Scheduler) -> None:
    scheduler.wait(scheduler.script("one", "true"))
    assert scheduler.cli("list", "--since", "1h").stdout.startswith("1  succeeded  shell  one.sh")
    assert scheduler.cli("list", "--since", "2999-01-01").stdout == ""
    wrong = scheduler.cli("list", "--since", "soon", check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("lfsvc: --since 'soon' is no time.\nhint: give ")


def test_show_tells_the_command_lines_and_the_names_of_the_environment(scheduler: Scheduler) -> None:
    job = train(scheduler, "STANDIN_LINES=2", "SECRET=hunter2")
    ended = scheduler.wait(job)
    shown = scheduler.cli("show", str(job)).stdout
    stamp = ended["steps"][0]["log"].rpartition("_train_")[2].removesuffix(".log")
    assert f"command  llamafactory-cli train {W}/saves/x/x_{stamp}.yaml\n" in shown
    merge = ended["steps"][1]["log"].removesuffix(".log")
    assert f"command  llamafactory-cli export {merge}.yaml\n" in shown
    assert scheduler.machine.run(["test", "-e", f"{merge}.yaml"]).returncode == 0
    assert "SECRET" in shown and "FORCE_TORCHRUN" in shown and "hunter2" not in shown
    # Of a folder that cannot be read nothing is told; all else is.
    scheduler.machine.sh(f"rm -r ~/.local/state/lfsvc/jobs/{job}")
    without = scheduler.cli("show", str(job)).stdout
    assert "command" not in without and "environment" not in without and "step merge  succeeded in" in without
