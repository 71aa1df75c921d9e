"""What is said about a YAML at submit.

Two folders of the real thing make these tests stricter; without them the tests that need one are skipped.
LFSVC_ORACLE names the python of an environment with LLaMA-Factory 0.9.3: its own parser and data loader must
then refuse and accept exactly what the tables say. LFSVC_EXAMPLES names the folder of LLaMA-Factory's source
package with its example configs (tests/support/example_configs.sh prints it).
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.errors import InvalidConfig
from lfsvc.llamafactory import installation, settings
from lfsvc.llamafactory.checks import Ahead, Finding, findings
from lfsvc.llamafactory.installation import Installation

ORACLE = os.environ.get("LFSVC_ORACLE", "")
EXAMPLES = os.environ.get("LFSVC_EXAMPLES", "")

GOOD = {
    "model_name_or_path": "org/model",
    "stage": "sft",
    "do_train": "true",
    "finetuning_type": "lora",
    "dataset": "sums",
    "dataset_dir": "data",
    "template": "default",
    "output_dir": "out",
    "report_to": "none",
}
LORA_ONLY = {"loraplus_lr_ratio": "8.0", "use_rslora": "yes", "use_dora": "on", "pissa_init": "true"}
EVALUATION = {"do_train": None, "do_eval": "true", "eval_dataset": "sums", "dataset": None}

WRONG_STAGE = "The dataset is not applicable in the current training stage."

# Changes to GOOD · words of our refusal · words of what LLaMA-Factory 0.9.3 says. All tried with the real one.
REFUSED: list[tuple[Mapping[str, str | None], str, str]] = [
    ({"model_name_or_path": None}, "model_name_or_path is missing", "Please provide `model_name_or_path`."),
    ({"dataset": None}, "dataset is missing", "Please specify dataset for training."),
    ({"do_eval": "true"}, "neither eval_dataset nor val_size", "Please specify dataset for evaluation."),
    ({"eval_strategy": "steps"}, "neither eval_dataset nor val_size", "Please specify dataset for evaluation."),
    (
        {**EVALUATION, "do_predict": "true"},
        "do_predict needs predict_with_generate",
        "Please enable `predict_with_generate` to save model predictions.",
    ),
    (
        {"predict_with_generate": "true"},
        "predict_with_generate needs an eval_dataset",
        "Cannot use `predict_with_generate` if `eval_dataset` is None.",
    ),
    (
        {"predict_with_generate": "true", "eval_dataset": "sums", "compute_accuracy": "true"},
        "predict_with_generate does not go with compute_accuracy",
        "Cannot use `predict_with_generate` and `compute_accuracy` together.",
    ),
    (
        {"stage": "pt", "predict_with_generate": "true"},
        "predict_with_generate needs stage sft",
        "`predict_with_generate` cannot be set as True except SFT.",
    ),
    ({"stage": "pt", "neat_packing": "true"}, "neat_packing needs", "`neat_packing` cannot be set as True except SFT."),
    (
        {"stage": "pt", "train_on_prompt": "true"},
        "train_on_prompt needs stage sft",
        "`train_on_prompt` or `mask_history` cannot be set as True except SFT.",
    ),
    (
        {"stage": "pt", "mask_history": "true"},
        "mask_history needs stage sft",
        "`train_on_prompt` or `mask_history` cannot be set as True except SFT.",
    ),
    (
        {"mask_history": "true", "train_on_prompt": "true"},
        "mask_history does not go with train_on_prompt",
        "`mask_history` is incompatible with `train_on_prompt`.",
    ),
    (
        {"dataset": None, "val_size": "0.1"},
        "val_size is given without a dataset",
        "Cannot specify `val_size` if `dataset` is None.",
    ),
    (
        {"eval_dataset": "sums", "val_size": "0.1"},
        "val_size does not go with eval_dataset",
        "Cannot specify `val_size` if `eval_dataset` is not None.",
    ),
    (
        {"streaming": "true", "max_steps": "5", "max_samples": "5"},
        "max_samples does not go with streaming",
        "`max_samples` is incompatible with `streaming`.",
    ),
    ({"streaming": "true"}, "streaming needs max_steps", "Please specify `max_steps` in streaming mode."),
    (
        {"streaming": "true", "max_steps": "5", "val_size": "0.1"},
        "streaming needs a val_size that is a whole number",
        "Streaming mode should have an integer val size.",
    ),
    (
        {"interleave_probs": "0.5,0.5"},
        "interleave_probs needs a mix_strategy",
        "`interleave_probs` is only valid for interleaved mixing.",
    ),
    ({"fp16": "true", "bf16": "true"}, "fp16 does not go with bf16", "At most one of fp16 and bf16 can be True"),
    (
        {"load_best_model_at_end": "true"},
        "needs the same eval_strategy and save_strategy",
        "--load_best_model_at_end requires the save and eval strategy to match",
    ),
    (
        {"dataloader_prefetch_factor": "2"},
        "dataloader_prefetch_factor needs dataloader_num_workers",
        "--dataloader_prefetch_factor can only be set when data is loaded in a different process",
    ),
    (
        {"split_special_tokens": "true"},
        "split_special_tokens needs a slow tokenizer",
        "`split_special_tokens` is only supported for slow tokenizers.",
    ),
    (
        {"infer_backend": "vllm"},
        "infer_backend must be huggingface",
        "vLLM/SGLang backend is only available for API, CLI and Web.",
    ),
    ({"stage": "ppo"}, "stage ppo needs a reward_model", "`reward_model` is necessary for PPO training."),
    (
        {**EVALUATION, "stage": "ppo", "reward_model": "org/r"},
        "stage ppo can only train",
        "PPO training does not support evaluation, use the SFT stage to evaluate models.",
    ),
    (
        {"stage": "ppo", "reward_model": "org/r", "report_to": "swanlab"},
        "stage ppo reports to wandb or tensorboard only",
        "PPO only accepts wandb or tensorboard logger.",
    ),
    (
        {"stage": "rm", "load_best_model_at_end": "true", "eval_strategy": "steps", "val_size": "0.1"},
        "load_best_model_at_end does not go with stage rm or ppo",
        "RM and PPO stages do not support `load_best_model_at_end`.",
    ),
    (
        {"stage": "ppo", "reward_model": "org/r", "finetuning_type": "full"},
        "needs a reward_model_type other than lora",
        "`reward_model_type` cannot be lora for Freeze/Full PPO training.",
    ),
    (
        {"use_galore": "true"},
        "GaLore, APOLLO and BAdam do not go with finetuning_type lora",
        "Cannot use LoRA with GaLore, APOLLO or BAdam together.",
    ),
    (
        {"use_galore": "true", "use_apollo": "true", "finetuning_type": "full"},
        "GaLore, APOLLO and BAdam exclude one another",
        "Cannot use GaLore, APOLLO or BAdam together.",
    ),
    (
        {"use_llama_pro": "true", "finetuning_type": "full"},
        "use_llama_pro does not go with finetuning_type full",
        "`use_llama_pro` is only valid for Freeze or LoRA training.",
    ),
    *(
        (
            {key: value, "finetuning_type": "full"},
            f"{key} needs finetuning_type lora",
            f"`{key}` is only valid for LoRA training.",
        )
        for key, value in LORA_ONLY.items()
    ),
    (
        {"pissa_init": "true", "stage": "dpo"},
        "pissa_init does not go with stage dpo",
        "Cannot use PiSSA for current training stage.",
    ),
    (
        {"pissa_init": "true", "stage": "kto"},
        "pissa_init does not go with stage ppo or kto",
        "Cannot use PiSSA for current training stage.",
    ),
    (
        {"pissa_init": "true", "quantization_bit": "4"},
        "pissa_init does not go with quantization_bit",
        "Please use scripts/pissa_init.py to initialize PiSSA for a quantized model.",
    ),
    (
        {"adapter_name_or_path": "org/a", "finetuning_type": "full"},
        "adapter_name_or_path needs finetuning_type lora",
        "Adapter is only valid for the LoRA method.",
    ),
    ({"adapter_name_or_path": "[a, b]"}, "adapter_name_or_path is a list", "'list' object has no attribute 'split'"),
    (
        {"quantization_bit": "4", "finetuning_type": "full"},
        "quantization_bit needs finetuning_type lora",
        "Quantization is only compatible with the LoRA method.",
    ),
    (
        {"resize_vocab": "true", "quantization_bit": "4"},
        "resize_vocab does not go with quantization_bit",
        "Cannot resize embedding layers of a quantized model.",
    ),
    (
        {"quantization_bit": "4", "quantization_device_map": "auto"},
        "quantization_device_map does not go with a training",
        "Cannot use device map for quantized models in training.",
    ),
    ({"finetuning_type": "LoRA"}, "finetuning_type LoRA is none that", "Invalid fine-tuning method."),
    ({"eval_strategy": "no"}, "eval_strategy is read as false", "False is not a valid IntervalStrategy"),
    ({"save_strategy": "no"}, "save_strategy is read as false", "False is not a valid SaveStrategy"),
    ({"eval_strategy": "null"}, "eval_strategy is read as nothing", "None is not a valid IntervalStrategy"),
    ({"logging_strategy": "off"}, "logging_strategy is read as false", "False is not a valid IntervalStrategy"),
    ({"warmup_ratio": "1e-1"}, "warmup_ratio: 1e-1 is text to", "not supported between instances of 'str' and 'int'"),
    ({"logging_steps": "'5'"}, "logging_steps: 5 is text to", "not supported between instances of 'str' and 'int'"),
    ({"dataset": "summs"}, "data set summs is not in", "Undefined dataset summs in dataset_info.json."),
    ({"dataset": "sums,"}, "data set  is not in", "Undefined dataset  in dataset_info.json."),
    ({"dataset": "[sums, other]"}, "data set other is not in", "Undefined dataset other in dataset_info.json."),
    ({"dataset_dir": "nowhere"}, "dataset_info.json is not there", "Cannot open nowhere/dataset_info.json"),
    ({"dataset_dir": "~/data"}, "dataset_info.json is not there", "Cannot open ~/data/dataset_info.json"),
    ({"dataset_dir": "broken"}, "is not valid JSON", "Cannot open broken/dataset_info.json"),
    ({"dataset": "gone"}, "data set gone has no file at", "not found."),
    ({"dataset": "empty"}, "data set empty has no file at", "list index out of range"),
    ({"stage": "dpo"}, "data set sums has no `ranking: true`", WRONG_STAGE),
    ({"dataset": "pairs"}, "data set pairs is for preferences", WRONG_STAGE),
    ({"output_dir": "finished"}, "holds the final weights", "Output directory already exists and is not empty."),
]  # fmt: skip

# What LLaMA-Factory 0.9.3 takes, unusual as some of it is. All tried with the real one.
ACCEPTED: list[Mapping[str, str | None]] = [
    {},
    EVALUATION,
    {**EVALUATION, "do_eval": None, "do_predict": "true", "predict_with_generate": "true"},
    {**EVALUATION, "do_eval": None, "eval_strategy": "steps", "eval_steps": "5"},
    {**EVALUATION, "output_dir": "finished"},
    {"eval_strategy": "steps", "do_eval": "null"},
    {"val_size": "0.1", "do_eval": "true"},
    {"val_size": "1.0e-7", "eval_dataset": "sums"},
    {"dataset": "sums, folder"},
    {"dataset": "[sums, folder]"},
    {"dataset_dir": "ONLINE", "dataset": "org/data"},
    {"dataset": "anything", "tokenized_path": "tokenized"},
    {"stage": "dpo", "dataset": "pairs"},
    {"stage": "dpo", "dataset": "pairs", "pissa_init": "true", "pref_loss": "simpo"},
    {"output_dir": "finished", "overwrite_output_dir": "true"},
    {"output_dir": "finished", "resume_from_checkpoint": "data"},
    {"output_dir": "stopped"},
    {"output_dir": "logs"},
    {"output_dir": "finished", "stage": "rm", "finetuning_type": "full", "dataset": "pairs"},
    {"save_strategy": "'no'", "eval_strategy": "epoch", "val_size": "0.1"},
    {"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "epoch", "val_size": "0.1"},
    {"infer_backend": "huggingface"},
    {"pissa_init": "true"},
    {"max_samples": "5", "streaming": "false"},
    {"stage": "ppo", "reward_model": "org/r", "report_to": "[wandb]"},
    {"learning_rate": "0.0001", "save_steps": "0.1", "warmup_ratio": "0"},
]


def fake(**changes: object) -> Installation:
    values: dict[str, object] = {
        "root": "/lf",
        "version": "0.9.3",
        "keys": None,
        "benchmark_keys": None,
        "templates": None,
        "benchmarks": True,
        "plain_yaml": True,
        "source": "".join(message for _, _, message in REFUSED) + "`save_dir` already exists",
    }
    return Installation(**{**values, **changes})  # type: ignore[arg-type]  # a few keys of several types


KEYS = {
    **dict.fromkeys([*GOOD, *(key for changes, _, _ in REFUSED for key in changes)], "str"),
    **dict.fromkeys(["deepspeed", "do_eval", "do_predict", "resume_from_checkpoint", "reward_model_type"], "str"),
    "finetuning_type": 'Literal["lora", "freeze", "full"]',
    "lora_alpha": "Optional[int]",
    "max_steps": "int",
    **dict.fromkeys(["learning_rate", "logging_steps", "warmup_ratio"], "float"),
}
KNOWING = fake(source=fake().source + "File {local_path} not found" + installation._TEXT_OF_ADAPTERS, keys=KEYS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with data sets and folders of earlier runs."""
    for name in ("data/empty", "data/folder", "broken", "finished", "stopped/checkpoint-5", "logs", "tokenized"):
        (tmp_path / name).mkdir(parents=True)
    example = [{"instruction": "1+1", "input": "", "output": "2", "chosen": "2", "rejected": "3"}]
    for name in ("data/sums.json", "data/folder/a.json", "tokenized/x"):
        (tmp_path / name).write_text(json.dumps(example))
    (tmp_path / "broken/dataset_info.json").write_text("{,}")
    info: dict[str, object] = {name: {"file_name": f"{name}.json"} for name in ("sums", "gone")}
    info |= {"folder": {"file_name": "folder"}, "empty": {"file_name": "empty"}}
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info["pairs"] = {"file_name": "sums.json", "ranking": True, "columns": columns}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    for name in ("finished", "stopped"):
        (tmp_path / name / "adapter_model.safetensors").write_text("")
    (tmp_path / "logs/llamafactory_train_20250101_000000.log").write_text("")
    (tmp_path / "logs/x_20250101_000000.yaml").write_text("")
    return tmp_path


