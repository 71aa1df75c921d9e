"""The help of every command, and its examples: each is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from machine import HOME, Machine, wait_until
from scheduler import Scheduler

from lfsvc.client.cli import COMMANDS, GROUPS

W = f"{HOME}/work"
README = Path(__file__).parent.parent.parent / "README.md"
TRAINING = "model_name_or_path: org/base\nstage: sft\ndo_train: true\ndataset: x\ndataset_dir: ONLINE\nval_size: 0.1\n"

# What has to be there before an example: commands of the shell. The rest runs in a folder with run.yaml and
# prepare.sh, after one training with its evaluation.
BEFORE = {
    "lfsvc kill": "echo 'sleep 100' >long.sh; lfsvc submit long.sh",
    "lfsvc kill 3": "echo 'sleep 100' >long.sh; lfsvc submit long.sh long.sh; lfsvc kill 4",
    "lfsvc notify test": "echo 'notify: [{command: [/bin/true]}]' >~/.config/lfsvc/config.yaml",
    "lfsvc notify test --target 2": (
        "echo 'notify: [{command: [/bin/false]}, {command: [/bin/true]}]' >~/.config/lfsvc/config.yaml"
    ),
    "lfsvc serve --detach": "systemctl --user stop lfsched",
}
EXAMPLES = [(command, example) for command, row in COMMANDS.items() for example in row[3]]


@pytest.mark.parametrize(("command", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_every_example_of_the_help_works(user: Machine, command: str, example: str) -> None:
    scheduler = Scheduler(user, "systemd")
    user.write(f"{W}/run.yaml", f"{TRAINING}output_dir: {W}/saves/run\n")
    user.write(f"{W}/prepare.sh", "true\n")
    scheduler.wait(scheduler.submit(f"{W}/run.yaml"))
    scheduler.wait(2)
    assert example in scheduler.cli(command, "--help").stdout
    before = BEFORE.get(example, "")
    if command == "watch":
        # It needs a terminal, and a key to end it.
        example = f"(sleep 1; printf q) | TERM=xterm script -qec '{example}' /dev/null"
    if "--plot" in example and user.run(["/opt/lfsvc/bin/python", "-c", "import matplotlib"], check=False).returncode:
        done = user.run(["bash", "-c", f"cd {W}; {example}"], env=scheduler.env, check=False)
        assert done.returncode == 1 and "pip install 'lfsvc[plot]'" in done.stderr
        pytest.skip("matplotlib is not installed in the test machine; that it says so was tested")
    if command == "completion" and user.run(["/opt/lfsvc/bin/python", "-c", "import shtab"], check=False).returncode:
        done = user.run(["bash", "-c", f"cd {W}; {example}"], env=scheduler.env, check=False)
        assert done.returncode == 1 and "pip install 'lfsvc[completion]'" in done.stderr
        pytest.skip("shtab is not installed in the test machine; that it says so was tested")
    done = user.run(["bash", "-ec", f"cd {W}; {before}\n{example}"], env=scheduler.env, check=False, timeout=60)
    # doctor finds what a test machine lacks; the last command of `wait` is the job's own status.
    assert done.returncode in ((0, 1) if command == "doctor" else (0,)), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if command == "serve":
        scheduler.cli("stop", check=False)


def test_the_overview_names_every_command_and_fits_one_screen(user: Machine) -> None:
    text = user.run(["lfsvc", "--help"]).stdout
    assert text == user.run(["lfsvc"]).stdout
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for command in COMMANDS:
        assert any(re.search(rf"(^| ){command} ", line) for line in lines), command
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


def test_no_traceback_reaches_a_person_who_did_not_ask_for_one(user: Machine) -> None:
    failing = user.run(["lfsvc", "show", "99"], check=False)
    assert (failing.returncode, failing.stderr) == (1, "lfsvc: No job 99.\nhint: lfsvc list shows the last 100\n")
    asked = user.run(["lfsvc", "show", "99"], env={"LFSVC_DEBUG": "1"}, check=False)
    assert asked.stderr.startswith("Traceback") and asked.stderr.endswith("lfsvc list shows the last 100\n")
    # A fault: the client's own code is what does not hold.
    fault = user.run(
        ["/opt/lfsvc/bin/python", "-c", "from lfsvc.client import cli, show; show.Client = None; cli.run(['status'])"],
        check=False,
    )
    assert fault.stderr.startswith("lfsvc: A fault in lfsvc: AttributeError: ") and "LFSVC_DEBUG=1" in fault.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["show", "#3"], "did you mean 3?"), (["kill", "job12"], "did you mean 12?"), (["wait", "x"], "lfsvc list shows")],
)
def test_a_misspelt_id_gets_a_suggestion(user: Machine, arguments: list[str], hint: str) -> None:
    done = user.run(["lfsvc", *arguments], check=False)
    assert done.returncode == 2 and hint in done.stderr


def test_an_id_beyond_the_last_names_the_last(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    scheduler.wait(scheduler.script("one", "true"))
    assert "hint: the newest is job 1; lfsvc list" in scheduler.cli("show", "11", check=False).stderr


def test_the_readmes_python_drives_the_scheduler(user: Machine) -> None:
    scheduler = Scheduler(user, "systemd")
    user.write(f"{W}/run.sh", "true\n")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = code.replace("/abs/run.sh", f"{W}/run.sh")
    done = user.run(["/opt/lfsvc/bin/python", "-c", code])
    assert done.stdout.startswith("job 1 queued\n")
    wait_until(lambda: scheduler.job(1)["state"] == "succeeded", "not run")
