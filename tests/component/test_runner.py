"""The runner as a process: spec in, result out."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

import lfsvc
from lfsvc.runner.steps import describe_end

from .conftest import RunnerStart


@pytest.mark.parametrize(
    ("script", "state", "status", "failure"),
    [
        ("exit 0", "succeeded", 0, ""),
        ("exit 3", "failed", 3, "The shell step ended with exit status 3."),
        ("kill -SEGV $$", "failed", 139, "The shell step died of signal 11 (SIGSEGV)."),
        ("kill -KILL $$", "failed", 137, "The shell step died of signal 9 (SIGKILL), which is nearly always"),
    ],
)
def test_the_result_says_how_it_ended(
    run_script: RunnerStart, script: str, state: str, status: int, failure: str
) -> None:
    result = run_script(script).result()
    assert (result["state"], result["exit_status"], result["stopped"]) == (state, status, False)
    assert result["failure"].startswith(failure)
    assert result["steps"][0]["exit_status"] == status


def test_signals_have_their_defaults_and_the_input_is_empty(run_script: RunnerStart) -> None:
    # Python ignores SIGPIPE for itself; a job that inherits that prints errors where it should end.
    case = run_script("cat; yes | head -n 1; echo ${PIPESTATUS[0]}; grep Sig[BI] /proc/self/status | cut -f2")
    assert case.result()["state"] == "succeeded"
    first, broken, blocked, ignored = case.log().split()
    assert (first, broken, int(blocked, 16)) == ("y", "141", 0)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        assert not int(ignored, 16) & 1 << (number - 1), number


def test_a_stop_is_passed_on_and_told(run_script: RunnerStart, tmp_path: Path) -> None:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind(str(tmp_path / "nudge"))
    server.settimeout(20)
    case = run_script("trap 'echo asked; exit 5' TERM; sleep 1000 & wait", nudge=str(tmp_path / "nudge"))
    assert server.recv(64) == b"1"
    # The nudge comes after the start of bash, not after its trap.
    while "State:\tS" not in Path(f"/proc/{case.process.pid}/status").read_text() or not _sleeps(case.process.pid):
        pass
    case.process.send_signal(signal.SIGTERM)
    result = case.result()
    assert (result["state"], result["stopped"], result["exit_status"]) == ("killed", True, 5)
    assert case.log() == "asked\n"
    server.close()


def _sleeps(runner: int) -> bool:
    from lfsvc.processes import descendants

    return any(process.command == "sleep" for process in descendants(runner))


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"working_directory": "/nowhere"}, "The working directory /nowhere cannot be entered: No such file"),
        (
            {"command": "train", "environment": {"PATH": "/nowhere"}},
            "llamafactory-cli is no longer on the PATH of the jobs",
        ),
    ],
)
def test_what_cannot_be_started_is_failed_with_a_sentence(
    run_script: RunnerStart, changes: dict[str, object], failure: str
) -> None:
    result = run_script("true", **changes).result()
    assert (result["state"], result["exit_status"]) == ("failed", -1)
    assert result["failure"].startswith(failure)


def test_a_log_that_the_disk_did_not_take_names_the_disk() -> None:
    sentence = describe_end("train", 1, "", "No space left on device")
    assert "its output could not be written (No space left on device)" in sentence and "Make room" in sentence


def test_a_folder_that_cannot_be_made_fails_the_step(run_script: RunnerStart, tmp_path: Path) -> None:
    program = tmp_path / "llamafactory-cli"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "file").write_text("")
    result = run_script(
        "", command="train", environment={"PATH": str(tmp_path)}, output_dir=str(tmp_path / "file" / "out")
    ).result()
    assert result["failure"] == f"output_dir {tmp_path}/file/out cannot be made: Not a directory."


def test_a_copy_in_a_folder_with_a_blank_is_kept_and_the_snapshot_runs(run_script: RunnerStart, tmp_path: Path) -> None:
    program = tmp_path / "llamafactory-cli"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    snapshot = tmp_path / "snapshot.yaml"
    snapshot.write_text("output_dir: x\n")
    out = tmp_path / "out put"
    result = run_script(
        "", command="train", llamafactory_command="train", source="/a/run.yaml", snapshot=str(snapshot),
        environment={"PATH": f"{tmp_path}:/usr/bin:/bin"}, output_dir=str(out),
    ).result()  # fmt: skip
    assert result["state"] == "succeeded"
    (copy,) = out.glob("run_*.yaml")
    assert copy.read_text() == "output_dir: x\n"
    (log,) = out.glob("llamafactory_train_*.log")
    assert log.read_text() == f"train {snapshot}\n"
    assert log.stat().st_mode & 0o777 == 0o644


def test_a_removal_of_lfsvc_under_a_running_job_costs_it_nothing(tmp_path: Path, run_script: RunnerStart) -> None:
    # A copy of the package, gone when the job has begun: the runner has what it needs, or does without.
    package = tmp_path / "site" / "lfsvc"
    shutil.copytree(os.path.dirname(lfsvc.__file__), package, ignore=shutil.ignore_patterns("__pycache__"))
    case = run_script("sleep 1.3; exit 3", launch=str(package / "runner" / "launch.py"))
    while not list(case.folder.glob("*.log")):
        pass
    shutil.rmtree(package)
    result = case.result()
    assert (result["state"], result["exit_status"]) == ("failed", 3)
    assert result["failure"].startswith("The shell step ended with exit status 3.")
