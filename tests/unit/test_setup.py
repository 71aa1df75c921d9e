"""What `lfsvc setup` decides: the jobs' environment, the unit's command, whose bus and systemd."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lfsvc.client import session, setup
from lfsvc.errors import LfsvcError


def program(folder: Path) -> str:
    """A folder with a llamafactory-cli."""
    folder.mkdir(parents=True)
    path = folder / "llamafactory-cli"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(folder)


def test_the_shells_llamafactory_wins_over_the_one_beside_lfsvc(tmp_path: Path) -> None:
    # conda: lfsvc and llamafactory-cli in one prefix, and another environment is active.
    beside, active = program(tmp_path / "envs/base/bin"), program(tmp_path / "envs/lf/bin")
    shell = {"PATH": f"{active}:/usr/bin", "CONDA_PREFIX": str(tmp_path / "envs/lf"), "PS1": "$", "SSH_TTY": "/dev/x"}
    plan = setup.plan(shell, None, beside)
    assert plan.program == f"{active}/llamafactory-cli"
    assert plan.variables == {"PATH": shell["PATH"], "CONDA_PREFIX": shell["CONDA_PREFIX"]}
    assert plan.notes == ()


def test_an_environment_that_is_not_activated_is_found_beside_the_interpreter(tmp_path: Path) -> None:
    beside = program(tmp_path / "envs/lf/bin")
    plan = setup.plan({"PATH": "/nowhere"}, None, beside)
    assert plan.program == f"{beside}/llamafactory-cli"
    assert plan.variables == {"PATH": f"{beside}:/nowhere"}
    assert beside in plan.notes[0]


def test_an_upgrade_from_a_shell_without_llamafactory_leaves_the_jobs_theirs(tmp_path: Path) -> None:
    theirs = program(tmp_path / "lf/bin")
    plan = setup.plan({"PATH": "/usr/local/bin"}, {"PATH": theirs}, "/nowhere")
    assert plan.variables is None
    assert plan.program == f"{theirs}/llamafactory-cli"
    assert plan.notes == ("this shell has no llamafactory-cli, so the environment of the jobs stays as it is",)


def test_an_environment_that_is_not_activated_takes_over_but_from_itself(tmp_path: Path) -> None:
    beside, theirs = program(tmp_path / "new/bin"), program(tmp_path / "lf/bin")
    assert setup.plan({"PATH": "/nowhere"}, {"PATH": theirs}, beside).program == f"{beside}/llamafactory-cli"
    # What it exports when it is activated is in the present file, and not in this shell.
    assert setup.plan({"PATH": "/nowhere"}, {"PATH": beside}, beside).variables is None


def test_no_llamafactory_at_all_is_said_with_what_to_do() -> None:
    plan = setup.plan({"PATH": "/nowhere"}, {"PATH": "/gone"}, "/nowhere")
    assert plan.program == "" and plan.variables == {"PATH": "/nowhere"}
    assert "activate the environment that has it and run this again" in plan.notes[0]


def test_the_unit_runs_this_interpreter_apart_from_the_users_variables() -> None:
    (line,) = [line for line in setup.unit_text().splitlines() if line.startswith("ExecStart=")]
    assert line == f"ExecStart={sys.executable} -I -X utf8 -m lfsvc serve"


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("/my envs/bin/python", '"/my envs/bin/python"'),
        ("/50%/$x", '"/50%%/$$x"'),
        ("/ä/python", '"/ä/python"'),
    ],
)
def test_a_path_is_quoted_as_systemd_reads_it(word: str, written: str) -> None:
    assert setup.quoted(word) == written


# -- su, sudo and cron -------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir()
    (folder / "bus").touch()
    return folder


def test_without_a_session_the_users_own_folder_and_bus_are_taken(runtime: Path) -> None:
    assert session.session_environment({}, str(runtime)) == {
        "XDG_RUNTIME_DIR": str(runtime),
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
    }


def test_a_session_that_is_right_is_left_alone(runtime: Path, tmp_path: Path) -> None:
    right = {
        "XDG_RUNTIME_DIR": str(runtime),
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus,guid=0123456789abcdef",
    }
    assert session.session_environment(right, str(tmp_path)) == {}
    # Not a file: nothing can be told of it.
    abstract = {**right, "DBUS_SESSION_BUS_ADDRESS": "unix:abstract=/tmp/dbus-x"}
    assert session.session_environment(abstract, str(tmp_path)) == {}


def test_without_any_runtime_folder_nothing_is_invented(tmp_path: Path) -> None:
    assert session.session_environment({}, str(tmp_path / "none")) == {}


# -- writing -----------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(LfsvcError) as caught:
        setup.write(setup.plan({"PATH": "/nowhere"}, None, "/nowhere"))
    unit = tmp_path / "config/systemd/user/lfsched.service"
    assert str(caught.value) == f"{unit} cannot be written: Not a directory."
    assert caught.value.hint


def test_what_a_user_has_set_is_kept_and_the_file_of_before_lies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    setup.write(setup.plan({"PATH": "/one"}, None, "/nowhere"))
    path = tmp_path / "config/lfsvc/environment"
    path.write_text(path.read_text() + 'MINE="1"\n')
    assert setup.write(setup.plan({"PATH": "/two"}, None, "/nowhere")) == ["MINE"]
    assert 'MINE="1"\n' in path.read_text()
    assert setup.write(setup.plan({"PATH": "/two"}, None, "/nowhere")) == ["MINE"]
    assert 'MINE="1"' in (tmp_path / "config/lfsvc/environment.old").read_text()
    assert path.read_text().endswith('\nPATH="/two"\n')
    assert {p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {0o600}