def lines(changes: Mapping[str, str | None]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in {**GOOD, **changes}.items() if value is not None)


def look(
    text: str,
    folder: Path,
    *,
    evaluation: bool = False,
    environment: dict[str, str] | None = None,
    devices: tuple[int, ...] = (),
    ahead: tuple[Ahead, ...] = (),
    known: Installation | None = KNOWING,
) -> list[Finding]:
    return findings(
        text.encode(),
        settings.read(text.encode(), "/c/x.yaml"),
        path="/c/x.yaml",
        evaluation=evaluation,
        working_directory=str(folder),
        environment=environment or {},
        devices=devices,
        ahead=ahead,
        installation=known,
    )


def refusals(found: list[Finding]) -> list[str]:
    return [f"{finding.sentence} {finding.hint}" for finding in found if finding.refuse]


def warnings(found: list[Finding]) -> list[str]:
    assert not any(finding.hint for finding in found if not finding.refuse)
    return [finding.sentence for finding in found if not finding.refuse]


def test_a_program_whose_source_cannot_be_read_is_not_judged_by_what_llamafactory_refuses(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "adapter_model.safetensors").touch()
    for text in ("output_dir: out\n", "output_dir: out\ndo_train: true\n", "output_dir: o\nlearning_rate: 1e-4\n"):
        found = look(text, folder, known=None)
        assert refusals(found) == [] and any("model_name_or_path is missing" in text for text in warnings(found))
    # What does not depend on it is refused all the same.
    assert refusals(look("output_dir: out\ndo_train: true\n", folder, known=None, evaluation=True))
    assert refusals(look(lines({"dataset": "nowhere"}), folder, known=None))


