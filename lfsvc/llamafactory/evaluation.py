"""The evaluation of a training: whether one follows, and its YAML.

Pure but for reading a deepspeed config. Two sources: a template of the user's, which makes runs
comparable, or, without one, the training's own YAML.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lfsvc.errors import InvalidConfig
from lfsvc.llamafactory.installation import evaluates
from lfsvc.llamafactory.merge import MARKER, adapters_of, finetuning_type
from lfsvc.llamafactory.settings import is_zero3, number, resolve_folder

# Carried into the evaluation of a training when present. All of the optimiser and of saving stays behind.
CARRIED_KEYS = (
    "stage", "template", "trust_remote_code", "dataset_dir", "media_dir", "eval_dataset", "eval_on_each_dataset",
    "cutoff_len", "max_samples", "packing", "neat_packing", "train_on_prompt", "mask_history",
    "ignore_pad_token_for_loss", "preprocessing_num_workers", "dataloader_num_workers", "bf16", "fp16", "flash_attn",
    "rope_scaling", "resize_vocab", "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels",
    "enable_thinking", "default_system", "tool_format", "per_device_eval_batch_size", "ddp_timeout", "seed",
    "ref_model", "ref_model_adapters", "ref_model_quantization_bit", "pref_beta", "pref_ftx", "pref_loss",
    "pref_bco_weight", "simpo_gamma", "dpo_label_smoothing", "kto_chosen_weight", "kto_rejected_weight", "ld_alpha",
    "cache_dir", "use_fast_tokenizer",
)  # fmt: skip

# Without an eval_dataset the same part of the training's data is held back by these.
# preprocessing_batch_size: packed blocks are made batch by batch, before the split.
SPLIT_KEYS = ("dataset", "val_size", "mix_strategy", "interleave_probs", "preprocessing_batch_size")

# Of the base model; a merged one has its own.
BASE_KEYS = (
    "model_revision", "add_tokens", "add_special_tokens", "new_special_tokens_config", "quantization_bit",
    "quantization_method", "quantization_type", "double_quantization",
)  # fmt: skip

HEADER = b"# lfsvc: "

TWO_WAYS = (
    "give the YAML an eval_dataset or a val_size, or set evaluation.template in config.yaml; #no_eval says that none "
    "is wanted"
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is evaluated: a folder of its own, or a base with adapters."""

    path: str
    adapters: tuple[str, ...] = ()
    finetuning_type: str = "full"
    base: str = ""
    below: tuple[str, ...] = ()
    """What the training started from: a base, and adapters below the new one."""

    @property
    def name(self) -> str:
        """How the results call it."""
        return self.adapters[-1] if self.adapters else self.path


def model_of(values: Mapping[str, Any], output_dir: str, *, merged: str, working_directory: str) -> Model:
    """The model that a training has made.

    Args:
        values: the training's YAML.
        output_dir: absolute.
        merged: the merged model's folder; "" where none was made.
        working_directory: where relative paths of the YAML start.

    Raises:
        InvalidConfig: nothing was merged, and the adapter cannot be named.
    """
    base = str(values.get("model_name_or_path") or "")
    kind = finetuning_type(values)
    if kind in ("full", "freeze"):
        return Model(path=output_dir, base=base)
    adapters, problem = adapters_of(values, output_dir, working_directory)
    below = tuple(adapters[:-1])
    if merged:
        return Model(path=merged, base=base, below=below)
    if problem:
        raise InvalidConfig(f"the adapter was not merged and cannot be loaded: {problem}")
    return Model(path=base, adapters=tuple(adapters), finetuning_type=kind, base=base, below=below)


def none_because(values: Mapping[str, Any], *, has_template: bool) -> str:
    """Why no evaluation can follow a training; "" where one does."""
    if values.get("stage") == "ppo":
        return "LLaMA-Factory has no evaluation for stage ppo"
    if has_template or values.get("eval_dataset"):
        return ""
    size = number(values.get("val_size"))
    if size is None and values.get("val_size") is not None:
        return f"val_size {values['val_size']!r} is no number ({TWO_WAYS})"
    if size is None or size <= 1e-6:
        return f"the YAML has neither eval_dataset nor val_size ({TWO_WAYS})"
    if values.get("streaming"):
        return (
            "val_size with streaming holds back other samples each time, so the model would be evaluated on what it "
            f"was trained on ({TWO_WAYS.replace(' or a val_size', '')})"
        )
    return ""


