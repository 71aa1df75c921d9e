"""What a distribution package brings beside the code is the same set, and the same words, as the code has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfsvc.client import cli
from lfsvc.client.completion import SHELLS, script
from lfsvc.errors import LfsvcError
from lfsvc.service.events import MESSAGE_IDS

ROOT = Path(__file__).parent.parent.parent
CATALOG = ROOT / "packaging/systemd/lfsvc.catalog"


def run(*command: str, env: dict[str, str] | None = None, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **(env or {})}, input=text, capture_output=True, text=True, check=False
    )


def page(**env: str) -> str:
    done = run(sys.executable, "-W", "error", str(ROOT / "packaging/man.py"), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- the catalog ---------------------------------------------------------------------------------------


def test_catalog_events_and_readme_know_the_same_messages() -> None:
    readme = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| ([a-z ]+) \| `([0-9a-f]{32})` \|$", readme, re.M))
    assert {name.replace(" ", "_"): number for name, number in table.items()} == MESSAGE_IDS
    assert re.findall(r"^-- (.*)$", CATALOG.read_text(), re.M) == list(MESSAGE_IDS.values())


def test_each_entry_of_the_catalog_names_the_job_and_says_what_to_do() -> None:
    for entry in re.split(r"^-- ", CATALOG.read_text(), flags=re.M)[1:]:
        header, _, text = entry.partition("\n\n")
        assert re.search(r"^Subject: Job @JOB_ID@ ", header, re.M), entry
        assert "Documentation: man:lfsvc(1)" in header, entry
        assert "@JOB_TASK@" in text, entry
        # Entries without a field would show its name.
        assert set(re.findall(r"@(\w+)@", entry)) <= {"JOB_ID", "JOB_TASK", "JOB_COMMAND", "JOB_STATE"}, entry
        for command in re.findall(r'"lfsvc\s+(\w+)', text):
            assert command in cli.COMMANDS, entry


def test_systemd_accepts_the_catalog(tmp_path: Path) -> None:
    if shutil.which("journalctl") is None:
        pytest.skip("journalctl is not installed")
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(CATALOG, folder)
    # It exits with 0 whatever the catalog is.
    updated = run("journalctl", f"--root={tmp_path}", "--update-catalog")
    assert (updated.returncode, updated.stderr) == (0, "")
    database = (tmp_path / "var/lib/systemd/catalog/database").read_bytes()
    for number in MESSAGE_IDS.values():
        assert bytes.fromhex(number) in database


# -- the manual page -----------------------------------------------------------------------------------


def test_the_page_has_every_command_and_option_of_the_command_line() -> None:
    text = page().replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
    for command in cli.COMMANDS:
        assert re.search(rf"^lfsvc {command}\b", text, re.M)
        for action in cli.make_parser(command)._subparsers._group_actions[0].choices[command]._actions:  # type: ignore[union-attr,index]  # argparse has no other way in
            for option in action.option_strings:
                assert option in text or option in ("-h", "--help")


def test_the_page_is_sound_roff() -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    done = run("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", "-", text=page())
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_can_be_made_again_to_the_byte() -> None:
    first = page(SOURCE_DATE_EPOCH="86400", TZ="Pacific/Kiritimati", COLUMNS="40")
    assert first == page(SOURCE_DATE_EPOCH="86400", TZ="UTC", LC_ALL="C", COLUMNS="200")
    assert '"1970-01-02"' in first


def test_text_is_printed_letter_for_letter() -> None:
    code = "import sys; sys.path.insert(0, 'packaging'); import man; print(man.block(sys.argv[1]))"
    text = ".B it's\n'quoted'\n\\fBback\\-slash ~^` -x --yes"
    roff = subprocess.run(
        [sys.executable, "-c", code, text], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    rendered = run("man", "-E", "UTF-8", "-l", "-", text=f".TH X 1\n.SH Y\n{roff}", env={"MANWIDTH": "90"}).stdout
    assert "\n".join(line.strip() for line in text.splitlines()) in re.sub(r"^ +", "", rendered, flags=re.M)


def test_every_example_of_the_page_is_a_command_line() -> None:
    examples = page().replace("\\-", "-").split(".SH EXAMPLES")[1].split(".SH SEE")[0]
    found = [line for line in examples.splitlines() if line.startswith("lfsvc ")]
    assert found
    for line in found:
        words = shlex.split(line.partition(" && ")[0])[1:]
        assert cli.make_parser(words[0]).parse_args(words).command == words[0]


# -- completions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_has_every_command_and_is_sound(shell: str) -> None:
    pytest.importorskip("shtab")
    text = script(shell)
    for command in cli.COMMANDS:
        assert command in text
    if shutil.which(shell):
        done = run(shell, "-n", "-", text=text)
        assert (done.returncode, done.stderr) == (0, "")


def test_without_shtab_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(LfsvcError, match="shtab, which is not installed") as caught:
        script("bash")
    assert "lfsvc[completion]" in caught.value.text


# -- the package ---------------------------------------------------------------------------------------


def test_scripts_of_the_package_pass_the_linter() -> None:
    scripts = [
        ROOT / "packaging/build-deb.sh",
        *(ROOT / "packaging/debian" / n for n in ("postinst", "prerm", "postrm")),
    ]
    done = run("shellcheck", "-x", *map(str, scripts))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_the_package_installs_is_there() -> None:
    for line in (ROOT / "packaging/debian/install").read_text().splitlines():
        source = line.split()[0]
        # What is made by the build.
        if not source.startswith("debian/generated/"):
            assert (ROOT / source).is_file(), source
