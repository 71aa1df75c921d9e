"""What the LLaMA-Factory of a `llamafactory-cli` knows and refuses, read from its source text: nothing is imported.

Three answers everywhere: yes, no and unknown (None). Whoever cannot tell must not guess, since forks
have keys, templates and checks of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lfsvc.llamafactory import cli

_SOURCES = (
    "extras/env.py", "cli.py", "launcher.py", "hparams/parser.py", "hparams/data_args.py",
    "hparams/evaluation_args.py", "hparams/finetuning_args.py", "hparams/generating_args.py", "hparams/model_args.py",
    "hparams/training_args.py", "data/parser.py", "data/loader.py", "data/template.py",
)  # fmt: skip
_TRANSFORMERS = ("training_args.py", "training_args_seq2seq.py")

_COMMENT = re.compile(r"^[ \t]*#.*\n", re.MULTILINE)
_DOCSTRING = re.compile(r'"""(?:[^"\\]|\\.|"(?!""))*"""', re.DOTALL)
_CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:[^\n]*\n((?:[ \t][^\n]*\n|\n)*)", re.MULTILINE)
_FIELD = re.compile(
    r"^ {4}([A-Za-z_]\w*)[ ]?:[ ]?([^=\n]+)(?:=((?:[^\n]*\n)(?: {5}[^\n]*\n| {4}[)\]}][^\n]*\n|\n)*))?", re.M
)
_ALIAS = re.compile(r"^[ \t]*(\w+) = (\w+)$", re.MULTILINE)
_IMPORTED_AS = re.compile(r"\b(\w+) as (\w+)\b")
_TEMPLATE = re.compile(r"""^[ \t]*register_template\(\s*(?:name\s*=\s*)?["']([^"'\n]+)["']""", re.MULTILINE)
_TEMPLATE_CALL = re.compile(r"^[ \t]*register_template\(", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """One LLaMA-Factory, as far as its source text tells."""

    root: str
    """The folder of the package."""
    version: str
    """Such as `0.9.3`, for messages; "" where unknown. What differs by version is told from the source instead."""
    keys: Mapping[str, str] | None
    """The keys that `train` takes, each with its type as written; None where a part of them cannot be seen."""
    benchmark_keys: Mapping[str, str] | None
    """The same for `eval` with `task:`."""
    templates: frozenset[str] | None
    benchmarks: bool | None
    """Whether `llamafactory-cli eval` still works (up to 0.9.3)."""
    plain_yaml: bool | None
    """True: PyYAML reads the config (up to 0.9.3), so `1e-4` is text. False: OmegaConf does, which refuses
    a key that is given twice."""
    source: str
    """The text of its checks and of transformers' TrainingArguments, without comments."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"LLaMA-Factory {self.version}" if self.version else "the installed LLaMA-Factory"

    def says(self, words: str) -> bool | None:
        """Whether these words of an error message stand in its checks: a fork may have dropped one."""
        return words in self.source if self.source else None


def find(program: str, environment: Mapping[str, str]) -> Installation | None:
    """Find the installation that a `llamafactory-cli` starts; None where that is uncertain.

    The second call for an unchanged installation reads no file: it looks at the times of some fifteen.
    """
    root = _package(program, environment)
    if not root:
        return None
    transformers = _transformers(root, program)
    files = [os.path.join(root, name) for name in _SOURCES]
    files += [os.path.join(transformers, name) for name in _TRANSFORMERS] if transformers else []
    return _read(root, tuple((path, _stamp(path)) for path in files))


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _package(program: str, environment: Mapping[str, str]) -> str:
    """The folder of the package, "" where there is none or more than one."""
    for folder in environment.get("PYTHONPATH", "").split(os.pathsep):
        if folder and os.path.isdir(os.path.join(folder, "llamafactory")):
            return ""
    found = set()
    for folder in _site_folders(program):
        root = os.path.join(folder, "llamafactory")
        if not os.path.isfile(os.path.join(root, "__init__.py")):
            root = _editable(folder)
        if root:
            found.add(os.path.realpath(root))
    return found.pop() if len(found) == 1 else ""


def _site_folders(program: str) -> list[str]:
    """The folders that may hold packages for a console script, nearest first."""
    bins = [cli.interpreter_folder(program), os.path.dirname(program), os.path.dirname(os.path.realpath(program))]
    folders: list[str] = []
    for prefix in dict.fromkeys(os.path.dirname(folder) for folder in bins if folder):
        for library in ("lib", "lib64"):
            for name in _entries(os.path.join(prefix, library)):
                if name.startswith("python3"):
                    base = os.path.join(prefix, library, name)
                    folders += [os.path.join(base, "site-packages"), os.path.join(base, "dist-packages")]
    return folders


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _editable(folder: str) -> str:
    """The package of an editable install, of which a folder of packages holds only the description."""
    for name in _entries(folder):
        if name.lower().startswith("llamafactory-") and name.endswith(".dist-info"):
            text = _text(os.path.join(folder, name, "direct_url.json"))
            found = re.search(r'"url":\s*"file://([^"]+)"', text)
            if found and "editable" in text:
                from urllib.parse import unquote

                project = unquote(found.group(1))
                for root in (os.path.join(project, "src", "llamafactory"), os.path.join(project, "llamafactory")):
                    if os.path.isfile(os.path.join(root, "__init__.py")):
                        return root
    return ""


def _transformers(root: str, program: str) -> str:
    for folder in [os.path.dirname(root), *_site_folders(program)]:
        candidate = os.path.join(folder, "transformers")
        if os.path.isfile(os.path.join(candidate, _TRANSFORMERS[0])):
            return candidate
    return ""


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@lru_cache(maxsize=8)
def _read(root: str, stamps: tuple[tuple[str, int], ...]) -> Installation:
    """Read an installation; `stamps` are its files and their times, so that a changed file is read again."""
    texts = {path: _COMMENT.sub("", _text(path)) for path, _ in stamps}

    def part(name: str) -> str:
        return texts[os.path.join(root, name)]

    parser = part("hparams/parser.py")
    arguments = "".join(part(name) for name in _SOURCES if name.endswith("_args.py"))
    library = "".join(text for path, text in texts.items() if not path.startswith(root + os.sep))
    classes = _classes(arguments), _classes(library)
    version = re.search(r"""^VERSION = ["']([^"']+)["']""", part("extras/env.py"), re.MULTILINE)
    launcher = part("cli.py") + part("launcher.py")
    benchmarks = False if "Evaluation will be deprecated" in launcher else True if "run_eval" in launcher else None
    plain_yaml = False if "OmegaConf.load(" in parser else True if "yaml.safe_load(" in parser else None
    return Installation(
        root=root,
        version=version.group(1) if version else "",
        keys=_keys(parser, "_TRAIN_ARGS", *classes),
        benchmark_keys=_keys(parser, "_EVAL_ARGS", *classes),
        templates=_templates(part("data/template.py")),
        benchmarks=benchmarks,
        plain_yaml=plain_yaml,
        source=parser + arguments + library + part("data/parser.py") + part("data/loader.py"),
    )


def _templates(text: str) -> frozenset[str] | None:
    """The names of the templates; None where one of them is not written out."""
    text = _DOCSTRING.sub("", text)
    names = _TEMPLATE.findall(text)
    calls = len(_TEMPLATE_CALL.findall(text))
    return frozenset(names) if names and len(names) == calls else None


_Classes = dict[str, tuple[tuple[str, ...], dict[str, str]]]


def _classes(text: str) -> _Classes:
    """Class → (names of its bases, its dataclass fields with their types). Aliases count as classes.

    An alias that stands under an `if` has two targets: both are bases of it, so that no key is missed.
    """
    text = _DOCSTRING.sub("", text)
    found: _Classes = {}
    for name, bases, body in _CLASS.findall(text):
        fields = {
            field: kind.strip()
            for field, kind, value in _FIELD.findall(body)
            if not re.search(r"\binit\s*=\s*False", value) and "ClassVar" not in kind
        }
        found[name] = (tuple(base.strip() for base in bases.split(",") if base.strip()), fields)
    renamed = {new: old for old, new in _IMPORTED_AS.findall(text)}
    for alias, target in _ALIAS.findall(text):
        if alias not in found or not found[alias][1]:
            found[alias] = ((*found.get(alias, ((), {}))[0], renamed.get(target, target)), {})
    return found


def _keys(parser: str, table: str, own: _Classes, library: _Classes) -> dict[str, str] | None:
    """The keys that a table of argument classes takes; None where one of its classes is not seen.

    Both sides have a class named TrainingArguments: what a class of transformers derives from is looked for there.
    """
    listed = re.search(rf"^{table}\s*=\s*\[([^\]]*)\]", parser, re.MULTILINE)
    if listed is None:
        return None
    keys: dict[str, str] = {}
    waiting = [(name.strip(), own) for name in listed.group(1).split(",") if name.strip()]
    for name, where in waiting:
        if name == "object":
            continue
        where = where if name in where else library
        if name not in where or len(waiting) > 100:
            return None
        bases, fields = where[name]
        waiting += [(base, where) for base in bases]
        for field, kind in fields.items():
            keys.setdefault(field, kind)
    return keys or None


# The defaults that decide something here or in the checks.
# fmt: off
DEFAULTS: Mapping[str, Any] = {
    "dataset_dir": "data", "finetuning_type": "lora", "infer_backend": "huggingface", "max_steps": -1,
    "mix_strategy": "concat", "num_train_epochs": 3.0, "pref_loss": "sigmoid", "reward_model_type": "lora",
    "stage": "sft", "task_dir": "evaluation", "use_fast_tokenizer": True, "val_size": 0.0,
}
# fmt: on
_OPTIMISERS = ("use_galore", "use_apollo", "use_badam")
# No message, but the code that takes text only.
_TEXT_OF_ADAPTERS = """if self.adapter_name_or_path is not None:  # support merging multiple lora weights
            self.adapter_name_or_path = [path.strip() for path in self.adapter_name_or_path.split(",")]"""
_NO_MODEL = "Please provide `model_name_or_path`"


def evaluates(values: Mapping[str, Any]) -> bool:
    """Whether a config evaluates; as transformers has it, a strategy switches a do_eval on that is absent or false."""
    switched_on = values.get("do_eval", False) is False and values.get("eval_strategy") not in (None, "no", False)
    return switched_on or bool(values.get("do_eval"))


def _foreign_logger(values: Mapping[str, Any]) -> bool:
    value = values.get("report_to")
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and first not in ("none", "all", "wandb", "tensorboard")


# Conditions that are more than a look at one key.
_FACTS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "val_size": lambda values: float(values["val_size"]) > 1e-6,
    "val_fraction": lambda values: 1e-6 < float(values["val_size"]) < 1,
    "evaluates": lambda values: evaluates(values) or bool(values.get("do_predict")),
    "optimiser": lambda values: any(values.get(key) for key in _OPTIMISERS),
    "optimisers": lambda values: sum(bool(values.get(key)) for key in _OPTIMISERS) > 1,
    "foreign_logger": _foreign_logger,
    "list_of_adapters": lambda values: isinstance(values.get("adapter_name_or_path"), list),
    "other_strategy": lambda values: (
        (values.get("save_strategy") or "steps") not in ("best", values.get("eval_strategy") or "no")
    ),
}

# What is refused before anything is loaded: words of LLaMA-Factory's message, the condition, what is true,
# what to do. A condition is words that must all hold: `key` is given and true, `!key` is not, `key=a,b` and
# `key!=a,b` compare. A row without a text of its own says that the first key does not go with the second.
# Source: hparams/ of 0.9.3 and 0.9.4; each row was tried with 0.9.3, but for those of zero3, which were read.
# fmt: off
_RULES: tuple[tuple[str, str, str, str], ...] = (
    (_NO_MODEL, "model_name_or_path=None", "model_name_or_path is missing", "name a model"),
    ("Please specify dataset for training", "do_train dataset=None", "dataset is missing", "name a data set"),
    ("Please specify dataset for evaluation", "evaluates eval_dataset=None !val_size",
     "it evaluates, but has neither eval_dataset nor val_size", "add one of the two"),
    ("Please make sure eval_dataset be provided", "evaluates eval_dataset=None !val_size",
     "it evaluates, but has neither eval_dataset nor val_size", "add one of the two"),
    ("Please enable `predict_with_generate`", "stage=sft do_predict !predict_with_generate",
     "do_predict needs predict_with_generate", "add predict_with_generate: true"),
    ("Cannot use `predict_with_generate` if `eval_dataset`", "predict_with_generate eval_dataset=None",
     "predict_with_generate needs an eval_dataset", "name one"),
    ("Cannot use `predict_with_generate` and `compute_acc", "predict_with_generate compute_accuracy", "", ""),
    ("`predict_with_generate` is incompatible with DeepSpeed", "predict_with_generate zero3", "", ""),
    ("`predict_with_generate` cannot be set as True except", "predict_with_generate stage!=sft", "", ""),
    ("`neat_packing` cannot be set as True except SFT", "neat_packing stage!=sft", "", ""),
    ("`train_on_prompt` or `mask_history` cannot be set", "train_on_prompt stage!=sft", "", ""),
    ("`train_on_prompt` or `mask_history` cannot be set", "mask_history stage!=sft", "", ""),
    ("`mask_history` is incompatible with `train_on_prompt`", "mask_history train_on_prompt", "", ""),
    ("Cannot specify `val_size` if `dataset`", "val_size dataset=None",
     "val_size is given without a dataset to take it from", "remove it, or name the dataset"),
    ("Cannot specify `val_size` if `eval_dataset`", "val_size eval_dataset", "", ""),
    ("`max_samples` is incompatible with `streaming`", "max_samples streaming", "", ""),
    ("Please specify `max_steps` in streaming", "streaming max_steps=-1", "streaming needs max_steps", "add it"),
    ("Streaming mode should have an integer val size", "streaming val_fraction",
     "streaming needs a val_size that is a whole number", "give a number of examples"),
    ("`interleave_probs` is only valid for interleaved", "interleave_probs mix_strategy=concat",
     "interleave_probs needs a mix_strategy other than concat", "set mix_strategy: interleave_under, say"),
    ("At most one of fp16 and bf16", "fp16 bf16", "", ""),
    ("requires the save and eval strategy to match", "load_best_model_at_end other_strategy",
     "load_best_model_at_end needs the same eval_strategy and save_strategy", "set both to steps or both to epoch"),
    ("dataloader_prefetch_factor can only be set when", "dataloader_prefetch_factor !dataloader_num_workers",
     "dataloader_prefetch_factor needs dataloader_num_workers", "set that to 1 or more"),
    ("`split_special_tokens` is only supported for slow", "split_special_tokens use_fast_tokenizer",
     "split_special_tokens needs a slow tokenizer", "set use_fast_tokenizer: false"),
    ("vLLM/SGLang backend is only available for API", "infer_backend!=huggingface",
     "infer_backend must be huggingface, for a training as for an evaluation", "remove it"),
    ("`reward_model` is necessary for PPO", "stage=ppo reward_model=None", "stage ppo needs a reward_model", "name it"),
    ("PPO training does not support evaluation", "stage=ppo !do_train", "stage ppo can only train", "set stage: sft"),
    ("PPO only accepts wandb or tensorboard", "stage=ppo foreign_logger",
     "stage ppo reports to wandb or tensorboard only", "set report_to: none"),
    ("RM and PPO stages do not support `load_best", "load_best_model_at_end stage=rm,ppo", "", ""),
    ("`reward_model_type` cannot be lora for Freeze/Full", "stage=ppo reward_model_type=lora finetuning_type!=lora",
     "stage ppo with this finetuning_type needs a reward_model_type other than lora", "set reward_model_type: full"),
    ("Cannot use LoRA with GaLore, APOLLO or BAdam", "optimiser finetuning_type=lora",
     "GaLore, APOLLO and BAdam do not go with finetuning_type lora (the default)", "set finetuning_type: full"),
    ("Cannot use GaLore, APOLLO or BAdam together", "optimisers",
     "GaLore, APOLLO and BAdam exclude one another", "keep one"),
    ("GaLore and APOLLO are incompatible with DeepSpeed", "use_galore deepspeed", "", ""),
    ("GaLore and APOLLO are incompatible with DeepSpeed", "use_apollo deepspeed", "", ""),
    ("`use_llama_pro` is only valid for Freeze or LoRA", "use_llama_pro finetuning_type=full", "", ""),
    ("`loraplus_lr_ratio` is only valid for LoRA", "loraplus_lr_ratio finetuning_type!=lora", "", ""),
    ("`use_rslora` is only valid for LoRA", "use_rslora finetuning_type!=lora", "", ""),
    ("`use_dora` is only valid for LoRA", "use_dora finetuning_type!=lora", "", ""),
    ("`pissa_init` is only valid for LoRA", "pissa_init finetuning_type!=lora", "", ""),
    ("Cannot use PiSSA for current training stage", "pissa_init stage=ppo,kto", "", ""),
    ("Cannot use PiSSA for current training stage", "pissa_init stage=dpo pref_loss!=orpo,simpo", "", ""),
    ("to initialize PiSSA for a quantized model", "pissa_init quantization_bit", "", ""),
    ("to initialize PiSSA in DeepSpeed ZeRO-3", "pissa_init zero3", "", ""),
    ("Unsloth is incompatible with DeepSpeed ZeRO-3", "use_unsloth zero3", "", ""),
    ("Adapter is only valid for the LoRA method", "adapter_name_or_path finetuning_type!=lora",
     "adapter_name_or_path needs finetuning_type lora", "set it, or give the merged model as model_name_or_path"),
    (_TEXT_OF_ADAPTERS, "list_of_adapters", "adapter_name_or_path is a list", "write the adapters in one line: a,b"),
    ("Quantization is only compatible with the LoRA method", "quantization_bit finetuning_type!=lora", "", ""),
    ("compatible with the LoRA or OFT method", "quantization_bit finetuning_type!=lora,oft", "", ""),
    ("Cannot resize embedding layers of a quantized", "resize_vocab quantization_bit", "", ""),
    ("Cannot use device map for quantized models", "quantization_device_map=auto do_train",
     "quantization_device_map does not go with a training", "remove it"),
)
# fmt: on


def refusals(
    values: Mapping[str, Any], installation: Installation | None, *, zero3: bool
) -> Iterator[tuple[bool, str, str]]:
    """Say what LLaMA-Factory would refuse at once: whether that is certain, what is true, what to do.

    `zero3` is whether the deepspeed config is one of stage 3. Where the installation cannot be read, only what
    every version refuses is certain.
    """
    values = {**DEFAULTS, **values, "zero3": zero3}
    for words, condition, fact, cure in _RULES:
        says = installation.says(words) if installation else None
        if says is not False and all(_holds(values, term) for term in condition.split()):
            sure = says is True or words == _NO_MODEL
            yield (sure, fact, cure) if fact else (sure, *_does_not_go(condition))


def _holds(values: Mapping[str, Any], term: str) -> bool:
    """Whether one word of a condition holds; a value that cannot be compared makes it false."""
    name, unequal, wanted = term.partition("!=")
    if not unequal:
        name, _, wanted = term.partition("=")
    try:
        if wanted:
            return (str(values.get(name)) in wanted.split(",")) is not bool(unequal)
        key = name.lstrip("!")
        true = _FACTS[key](values) if key in _FACTS else bool(values.get(key))
        return true is not name.startswith("!")
    except (TypeError, ValueError, OverflowError):
        return False


def _does_not_go(condition: str) -> tuple[str, str]:
    first, second = condition.split()[:2]
    name, only, wanted = second.partition("!=")
    if only:
        choice = wanted.replace(",", " or ")
        return f"{first} needs {name} {choice}", f"remove it, or set {name}: {wanted.split(',')[0]}"
    name, _, wanted = second.partition("=")
    other = "DeepSpeed ZeRO-3" if name == "zero3" else f"{name} {wanted.replace(',', ' or ')}".rstrip()
    return f"{first} does not go with {other}", "remove one of the two"
