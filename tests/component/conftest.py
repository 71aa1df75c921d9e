"""Fixtures of the component tests: real SQLite, real runner, no systemd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lfsvc.runner

LAUNCH = os.path.join(os.path.dirname(lfsvc.runner.__file__), "launch.py")

RunnerStart = Callable[..., "RunnerCase"]


class RunnerCase:
    """A job folder with a spec, and the runner on it."""

    def __init__(self, folder: Path, script: str, launch: str = LAUNCH, **changes: Any) -> None:
        self.folder = folder
        folder.mkdir()
        source = folder / "source.sh"
        source.write_text(script)
        (folder / "snapshot.sh").write_text(script)
        spec = {
            "format": 1, "job_id": 1, "attempt": 1, "name": "", "command": "shell", "task": str(source),
            "llamafactory_command": "", "source": str(source), "snapshot": str(folder / "snapshot.sh"),
            "working_directory": str(folder), "output_dir": "", "umask": 0o022,
            "environment": {"PATH": os.environ["PATH"], "LFSVC_JOB_ID": "1"}, "grace_seconds": 1.0,
            "nudge": str(folder / "nudge"), "journal": {"lines": 8000, "seconds": 30, "spent": []}, **changes,
        }  # fmt: skip
        (folder / "spec.json").write_text(json.dumps(spec))
        self.process = subprocess.Popen(
            [sys.executable, "-X", "utf8", "-I", "-S", launch, str(folder)], start_new_session=True
        )

    def result(self, timeout: float = 20) -> dict[str, Any]:
        """Wait for the runner; give what it wrote."""
        self.process.wait(timeout)
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return found

    def log(self) -> str:
        """The output of the job."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def run_script(tmp_path: Path) -> RunnerStart:
    """Start the real runner on a script."""
    return lambda script, **changes: RunnerCase(tmp_path / "job", script, **changes)
