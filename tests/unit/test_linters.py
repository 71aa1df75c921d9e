"""The linters are tests: what they find fails the run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent

# Each room and those it may import (DESIGN: imports point downwards).
SHARED = {
    "job", "task", "errors", "config", "llamafactory", "delivery", "documents", "environment_file", "files", "follow",
    "journal", "notify", "paths", "processes", "wording",
}  # fmt: skip
ALLOWED = {
    "client": SHARED | {"client"},
    "service": SHARED | {"service", "runner.__path__"},
    "runner": SHARED | {"runner"},
    "llamafactory": {"llamafactory", "errors", "config", "files"},
}


def check(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    check(str(BIN / "ruff"), "check", "--no-cache", ".")


def test_ruff_would_format_nothing() -> None:
    check(str(BIN / "ruff"), "format", "--check", "--no-cache", ".")


def test_mypy_is_content() -> None:
    check(str(BIN / "mypy"), "--cache-dir", os.devnull, "lfsvc")


def test_shellcheck_finds_nothing() -> None:
    scripts = ["tests/run.sh", ".ci/run", "packaging/demo.sh", *map(str, (ROOT / "tests/support").glob("*.sh"))]
    check("shellcheck", "-x", *scripts)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_downwards(room: str) -> None:
    for path in (ROOT / "lfsvc" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                module = node.module or ""
                names = [f"lfsvc.{alias.name}" for alias in node.names] if module == "lfsvc" else [module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("lfsvc."):
                    target = name.split(".")[1]
                    # The service only asks where the runner's program lies.
                    fine = target in ALLOWED[room] or (name == "lfsvc.runner" and path.name == "base.py")
                    assert fine, f"{path} imports {name}"


def test_silenced_checks_have_a_reason() -> None:
    for path in [*(ROOT / "lfsvc").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if "# noqa" in line or "# type: ignore" in line:
                if path.name == "test_linters.py":
                    continue
                tail = line.split("# noqa", 1)[-1].split("# type: ignore", 1)[-1]
                assert " - " in tail or "  # " in tail, f"{path}:{number}: no reason"