@pytest.mark.parametrize(("changes", "words", "message"), REFUSED)
def test_what_would_fail_at_once_is_refused(
    changes: Mapping[str, str | None], words: str, message: str, folder: Path
) -> None:
    found = [finding for finding in look(lines(changes), folder) if finding.refuse]
    assert any(words in finding.sentence for finding in found), found
    assert all(finding.sentence.startswith("/c/x.yaml: ") and finding.hint for finding in found)


@pytest.mark.parametrize("changes", ACCEPTED)
def test_what_llamafactory_takes_is_not_refused(changes: Mapping[str, str | None], folder: Path) -> None:
    assert refusals(look(lines(changes), folder)) == []
    assert refusals(look(lines(changes), folder, known=None)) == []


@pytest.mark.parametrize(("changes", "words", "message"), REFUSED)
def test_a_fork_that_dropped_a_check_is_not_held_to_it(
    changes: Mapping[str, str | None], words: str, message: str, folder: Path
) -> None:
    fork = fake(source="nothing of it", plain_yaml=False)
    always = ("is missing", "is read as", "is text to", "do_predict is true")
    assert all(any(word in said for word in always) for said in refusals(look(lines(changes), folder, known=fork)))


def test_whatever_is_uncertain_without_the_installation_is_a_warning(folder: Path) -> None:
    found = look(lines({"val_size": "0.1", "eval_dataset": "sums"}), folder, known=None)
    assert refusals(found) == []
    assert warnings(found) == ["val_size does not go with eval_dataset; remove one of the two"]
    assert look(lines({"finetuning_type": "mine", "foo": "1", "template": "mine"}), folder, known=None) == []


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [
        ("learning_rate", "1e-4", "1.0e-4"),
        ("learning_rate", "5E-5", "5.0e-5"),
        ("learning_rate", "1.5e4", "1.5e+4"),
        ("learning_rate", "'0.0001'", "0.0001"),
        ("learning_rate", '"1.0e-4"', "1.0e-4"),
        ("max_steps", "1e3", "1000"),
    ],
)
def test_a_number_that_is_read_as_text_is_refused_with_the_spelling_that_works(
    key: str, value: str, cure: str, folder: Path
) -> None:
    """Source: whole runs of 0.9.3 with each key of _FATAL_AS_TEXT; each of them ended in an exception."""
    found = [finding for finding in look(lines({key: value}), folder) if finding.refuse]
    assert [finding.hint for finding in found] == [f"write {cure}"]
    assert f"{key}: {value.strip(chr(34) + chr(39))} is text to LLaMA-Factory 0.9.3" in found[0].sentence
    assert isinstance(yaml.safe_load(cure), (int, float))


