"""When a merge applies, row by row, and what the export gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfsvc.llamafactory import models
from lfsvc.llamafactory.merge import plan

LORA: dict[str, Any] = {"do_train": True, "model_name_or_path": "org/base", "template": "qwen"}
OUT = "/lab/saves/run"


@pytest.mark.parametrize(
    ("values", "adapters"),
    [
        ({}, OUT),
        ({"finetuning_type": "lora"}, OUT),
        ({"finetuning_type": "oft"}, OUT),
        ({"pissa_init": True, "pissa_convert": True}, f"{OUT}/pissa_converted"),
        ({"adapter_name_or_path": "A, B", "create_new_adapter": True}, f"A,B,{OUT}"),
        ({"adapter_name_or_path": "A,B"}, f"A,{OUT}"),
        ({"adapter_name_or_path": "A"}, OUT),
        # pissa_init has no effect where an adapter is trained on.
        ({"adapter_name_or_path": "A", "pissa_init": True}, OUT),
        ({"stage": "ppo"}, OUT),
    ],
)
def test_the_merge_takes_the_adapters_in_their_order(values: dict[str, Any], adapters: str) -> None:
    planned = plan({**LORA, **values}, OUT)
    assert planned.skip == ""
    assert planned.config["adapter_name_or_path"] == adapters
    assert planned.adapter == adapters.rsplit(",", 1)[-1]
    assert planned.config["model_name_or_path"] == planned.base == "org/base"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"finetuning_type": "full"}, "finetuning_type is full: output_dir is the model already"),
        ({"finetuning_type": "freeze"}, "finetuning_type is freeze: output_dir is the model already"),
        ({"finetuning_type": "own"}, "finetuning_type is own: lfsvc knows no merge for it"),
        ({"pissa_init": True}, "pissa_init changes the base model"),
        ({"pissa_init": True, "create_new_adapter": True, "adapter_name_or_path": "A"}, "pissa_init changes the base"),
        ({"do_train": False, "do_eval": True}, "this YAML only evaluates or predicts"),
        ({"model_name_or_path": None}, "the YAML names no model_name_or_path"),
    ],
)
def test_a_training_without_a_merge_says_why(values: dict[str, Any], reason: str) -> None:
    assert plan({**LORA, **values}, OUT).skip.startswith(reason)


def test_the_export_config_has_allowed_keys_alone() -> None:
    values = {
        **LORA, "quantization_bit": 4, "double_quantization": True, "learning_rate": 1e-4, "hf_hub_token": "secret",
        "trust_remote_code": True, "resize_vocab": True, "rope_scaling": "linear", "use_fast_tokenizer": None,
    }  # fmt: skip
    config = plan(values, OUT, device="auto").config
    assert config == {
        "model_name_or_path": "org/base", "adapter_name_or_path": OUT, "template": "qwen", "trust_remote_code": True,
        "resize_vocab": True, "finetuning_type": "lora", "export_size": 5,
        "export_device": "auto", "export_legacy_format": False,
    }  # fmt: skip


def test_a_reward_model_is_merged_with_its_value_head_and_oft_without_its_type() -> None:
    assert plan({**LORA, "stage": "rm"}, OUT).config["stage"] == "rm"
    assert "stage" not in plan({**LORA, "stage": "dpo"}, OUT).config
    assert "finetuning_type" not in plan({**LORA, "finetuning_type": "oft"}, OUT).config


def test_an_adapter_folder_becomes_part_of_the_path_of_the_adapters_below(tmp_path: Path) -> None:
    (tmp_path / "A" / "sub").mkdir(parents=True)
    values = {**LORA, "adapter_name_or_path": "A", "adapter_folder": "sub", "create_new_adapter": True}
    planned = plan(values, OUT, working_directory=str(tmp_path))
    assert planned.config["adapter_name_or_path"] == f"{tmp_path}/A/sub,{OUT}"
    assert "adapter_folder" not in planned.config
    assert "is not a local folder" in plan(values, OUT, working_directory="/nowhere").skip
    # Continued in output_dir, it is no longer in that folder.
    assert plan({**values, "create_new_adapter": False}, OUT).config["adapter_name_or_path"] == OUT


def test_a_comma_in_a_folder_cannot_be_told_from_two_adapters() -> None:
    assert "comma" in plan(LORA, "/lab/a,b").skip


@pytest.mark.parametrize("name", ["org/model", "org/model-2.5"])
def test_a_model_is_found_in_the_hubs_caches(tmp_path: Path, name: str) -> None:
    environment = {"HOME": str(tmp_path)}
    assert models.local_folder(name, "/", environment) == ""
    folder = tmp_path / ".cache/modelscope/hub/models" / name.replace(".", "___")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert models.local_folder(name, "/", environment) == str(folder)
    hub = tmp_path / "hf"
    revision = hub / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (revision / "config.json").write_text("{}")
    assert models.local_folder(name, "/", {"HF_HOME": str(hub), "HOME": "/nowhere"}) == str(revision)
    assert models.local_folder(name, str(hub), {"HOME": "/nowhere"}, "hub") == str(revision)


def test_a_local_folder_is_the_model_itself(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert models.local_folder("m", str(tmp_path), {}) == str(tmp_path / "m")
    assert models.local_folder("../escape/up/three", str(tmp_path), {}) == ""


def test_weights_are_counted_once(tmp_path: Path) -> None:
    for name, size in [("a.safetensors", 70), ("b.safetensors", 30), ("pytorch_model.bin", 100), ("optimizer.pt", 900),
                       ("consolidated.00.safetensors", 100),
                       ("adapter_model.safetensors", 5), ("tokenizer.json", 7)]:  # fmt: skip
        (tmp_path / name).write_bytes(b"x" * size)
    assert models.weight_bytes(str(tmp_path)) == 100
    assert models.weight_bytes("/nowhere") == 0


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"quantization_config": None}, ""),
        ({"model_type": "llama"}, ""),
        ([], ""),
    ],
)
def test_a_quantised_base_is_known_by_its_config(tmp_path: Path, config: object, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.quantised_as(str(tmp_path)) == method
    assert models.quantised_as("/nowhere") == ""
