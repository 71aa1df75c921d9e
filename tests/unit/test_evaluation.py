"""Whether an evaluation follows a training, and what is in its YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.errors import InvalidConfig
from lfsvc.llamafactory import evaluation
from lfsvc.llamafactory.evaluation import Description, Model, derive, describe, fill_in, model_of, none_because
from lfsvc.llamafactory.settings import with_changes

TRAINING: dict[str, Any] = {
    "model_name_or_path": "org/base", "stage": "sft", "do_train": True, "template": "qwen", "dataset": "a,b",
    "val_size": 0.1, "seed": 7, "output_dir": "saves/run", "learning_rate": 1e-4, "num_train_epochs": 3,
    "lora_rank": 8, "save_steps": 500, "warmup_ratio": 0.1, "bf16": True, "per_device_train_batch_size": 2,
    "tokenized_path": "cache", "deepspeed": "ds.json", "max_samples": 100, "plot_loss": True,
}  # fmt: skip
OUT = "/lab/saves/run"
MERGED = Model(path=f"{OUT}/merged", base="org/base")


def of(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**TRAINING, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "has_template", "reason"),
    [
        (of(), False, ""),
        (of(val_size=None, eval_dataset="c"), False, ""),
        (of(val_size="1e-1"), False, ""),
        (of(val_size=None), True, ""),
        (of(val_size=None), False, "the YAML has neither eval_dataset nor val_size"),
        (of(val_size=0), False, "the YAML has neither"),
        (of(val_size=True), False, "val_size True is no number"),
        (of(val_size="ten"), False, "val_size 'ten' is no number"),
        (of(streaming=True), False, "val_size with streaming holds back other samples"),
        (of(stage="ppo"), False, "LLaMA-Factory has no evaluation for stage ppo"),
        (of(stage="ppo"), True, "LLaMA-Factory has no evaluation for stage ppo"),
    ],
)
def test_a_training_without_an_evaluation_says_why(values: dict[str, Any], has_template: bool, reason: str) -> None:
    found = none_because(values, has_template=has_template)
    assert found.startswith(reason) if reason else found == ""


def test_both_ways_to_an_evaluation_are_named() -> None:
    reason = none_because(of(val_size=None), has_template=False)
    assert "eval_dataset" in reason and "evaluation.template in config.yaml" in reason and "#no_eval" in reason


def test_the_split_of_the_training_is_evaluated() -> None:
    config = derive(TRAINING, MERGED, "/results/run_eval", working_directory="/")
    assert config == {
        "model_name_or_path": f"{OUT}/merged", "finetuning_type": "full", "stage": "sft", "template": "qwen",
        "max_samples": 100, "bf16": True, "seed": 7, "dataset": "a,b", "val_size": 0.1, "per_device_eval_batch_size": 2,
        "compute_accuracy": True, "do_train": False, "do_eval": True, "output_dir": "/results/run_eval",
        "overwrite_output_dir": True, "report_to": "none",
    }  # fmt: skip


def test_with_an_eval_dataset_the_training_data_stays_out() -> None:
    config = derive(of(val_size=None, eval_dataset="c"), MERGED, "/r", working_directory="/")
    assert config["eval_dataset"] == "c"
    assert "dataset" not in config and "val_size" not in config


def test_a_number_that_only_the_newer_yaml_reads_as_one_stays_a_number() -> None:
    config = derive(of(val_size="1e-1"), MERGED, "/r", working_directory="/")
    assert yaml.safe_load(yaml.safe_dump(config))["val_size"] == 0.1


def test_only_zero3_is_carried_into_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for stage, carried in [(2, False), (3, True)]:
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = derive(TRAINING, MERGED, "/r", working_directory=str(tmp_path))
        assert ("deepspeed" in config) is carried
    assert "deepspeed" not in derive(
        of(deepspeed={"zero_optimization": {"stage": 3}}), MERGED, "/r", working_directory="/"
    )


def test_a_preference_model_is_compared_with_the_base_that_it_came_from() -> None:
    values = of(stage="dpo", pref_beta=0.1)
    config = derive(values, MERGED, "/r", working_directory="/")
    assert (config["ref_model"], config["pref_beta"]) == ("org/base", 0.1)
    assert "compute_accuracy" not in config
    # On the adapter as on the merged model, and with the adapters that the training started from.
    values |= {"adapter_name_or_path": "A", "create_new_adapter": True, "quantization_bit": 4}
    adapted = model_of(values, OUT, merged="", working_directory="/")
    config = derive(values, adapted, "/r", working_directory="/")
    assert (config["ref_model"], config["ref_model_adapters"], config["ref_model_quantization_bit"]) == (
        "org/base", "A", 4,
    )  # fmt: skip
    assert derive({**values, "ref_model": "r"}, MERGED, "/r", working_directory="/")["ref_model"] == "r"


@pytest.mark.parametrize(
    ("values", "merged", "model"),
    [
        (of(), f"{OUT}/merged", MERGED),
        (of(), "", Model(path="org/base", adapters=(OUT,), finetuning_type="lora", base="org/base")),
        (of(finetuning_type="full"), "", Model(path=OUT, base="org/base")),
        (of(finetuning_type="freeze"), "", Model(path=OUT, base="org/base")),
        (
            of(adapter_name_or_path="A", create_new_adapter=True),
            "",
            Model(path="org/base", adapters=("A", OUT), finetuning_type="lora", base="org/base", below=("A",)),
        ),
    ],
)
def test_evaluated_is_what_the_training_made(values: dict[str, Any], merged: str, model: Model) -> None:
    assert model_of(values, OUT, merged=merged, working_directory="/") == model


def test_base_and_adapter_are_loaded_as_they_were_trained() -> None:
    values = of(quantization_bit=4, model_revision="main")
    model = model_of(values, OUT, merged="", working_directory="/")
    config = derive(values, model, "/r", working_directory="/")
    assert (config["finetuning_type"], config["adapter_name_or_path"]) == ("lora", OUT)
    assert (config["quantization_bit"], config["model_revision"]) == (4, "main")
    assert "quantization_bit" not in derive(values, MERGED, "/r", working_directory="/")


def test_a_template_gets_the_model_and_keeps_what_it_says() -> None:
    template = {"do_predict": True, "eval_dataset": "bench", "output_dir": "x", "adapter_name_or_path": "old"}
    changes, removed = fill_in(template, TRAINING, MERGED, "/r")
    assert changes == {
        "model_name_or_path": f"{OUT}/merged", "finetuning_type": "full", "template": "qwen", "output_dir": "/r",
    }  # fmt: skip
    assert removed == ("adapter_name_or_path",)
    changes, _ = fill_in({**template, "template": "llama3"}, TRAINING, MERGED, "/r")
    assert "template" not in changes


def test_a_template_that_quantises_keeps_the_one_type_that_does() -> None:
    changes, _ = fill_in({"do_eval": True, "quantization_bit": 4}, TRAINING, MERGED, "/r")
    assert changes["finetuning_type"] == "lora"


def test_an_adapter_that_cannot_be_named_is_not_evaluated() -> None:
    with pytest.raises(InvalidConfig, match="comma"):
        model_of(of(), "/lab/a,b", merged="", working_directory="/")


def test_a_benchmark_gets_a_save_dir() -> None:
    changes, _ = fill_in({"task": "mmlu_test"}, TRAINING, MERGED, "/r")
    assert changes["save_dir"] == "/r" and "output_dir" not in changes


TEMPLATE = b"""\
# our benchmark
do_predict: true   # generate
adapter_name_or_path:
  - old