def test_a_number_that_is_read_as_text_is_fatal_only_where_that_is_known(folder: Path) -> None:
    text = lines({"learning_rate": "1e-4"})
    assert look(text, folder, known=fake(plain_yaml=False)) == []
    assert "up to 0.9.3" in warnings(look(text, folder, known=None))[0]
    unproved = look(lines({"lora_alpha": "1e1"}), folder)
    assert refusals(unproved) == [] and "write 10" in warnings(unproved)[0]
    assert look(lines({"run_name": "1e-4"}), folder, known=fake(keys=KEYS | {"run_name": "str"})) == []


def test_a_repeated_key_is_refused_where_the_reader_refuses_it(folder: Path) -> None:
    text = lines({}) + "dataset: sums\n"
    assert "dataset is given twice: the last one counts" in warnings(look(text, folder))[0]
    assert "later ones refuse the file" in warnings(look(text, folder, known=None))[0]
    [refused] = refusals(look(text, folder, known=fake(plain_yaml=False, version="0.9.4")))
    assert "dataset is given twice, which LLaMA-Factory 0.9.4 refuses" in refused


def test_an_evaluation_that_trains_is_refused_and_told_the_right_prefix(folder: Path) -> None:
    [refused] = refusals(look(lines({}), folder, evaluation=True))
    assert "so it is a training. submit train:/c/x.yaml" in refused


