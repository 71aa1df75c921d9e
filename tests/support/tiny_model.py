"""Makes a model that trains in seconds, its data, and a training YAML. Run by LLaMA-Factory's own Python.

usage: python tiny_model.py FOLDER
"""

import json
import os
import random
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

YAML = """\
### A training that takes seconds on a CPU: a 112 k parameter model learns sums.
model_name_or_path: {folder}/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
dataset: sums
dataset_dir: {folder}/data
template: default
cutoff_len: 128
val_size: 0.1
output_dir: {folder}/saves/sums
logging_steps: 2
save_steps: 20
overwrite_output_dir: true
per_device_train_batch_size: 8
learning_rate: 1.0e-3
num_train_epochs: 2.0
report_to: none
"""


def main(folder: str) -> None:
    """Write model/, data/ and train.yaml into a folder."""
    random.seed(7)
    set_seed(7)
    rows = []
    for _ in range(200):
        left, right = random.randint(0, 99), random.randint(0, 99)
        rows.append({"instruction": f"What is {left} plus {right}?", "input": "", "output": str(left + right)})
    data = os.path.join(folder, "data")
    os.makedirs(data, exist_ok=True)
    with open(os.path.join(data, "sums.json"), "w", encoding="utf-8") as file:
        json.dump(rows, file)
    with open(os.path.join(data, "dataset_info.json"), "w", encoding="utf-8") as file:
        json.dump({"sums": {"file_name": "sums.json"}}, file)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["instruction"] + " " + row["output"] for row in rows), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model = os.path.join(folder, "model")
    fast.save_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    with open(os.path.join(folder, "train.yaml"), "w", encoding="utf-8") as file:
        file.write(YAML.format(folder=folder))


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