### data
eval_dataset: [bench]
output_dir: |
  several
  lines
learning_rate: 1e-4
"""


def test_all_other_bytes_of_a_template_are_kept() -> None:
    changed = with_changes(TEMPLATE, {"output_dir": "/r", "model_name_or_path": "m"}, ("adapter_name_or_path",))
    assert changed == (
        b"# our benchmark\ndo_predict: true   # generate\n\n### data\neval_dataset: [bench]\nlearning_rate: 1e-4\n"
        b"output_dir: /r\nmodel_name_or_path: m\n"
    )


# Without the line breaks that PyYAML itself does not round-trip.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff"), max_size=20)
KEY = st.text("abc_", min_size=1, max_size=4)


@given(
    st.dictionaries(KEY, st.one_of(TEXT, st.integers(), st.none(), st.lists(TEXT, max_size=3)), max_size=5),
    st.dictionaries(KEY, TEXT, min_size=1, max_size=3),
    st.booleans(),
)
def test_changed_keys_have_their_value_and_others_keep_theirs(
    values: dict[str, Any], changes: dict[str, str], flow: bool
) -> None:
    data = yaml.safe_dump(values, allow_unicode=True, default_flow_style=flow).encode("utf-8", "surrogatepass")
    assert yaml.safe_load(with_changes(data, changes)) == {**values, **changes}


@pytest.mark.parametrize("text", ["  a: 1\n  b: 2\n", "a: &x 1\nb: *x\n", "{a: 1, b: 2}", "a: 1\n---\n"])
def test_a_template_that_cannot_be_edited_line_by_line_is_still_right(text: str) -> None:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        with pytest.raises(InvalidConfig):
            with_changes(text.encode(), {"a": 3})
        return
    assert yaml.safe_load(with_changes(text.encode(), {"a": 3})) == {**values, "a": 3}


def test_a_header_that_somebody_edited_is_not_believed() -> None:
    values = {"do_eval": True, "output_dir": "/r/x"}
    data = b'# lfsvc: {"run": 5, "mode": "eval", "type": "lora", "model": "m", "path": "/r/x"}\n'
    described = describe(data, values, working_directory="/")
    assert described is not None and described.run == "x"


def test_an_evaluation_strategy_evaluates_as_do_eval_does() -> None:
    assert evaluation.kind_of({"eval_strategy": "steps"}) == "eval"
    assert evaluation.kind_of({"eval_strategy": "no"}) == ""


def test_a_generated_yaml_is_known_again_until_it_writes_elsewhere(tmp_path: Path) -> None:
    described = Description(run="run", mode="bench", type="lora", model="/m", path="/r/run_bench")
    data = b"# title\n" + evaluation.header(described) + b"do_eval: true\noutput_dir: /r/run_bench\n"
    values = yaml.safe_load(data)
    assert describe(data, values, working_directory="/") == described
    elsewhere = describe(data, {**values, "output_dir": "/other"}, working_directory="/")
    assert elsewhere is not None and (elsewhere.run, elsewhere.mode, elsewhere.type) == ("other", "eval", "base")
    assert describe(b"# lfsvc: {broken\n", values, working_directory="/") is not None


@pytest.mark.parametrize(
    ("values", "kind", "row"),
    [
        ({"do_eval": True, "output_dir": "o"}, "eval", "base"),
        ({"do_predict": True, "do_eval": True, "output_dir": "o", "adapter_name_or_path": "A"}, "predict", "lora"),
        ({"task": "mmlu", "save_dir": "o", "finetuning_type": "lora"}, "benchmark", "base"),
        ({"do_eval": True, "output_dir": "o", "finetuning_type": "full"}, "eval", "full"),
    ],
)
def test_an_evaluation_of_the_users_own_is_described_by_what_it_says(
    values: dict[str, Any], kind: str, row: str
) -> None:
    described = describe(b"", values, working_directory="/lab")
    assert described is not None
    assert (described.run, described.mode, described.type, described.path) == ("o", kind, row, "/lab/o")


def test_what_evaluates_nothing_has_no_row() -> None:
    assert describe(b"", {"do_train": True, "output_dir": "o"}, working_directory="/") is None


def test_a_merged_model_is_known_by_its_marker(tmp_path: Path) -> None:
    (tmp_path / "lfsvc_merge.json").write_text("{}")
    values = {"do_eval": True, "output_dir": "o", "model_name_or_path": str(tmp_path)}
    described = describe(b"", values, working_directory="/")
    assert described is not None and described.type == "lora"