def test_an_evaluation_is_taken_with_either_prefix(folder: Path) -> None:
    for evaluation in (False, True):
        assert look(lines(EVALUATION), folder, evaluation=evaluation) == []


def test_nothing_to_do_is_refused(folder: Path) -> None:
    for value in (None, "false", "no"):
        [refused] = refusals(look(lines({"do_train": value}), folder))
        assert "none of do_train, do_eval and do_predict is true" in refused
    assert "do_eval: true" in refusals(look(lines({"do_train": None}), folder, evaluation=True))[0]
    # Preparing data sets needs none of them.
    assert refusals(look(lines({"do_train": None, "tokenized_path": "new"}), folder)) == []


@pytest.mark.parametrize("changes", [{"dataset": "summs"}, {"dataset": "gone"}, {"dataset_dir": "nowhere"}])
def test_what_a_job_ahead_may_make_is_a_warning(changes: Mapping[str, str | None], folder: Path) -> None:
    assert refusals(look(lines(changes), folder))
    found = look(lines(changes), folder, ahead=(Ahead(job_id=3, output_dir=""),))
    assert refusals(found) == [] and len(warnings(found)) == 1


def test_a_missing_deepspeed_config_is_refused(folder: Path) -> None:
    """Source: accelerate's HfDeepSpeedConfig: a file, JSON, or that in base64."""
    [refused] = refusals(look(lines({"deepspeed": "ds/z3.json"}), folder))
    assert f"the deepspeed config {folder}/ds/z3.json is not there" in refused
    (folder / "ds").mkdir()
    (folder / "ds/z3.json").write_text('{"zero_optimization": {"stage": 3}}')
    for name in ("ds/z3.json", '\'{"zero_optimization": {"stage": 3}}\'', "{zero_optimization: {stage: 3}}"):
        assert look(lines({"deepspeed": name}), folder) == []
    assert refusals(look(lines({"deepspeed": "e30"}), folder)) == []
    zero3 = fake(source="`pure_bf16` to initialize PiSSA in DeepSpeed ZeRO-3")
    found = look(lines({"deepspeed": "ds/z3.json", "pissa_init": "true"}), folder, known=zero3)
    assert "pissa_init does not go with DeepSpeed ZeRO-3" in refusals(found)[0]


def test_deepspeed_without_torchrun_is_a_warning(folder: Path) -> None:
    text = lines({"deepspeed": "{}"})
    (folder / "z.json").write_text("{}")
    text = lines({"deepspeed": "z.json"})
    assert "FORCE_TORCHRUN=1" in warnings(look(text, folder, environment={"FORCE_TORCHRUN": "0"}))[0]


def test_a_checkpoint_that_is_not_there_is_refused(folder: Path) -> None:
    assert "is not there" in refusals(look(lines({"resume_from_checkpoint": "out/checkpoint-5"}), folder))[0]
    assert refusals(look(lines({"resume_from_checkpoint": "stopped/checkpoint-5"}), folder)) == []