def derive(values: Mapping[str, Any], model: Model, output_dir: str, *, working_directory: str) -> dict[str, Any]:
    """The evaluation of a training on its own data; only where `none_because` says nothing."""
    config = _model_keys(values, model)
    config.update({key: values[key] for key in CARRIED_KEYS if values.get(key) is not None})
    if not values.get("eval_dataset"):
        config.pop("eval_dataset", None)
        config.update({key: values[key] for key in SPLIT_KEYS if values.get(key) is not None})
        # As text (`1e-1`, read by the older YAML) it would be refused.
        config["val_size"] = number(values["val_size"])
    batch = values.get("per_device_train_batch_size")
    if "per_device_eval_batch_size" not in config and isinstance(batch, int):
        # The default, 8, may not fit where the training did.
        config["per_device_eval_batch_size"] = batch
    if config.get("stage", "sft") == "sft":
        config["compute_accuracy"] = True
    if config.get("stage") in ("dpo", "kto") and "ref_model" not in config and model.base:
        config.update(_reference(values, model))
    deepspeed = values.get("deepspeed")
    if isinstance(deepspeed, str) and is_zero3(os.path.join(working_directory, deepspeed)):
        config["deepspeed"] = deepspeed
    config.update(do_train=False, do_eval=True, output_dir=output_dir, overwrite_output_dir=True, report_to="none")
    return config


def _reference(values: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """What a preference training was compared with: its base, with the adapters that it started from.

    Without one LLaMA-Factory compares the model with itself, and the loss says nothing (tried: always ln 2).
    """
    reference: dict[str, Any] = {"ref_model": model.base}
    if model.below:
        reference["ref_model_adapters"] = ",".join(model.below)
    if model.adapters and values.get("quantization_bit") is not None:
        reference["ref_model_quantization_bit"] = values["quantization_bit"]
    return reference


def fill_in(
    template: Mapping[str, Any], values: Mapping[str, Any], model: Model, output_dir: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a template of the user's gets for one training: keys to set, and keys to take out."""
    changes = _model_keys(values, model)
    if template.get("quantization_bit") is not None:
        # LLaMA-Factory quantises for this type alone, also where there is no adapter.
        changes["finetuning_type"] = "lora"
    for key in (*BASE_KEYS, "trust_remote_code", "template"):
        # What the template says of these, it says on purpose.
        if key in template:
            changes.pop(key, None)
        elif key in ("trust_remote_code", "template") and values.get(key) is not None:
            changes[key] = values[key]
    # Not `output_dir`: `llamafactory-cli eval` refuses it as an unknown key.
    changes["save_dir" if "task" in template else "output_dir"] = output_dir
    removed = tuple(key for key in ("adapter_name_or_path", "adapter_folder") if key not in changes and key in template)
    return changes, removed


def _model_keys(values: Mapping[str, Any], model: Model) -> dict[str, Any]:
    config: dict[str, Any] = {"model_name_or_path": model.path, "finetuning_type": model.finetuning_type}
    if model.adapters:
        config["adapter_name_or_path"] = ",".join(model.adapters)
        config.update({key: values[key] for key in BASE_KEYS if values.get(key) is not None})
    return config


def kind_of(values: Mapping[str, Any]) -> str:
    """What an evaluation YAML does: `benchmark`, `predict` or `eval`; "" where it does none of them."""
    if "task" in values:
        return "benchmark"
    if values.get("do_predict"):
        return "predict"
    return "eval" if evaluates(values) else ""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The row of an evaluation in the results: its run, what it did, and which model it was about."""

    run: str
    mode: str
    type: str
    model: str
    path: str


def header(description: Description) -> bytes:
    """The comment line by which a generated YAML is known again, also when it is submitted by hand."""
    return HEADER + json.dumps(asdict(description)).encode("ascii") + b"\n"


def describe(data: bytes, values: Mapping[str, Any], *, working_directory: str) -> Description | None:
    """Describe an evaluation YAML: by its header, else by what it says; None where it evaluates nothing."""
    kind = kind_of(values)
    folder = values.get("save_dir" if kind == "benchmark" else "output_dir")
    if not kind or not isinstance(folder, str):
        return None
    path = resolve_folder(folder, working_directory)
    for line in data[:4096].split(b"\n"):
        if line.startswith(HEADER):
            try:
                description = Description(**json.loads(line.removeprefix(HEADER)))
            except (ValueError, TypeError):
                break
            # Edited to write elsewhere, it is another run.
            texts = all(isinstance(text, str) for text in asdict(description).values())
            if texts and description.path == path:
                return description
    adapter = values.get("adapter_name_or_path")
    model = str(adapter or values.get("model_name_or_path") or "")
    return Description(
        run=os.path.basename(path), mode=kind, type=_type_of(values, working_directory), model=model, path=path
    )


def _type_of(values: Mapping[str, Any], working_directory: str) -> str:
    if values.get("adapter_name_or_path"):
        return finetuning_type(values)
    folder = os.path.join(working_directory, str(values.get("model_name_or_path") or ""))
    if os.path.isfile(os.path.join(folder, MARKER)):
        return "lora"
    # Without an adapter `lora`, the default, says nothing: it is a model as it was published, or trained whole.
    kind = str(values.get("finetuning_type") or "base")
    return "base" if kind == "lora" else kind
