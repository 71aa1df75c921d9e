"""The stand-in for llamafactory-cli and the real one leave the same files, lines and statuses."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parent.parent / "support"
NUMBERS = (int, float)


class Cli:
    """One of the two, in a folder with the tiny model and its data."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self.folder = folder

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{os.path.dirname(self._program)}:/usr/bin:/bin", "HOME": str(self.folder), "HF_HUB_OFFLINE": "1",
            "FORCE_TORCHRUN": "0", "PYTHONUTF8": "1", **(env or {}),
        }  # fmt: skip
        return subprocess.run(
            [self._program, *arguments], cwd=self.folder, env=environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def write(self, name: str, **settings: object) -> str:
        path = self.folder / name
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
        return str(path)

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())


@pytest.fixture(params=["stand-in", "real"])
def cli(request: pytest.FixtureRequest, tmp_path: Path) -> Cli:
    real = os.environ.get("LFSVC_LLAMAFACTORY", "")
    if not real:
        if os.environ.get("LFSVC_REQUIRE_INTEGRATION"):
            pytest.fail("LFSVC_LLAMAFACTORY is not set: run ./tests/run.sh")
        pytest.skip("LFSVC_LLAMAFACTORY is not set: run ./tests/run.sh")
    subprocess.run(
        [f"{real}/bin/python", str(SUPPORT / "tiny_model.py"), str(tmp_path)], check=True, capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    return Cli(
        str(SUPPORT / "llamafactory-cli") if request.param == "stand-in" else f"{real}/bin/llamafactory-cli", tmp_path
    )


def test_training_merge_and_evaluation_leave_the_same(cli: Cli) -> None:
    trained = cli.run("train", "train.yaml", "num_train_epochs=1.0")
    assert trained.returncode == 0, trained.stdout[-2000:]
    out = cli.folder / "saves" / "sums"
    present = {path.name for path in out.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "train_results.json", "all_results.json",
        "trainer_state.json", "trainer_log.jsonl",
    } <= present  # fmt: skip
    assert cli.json("saves/sums/adapter_config.json")["peft_type"] == "LORA"
    results = cli.json("saves/sums/train_results.json")
    assert isinstance(results["train_loss"], NUMBERS) and isinstance(results["epoch"], float)
    # As the trainer prints them.
    assert "'loss': " in trained.stdout and "'epoch': " in trained.stdout
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    for key, kind in [("current_steps", int), ("total_steps", int), ("loss", float), ("lr", float), ("epoch", float),
                      ("percentage", NUMBERS), ("elapsed_time", str), ("remaining_time", str)]:  # fmt: skip
        assert isinstance(lines[0][key], kind), key
    assert lines[-1]["current_steps"] == lines[-1]["total_steps"]

    export = cli.write(
        "export.yaml", model_name_or_path=f"{cli.folder}/model", adapter_name_or_path=str(out), template="default",
        finetuning_type="lora", export_dir=f"{cli.folder}/merged", export_device="cpu", export_legacy_format=False,
    )  # fmt: skip
    merged = cli.run("export", export)
    assert merged.returncode == 0, merged.stdout[-2000:]
    assert {"model.safetensors", "config.json"} <= set(os.listdir(cli.folder / "merged"))

    evaluation = cli.write(
        "eval.yaml", model_name_or_path=f"{cli.folder}/merged", stage="sft", finetuning_type="full", do_train=False,
        do_eval=True, dataset="sums", dataset_dir=f"{cli.folder}/data", val_size=0.1, template="default",
        compute_accuracy=True, output_dir="evaluated", report_to="none",
    )  # fmt: skip
    evaluated = cli.run("train", evaluation)
    assert evaluated.returncode == 0, evaluated.stdout[-2000:]
    for name in ("eval_results.json", "all_results.json"):
        found = cli.json(f"evaluated/{name}")
        assert isinstance(found["eval_loss"], float) and isinstance(found["eval_accuracy"], float)
    assert not (cli.folder / "evaluated" / "train_results.json").exists()


def test_a_failure_ends_with_its_exception_and_status_one(cli: Cli) -> None:
    broken = cli.write("broken.yaml", model_name_or_path="/nowhere", do_train=True, output_dir="out", stage="sft",
                       dataset="nothing", dataset_dir=f"{cli.folder}/data", template="default")  # fmt: skip
    failed = cli.run("train", broken, env={"STANDIN_EXIT": "1"})
    assert failed.returncode == 1
    assert "Traceback (most recent call last):\n" in failed.stdout
    last = failed.stdout.rstrip().splitlines()[-1]
    assert last.partition(":")[0].endswith("Error"), last


def test_an_unknown_command_and_the_version(cli: Cli) -> None:
    assert "Unknown command: nonsense." in cli.run("nonsense").stdout
    assert "0.9.3" in cli.run("version").stdout
