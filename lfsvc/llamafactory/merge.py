"""When a merge applies to a training, and the config that `llamafactory-cli export` gets for it.

Pure: takes the values of the training's YAML. Source of the rules: tried with LLaMA-Factory 0.9.3 and 0.9.4.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Export takes no training arguments: what is not here is left out. Tokens and passwords never go into a file.
# Nor rope_scaling: without a length export makes it a factor of 2, whatever the training had (tried with 0.9.3).
CARRIED_KEYS = (
    "model_revision", "cache_dir", "template", "trust_remote_code", "use_fast_tokenizer", "resize_vocab", "add_tokens",
    "add_special_tokens", "new_special_tokens_config",
)  # fmt: skip

# Size of one file of the merged model in GB (10^9 bytes).
SHARD_GB = 5

# Types whose result is an adapter.
ADAPTER_TYPES = ("lora", "oft")

# The file by which a merged model is known as one that lfsvc made.
MARKER = "lfsvc_merge.json"

PISSA_FOLDER = "pissa_converted"


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What follows a training: a merge with this config, or none and why.

    `adapter` is the folder in which the training has to write its adapter, "" where it writes none.
    """

    skip: str = ""
    adapter: str = ""
    base: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def plan(values: Mapping[str, Any], output_dir: str, *, device: str = "cpu", working_directory: str = "/") -> MergePlan:
    """Plan the merge of a training.

    Args:
        values: its YAML.
        output_dir: absolute.
        device: export_device, `cpu` or `auto`.
        working_directory: where relative paths of the YAML start.
    """
    if not values.get("do_train"):
        return MergePlan(skip="this YAML only evaluates or predicts, so there is nothing to merge")
    kind = finetuning_type(values)
    if kind not in ADAPTER_TYPES:
        why = "output_dir is the model already" if kind in ("full", "freeze") else "lfsvc knows no merge for it"
        return MergePlan(skip=f"finetuning_type is {kind}: {why}")
    if _starts_pissa(values) and not values.get("pissa_convert"):
        return MergePlan(
            skip="pissa_init changes the base model, so the adapter does not fit the original one; "
            "pissa_convert: true makes an adapter that does"
        )
    base = values.get("model_name_or_path")
    if not isinstance(base, str) or not base:
        return MergePlan(skip="the YAML names no model_name_or_path to merge into")
    adapters, problem = adapters_of(values, output_dir, working_directory)
    if problem:
        return MergePlan(skip=problem)
    config: dict[str, Any] = {"model_name_or_path": base, "adapter_name_or_path": ",".join(adapters)}
    config.update({key: values[key] for key in CARRIED_KEYS if values.get(key) is not None})
    if kind == "lora":
        # `oft` is refused by export, which reads the adapter's own config anyway.
        config["finetuning_type"] = kind
    if values.get("stage") == "rm":
        # The reward model's value head is copied along for this stage alone.
        config["stage"] = "rm"
    config.update(export_size=SHARD_GB, export_device=device, export_legacy_format=False)
    return MergePlan(adapter=adapters[-1], base=base, config=config)


def finetuning_type(values: Mapping[str, Any]) -> str:
    """The finetuning_type of a YAML: `lora` where it names none, as LLaMA-Factory has it."""
    return str(values.get("finetuning_type") or "lora")


def _starts_pissa(values: Mapping[str, Any]) -> bool:
    # An adapter that is trained on is not initialised again.
    return bool(values.get("pissa_init")) and (
        not values.get("adapter_name_or_path") or bool(values.get("create_new_adapter"))
    )


def adapters_of(values: Mapping[str, Any], output_dir: str, working_directory: str) -> tuple[list[str], str]:
    """The adapters of a trained model, the new one last; and why they cannot be named together, or "".

    With create_new_adapter those that were given are merged below a new one; without it the last of
    them is trained on, and continues in output_dir.
    """
    given = values.get("adapter_name_or_path")
    before = [path.strip() for path in given.split(",")] if isinstance(given, str) and given.strip() else []
    if before and not values.get("create_new_adapter"):
        before.pop()
    subfolder = values.get("adapter_folder")
    if before and subfolder:
        # adapter_folder would hold for the new adapter as well, which has no such folder.
        before = [os.path.join(working_directory, path, str(subfolder)) for path in before]
        missing = next((path for path in before if not os.path.isdir(path)), "")
        if missing:
            return [], f"adapter_folder {subfolder} is not a local folder below adapter_name_or_path ({missing})"
    new = (
        os.path.join(output_dir, PISSA_FOLDER) if _starts_pissa(values) and values.get("pissa_convert") else output_dir
    )
    if any("," in path for path in [*before, new]):
        return [], "LLaMA-Factory separates adapters by commas, and a folder of this one has a comma in its name"
    return [*before, new], ""