def test_a_model_that_is_not_there_is_a_warning_that_names_who_will_make_it(folder: Path) -> None:
    ahead = (Ahead(job_id=2, output_dir=str(folder / "sav")), Ahead(job_id=3, output_dir=str(folder / "saves/a")))
    for name in ("saves/a/merged", "./saves/a", f"{folder}/saves/a/merged"):
        found = look(lines({"model_name_or_path": name}), folder, ahead=ahead)
        assert warnings(found) == [
            f"model_name_or_path {name} is not there yet: job 3, ahead of it, will have to make it"
        ]
    assert (
        "adapter_name_or_path /x/b is not there"
        in warnings(look(lines({"adapter_name_or_path": "data, /x/b"}), folder))[0]
    )
    assert "does not expand `~`" in warnings(look(lines({"model_name_or_path": "~/m"}), folder))[0]
    assert "a/b/c is not there" in warnings(look(lines({"model_name_or_path": "a/b/c"}), folder))[0]
    assert "data/model is not there" in warnings(look(lines({"model_name_or_path": "data/model"}), folder))[0]


def test_a_model_of_a_hub_is_no_finding(folder: Path) -> None:
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "data"):
        assert look(lines({"model_name_or_path": name}), folder, environment={"HF_HUB_OFFLINE": "1"}) == []
    ppo = {"stage": "ppo", "reward_model": "http://localhost:8000", "reward_model_type": "api"}
    assert look(lines(ppo), folder) == []


def test_an_output_dir_of_a_job_ahead_is_a_warning_whatever_its_spelling(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "real")
    ahead = (Ahead(job_id=7, output_dir=str(folder / "real")), Ahead(job_id=8, output_dir=str(folder / "other")))
    [warning] = warnings(look(lines({"output_dir": "./x/../link/"}), folder, ahead=ahead))
    assert "is also that of job 7, ahead of it" in warning


def test_final_weights_are_no_refusal_where_a_job_ahead_may_change_them(folder: Path) -> None:
    for output_dir in ("", str(folder / "finished")):
        found = look(lines({"output_dir": "finished"}), folder, ahead=(Ahead(job_id=1, output_dir=output_dir),))
        assert refusals(found) == [] and any("final weights" in warning for warning in warnings(found))
    assert refusals(look(lines({"output_dir": "finished"}), folder, ahead=(Ahead(job_id=1, output_dir="/o"),)))


def test_the_refusal_of_an_output_dir_spells_out_the_choice(folder: Path) -> None:
    [refused] = refusals(look(lines({"output_dir": "finished"}), folder))
    for choice in ("new output_dir", "move that folder", "overwrite_output_dir: true"):
        assert choice in refused


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, True),
        ({"num_train_epochs": "2.5"}, True),
        ({"num_train_epochs": "5.0"}, False),
        ({"max_steps": "20"}, True),
        ({"max_steps": "40"}, False),
        ({"overwrite_output_dir": "true"}, False),
        ({**EVALUATION}, False),
    ],
)
def test_a_finished_run_of_the_same_training_is_a_warning(
    changes: Mapping[str, str | None], warned: bool, folder: Path
) -> None:
    """Source: trainer_state.json of a run of 0.9.3; who goes on with a training sets a later end."""
    state = {"global_step": 20, "max_steps": 20, "num_train_epochs": 3}
    (folder / "stopped/trainer_state.json").write_text(json.dumps(state))
    said = warnings(look(lines({"output_dir": "stopped", **changes}), folder))
    assert any("a false loss; set overwrite_output_dir: true" in warning for warning in said) is warned


def test_keys_and_templates_that_are_unknown_are_a_warning(folder: Path) -> None:
    known = fake(keys=KEYS, templates=frozenset({"qwen3", "llama3"}))
    text = lines({"template": "qwen", "evaluation_strategy": "steps", "foo": "1"})
    found = look(text, folder, known=known)
    assert refusals(found) == []
    assert warnings(found) == [
        "LLaMA-Factory 0.9.3 refuses keys that it does not know: "
        "evaluation_strategy (did you mean eval_strategy?), foo; correct or remove them",
        "LLaMA-Factory 0.9.3 has no template qwen (did you mean qwen3?); correct it, unless something else adds it",
    ]
    assert len(warnings(look(text, folder, known=known, environment={"ALLOW_EXTRA_ARGS": "1"}))) == 1
    assert look(text, folder, known=fake()) == []


def test_an_evaluation_without_a_template_is_a_warning(folder: Path) -> None:
    assert "it has no template" in warnings(look(lines({**EVALUATION, "template": None}), folder))[0]
    assert look(lines({"template": None}), folder) == []


def test_processes_that_do_not_fit_the_devices_are_a_warning(folder: Path) -> None:
    environment = {"NPROC_PER_NODE": "2"}
    [warning] = warnings(look(lines({}), folder, environment=environment, devices=(0,)))
    assert warning == "NPROC_PER_NODE=2 does not fit @0; give --env NPROC_PER_NODE=1"
    for devices in ((), (4, 5)):
        assert look(lines({}), folder, environment=environment, devices=devices) == []
    assert look(lines({}), folder, environment={"NPROC_PER_NODE": "gpu"}, devices=(0,)) == []


def test_other_parsers_of_llamafactory_get_warnings_only(folder: Path) -> None:
    for variable in ("USE_MCA", "USE_V1"):
        found = look(lines({"eval_strategy": "no", "foo": "1"}), folder, environment={variable: "1"})
        assert refusals(found) == [] and len(warnings(found)) == 1


BENCHMARK = "model_name_or_path: org/model\ntemplate: default\ntask: mmlu_test\ntask_dir: data\nsave_dir: new\n"


def test_a_benchmark_is_refused_where_the_installed_version_no_longer_has_it(folder: Path) -> None:
    assert look(BENCHMARK, folder, evaluation=True) == []
    [warning] = warnings(look(BENCHMARK, folder, evaluation=True, known=None))
    assert "dropped with 0.9.4; evaluate with do_eval: true" in warning
    [refused] = refusals(look(BENCHMARK, folder, evaluation=True, known=fake(version="0.9.4", benchmarks=False)))
    assert "LLaMA-Factory 0.9.4 no longer has `llamafactory-cli eval`" in refused


def test_a_benchmark_needs_a_new_save_dir(folder: Path) -> None:
    text = BENCHMARK.replace("save_dir: new", "save_dir: data")
    assert "save_dir data exists" in refusals(look(text, folder, evaluation=True))[0]
    assert refusals(look(text, folder, evaluation=True, ahead=(Ahead(job_id=1, output_dir=""),))) == []
    odd = BENCHMARK.replace("mmlu_test", "mmlu").replace("task_dir: data\n", "").replace("model_name", "mode_name")
    said = look(odd, folder, evaluation=True)
    assert "model_name_or_path is missing" in refusals(said)[0]
    assert len(warnings(said)) == 2


def test_a_wrong_path_is_a_warning_where_it_may_be_meant_so(folder: Path) -> None:
    (folder / "data/table.xlsx").write_text("")
    info = {"table": {"file_name": "table.xlsx"}, "hub": {"hf_hub_url": "org/data"}, "odd": [], "none": {}}
    (folder / "data/dataset_info.json").write_text(json.dumps(info))
    assert "must be files of one kind" in warnings(look(lines({"dataset": "table"}), folder))[0]
    for name in ("hub", "odd", "none"):
        assert look(lines({"dataset": name}), folder) == []


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["/", "\0", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
# fmt: off
READ = [
    "adapter_name_or_path", "dataset", "dataset_dir", "deepspeed", "do_eval", "do_predict", "do_train", "eval_dataset",
    "eval_strategy", "finetuning_type", "infer_backend", "learning_rate", "load_best_model_at_end", "max_steps",
    "model_name_or_path", "num_train_epochs", "overwrite_output_dir", "pref_loss", "report_to",
    "resume_from_checkpoint", "reward_model", "save_dir", "save_strategy", "stage", "streaming", "task", "task_dir",
    "template", "tokenized_path", "val_size",
]
# fmt: on


@given(st.dictionaries(st.sampled_from(READ), VALUES), st.booleans())
def test_no_value_is_too_odd(values: dict[str, object], evaluation: bool) -> None:
    data = {"output_dir": "/tmp", "save_dir": "x", **values}
    text = yaml.safe_dump(data)
    try:
        settings.read(text.encode(), "x")
    except InvalidConfig:
        return
    for finding in look(text, Path("/usr/share"), evaluation=evaluation, ahead=(Ahead(job_id=1, output_dir="/"),)):
        assert finding.sentence.isprintable() and len(finding.sentence) < 5000
        assert bool(finding.hint) is finding.refuse


@pytest.mark.skipif(not ORACLE, reason="LFSVC_ORACLE names no python with LLaMA-Factory 0.9.3")
def test_the_real_llamafactory_refuses_and_takes_what_the_tables_say(folder: Path) -> None:
    known = installation.find(os.path.join(os.path.dirname(ORACLE), "llamafactory-cli"), {})
    assert known is not None
    tables = [(changes, message) for changes, _, message in REFUSED] + [(changes, "") for changes in ACCEPTED]
    answers = ask([yaml.safe_load(lines(changes)) for changes, _ in tables], folder)
    for (changes, message), answer in zip(tables, answers, strict=True):
        assert message in answer, (changes, answer)
        assert bool(answer) is bool(message), (changes, answer)
        assert bool(refusals(look(lines(changes), folder, known=known))) is bool(message), changes


# Configs among LLaMA-Factory's own that 0.9.3 does not take, and why. Folder or file · words of our refusal ·
# words of its own parser. The others of examples/ are taken; `settings.read` refuses what neither trains nor evaluates.
NOT_TAKEN = {
    "extras/oft/": ("finetuning_type oft is none that", "Invalid fine-tuning method."),
    "extras/qoft/": ("finetuning_type oft is none that", "Invalid fine-tuning method."),
    # 0.9.3 takes them as far as the optimiser, and dies there: see the numbers above.
    "megatron/": ("is text to LLaMA-Factory 0.9.3", ""),
}
NO_JOBS = ("accelerate/", "extras/multi_tokens/", "inference/", "infer_lora/", "kt_optimize_rules/", "merge_lora/")


def examples() -> list[str]:
    root = Path(EXAMPLES, "examples")
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml")) if EXAMPLES else []


@pytest.mark.skipif(not EXAMPLES, reason="LFSVC_EXAMPLES names no folder with LLaMA-Factory's examples")
def test_the_examples_are_there() -> None:
    assert len(examples()) > 60


def example(name: str) -> tuple[str, list[str]]:
    """The text of an example, and the reasons for which it may be refused."""
    known = KNOWING
    if ORACLE:
        known = installation.find(os.path.join(os.path.dirname(ORACLE), "llamafactory-cli"), {}) or KNOWING
    text = Path(EXAMPLES, "examples", name).read_text()
    return text, refusals(look(text, Path(EXAMPLES), known=known))


@pytest.mark.parametrize("name", examples())
def test_an_example_is_taken_or_refused_for_the_right_reason(name: str) -> None:
    if any(part in name for part in NO_JOBS):
        with pytest.raises(InvalidConfig, match=r"has no output_dir|must be a mapping"):
            example(name)
        return
    reasons = [words for part, (words, _) in NOT_TAKEN.items() if name.startswith(part)]
    _, refused = example(name)
    assert bool(refused) is bool(reasons), refused
    assert all(any(words in said for said in refused) for words in reasons)


@pytest.mark.skipif(not (ORACLE and EXAMPLES), reason="LFSVC_ORACLE and LFSVC_EXAMPLES are not both set")
def test_the_real_parser_says_the_same_of_the_examples() -> None:
    names = [name for name in examples() if not any(part in name for part in NO_JOBS)]
    texts = [example(name)[0] for name in names]
    # Their keys of 0.9.4 are warnings here, so they are no subject.
    answers = ask([yaml.safe_load(text) for text in texts], Path(EXAMPLES), load=False, ALLOW_EXTRA_ARGS="1")
    for name, answer in zip(names, answers, strict=True):
        messages = [message for part, (_, message) in NOT_TAKEN.items() if name.startswith(part) and message]
        distributed = "use_galore" in answer or "layer-wise" in answer.lower()  # a matter of torchrun_conflict
        assert bool(answer) is bool(messages) or distributed, (name, answer)
        assert all(message in answer for message in messages), (name, answer)


ASK = """
import json, os, sys
os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ |= {"MASTER_PORT": sys.argv[1], "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": os.path.abspath("cache")}
import transformers.training_args
from llamafactory.data.loader import _get_merged_dataset
from llamafactory.hparams import parser
# Neither packages nor devices are the question here: a CPU, and nothing optional installed.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
parser.is_torch_bf16_gpu_available = lambda: True
parser.check_version = lambda *args, **kwargs: None

def ask(values):
    values.pop("deepspeed", None)
    try:
        model, data, training, finetuning, _ = parser.get_train_args({"use_cpu": True, **values})
        stage = "rm" if finetuning.stage == "dpo" else finetuning.stage
        if "load" in sys.argv and data.dataset_dir != "ONLINE" and not data.tokenized_path:
            for names in (data.dataset, data.eval_dataset):
                _get_merged_dataset(names, model, data, training, stage)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""

answers = [ask(values) for values in json.load(sys.stdin)]
print(json.dumps(answers))
"""


def ask(configs: list[dict[str, object]], folder: Path, *, load: bool = True, **environment: str) -> list[str]:
    """Have LLaMA-Factory's own parser, and its loader of data sets, judge: "" or the error, for each config."""
    done = subprocess.run(
        [ORACLE, "-c", ASK, "29617", "load" if load else ""],
        cwd=folder,
        env={**os.environ, **environment},
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers
