"""What can be said about a YAML at submit: what is sure to fail is refused, what is unusual is a warning.

Looks at files and imports nothing of LLaMA-Factory. Where the installed version can be read, a refusal
needs that version's own check in its source: a fork that dropped one is not held to it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfsvc.llamafactory.environment import is_enabled
from lfsvc.llamafactory.installation import DEFAULTS, Installation, evaluates, refusals
from lfsvc.llamafactory.settings import Settings, is_zero3, resolve_folder

# Source: constants.py of LLaMA-Factory 0.9.3 and get_last_checkpoint of transformers.
_WEIGHTS = re.compile(r"adapter_model\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)(\.index\.json)?")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_DATA_ENDINGS = ("arrow", "csv", "json", "jsonl", "parquet", "txt")
_NOT_LOCAL = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# Source: tried one by one with 0.9.3: each as text ends a training. (adam_epsilon does only with some optimisers.)
_FATAL_AS_TEXT = re.compile(
    "gradient_accumulation_steps|learning_rate|logging_steps|max_grad_norm|max_steps|num_train_epochs|"
    "per_device_train_batch_size|save_steps|seed|val_size|warmup_ratio|weight_decay"
)
_MODELS = ("model_name_or_path", "ref_model", "reward_model")
_ADAPTERS = ("adapter_name_or_path", "ref_model_adapters", "reward_model_adapters")


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A queued or running job that comes before this one."""

    job_id: int
    output_dir: str
    """Absolute; "" for a script, which may make or remove anything."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong or odd."""

    sentence: str
    hint: str
    """What to do about it; "" for a warning, whose sentence says it."""
    refuse: bool


_Said = tuple[bool, str, str]  # whether it is sure to fail, what is true, what to do


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the checks look at."""

    data: bytes
    settings: Settings
    path: str
    evaluation: bool
    folder: str
    environment: Mapping[str, str]
    devices: tuple[int, ...]
    ahead: Sequence[Ahead]
    installation: Installation | None

    def __getitem__(self, key: str) -> Any:
        return self.settings.values.get(key, DEFAULTS.get(key))

    def text(self, key: str) -> str:
        value = self[key]
        return value if isinstance(value, str) else ""

    def names(self, key: str) -> list[str]:
        """A value of several names, as LLaMA-Factory splits it; what is not text is left out."""
        value = self[key]
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
        return [part.strip() for part in parts if isinstance(part, str)]

    def file(self, name: str) -> str:
        """A path of the YAML, taken from the working directory; `~` is expanded in output_dir only."""
        return os.path.normpath(os.path.join(self.folder, name))

    def enabled(self, variable: str, default: str = "0") -> bool:
        return is_enabled(self.environment, variable, default)

    @property
    def name(self) -> str:
        return self.installation.name if self.installation else "LLaMA-Factory"

    @property
    def train(self) -> bool:
        return bool(self["do_train"])

    @property
    def resumes(self) -> bool:
        """Whether LLaMA-Factory resumes such a training at all."""
        return self.train and not (self["stage"] in ("rm", "ppo") and self["finetuning_type"] in ("full", "freeze"))

    def has(self, words: str) -> bool:
        """Whether a check that every known version has is in the installed one; true where that cannot be read."""
        return self.installation is None or self.installation.says(words) is not False

    def misses(self, words: str) -> bool:
        """Whether a missing file is fatal: the check is there, and no job ahead can make the file."""
        return not self.ahead and self.has(words)


def findings(
    data: bytes,
    settings: Settings,
    *,
    path: str,
    evaluation: bool,
    working_directory: str,
    environment: Mapping[str, str],
    devices: tuple[int, ...],
    ahead: Sequence[Ahead],
    installation: Installation | None,
) -> list[Finding]:
    """Say what is wrong or odd about a YAML, refusals first.

    `evaluation` is whether it came with the prefix eval:, `environment` the job's. Raises nothing: what cannot
    be told is left unsaid.
    """
    job = _Job(
        data=data, settings=settings, path=path, evaluation=evaluation, folder=working_directory,
        environment=environment, devices=devices, ahead=ahead, installation=installation,
    )  # fmt: skip
    other_parser = job.enabled("USE_MCA") or job.enabled("USE_V1")  # each has one of its own
    found: list[Finding] = []
    for check in _OF_BENCHMARKS if settings.is_benchmark else _OF_TRAININGS:
        # A program whose source cannot be read may take what LLaMA-Factory does not.
        certain = not other_parser and (installation is not None or check in (_prefix, _data))
        try:
            for sure, fact, cure in check(job):
                refuse = sure and certain
                sentence = f"{path}: {fact}." if refuse else f"{fact}; {cure}" if cure else fact
                found.append(Finding(sentence=_line(sentence), hint=_line(cure) if refuse else "", refuse=refuse))
        except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError):
            # A list where text is expected, a path with NUL: a check that cannot be made is no reason to refuse.
            continue
    return sorted(found, key=lambda finding: not finding.refuse)


def _line(text: str) -> str:
    """A text in one line, whatever names of files and keys brought into it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _short(value: object) -> str:
    return str(value) if len(str(value)) <= 80 else f"{str(value)[:77]}..."


def _like(word: str, known: Sequence[str]) -> str:
    """The known word that was perhaps meant, as a question."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.81) if len(word) <= 80 and len(known) <= 500 else ()
    return "".join(f" (did you mean {name}?)" for name in near)


def _prefix(job: _Job) -> Iterator[_Said]:
    if job.evaluation and job.train:
        yield True, "it has `do_train: true`, so it is a training", f"submit train:{job.path}, or set do_train: false"
    elif not (job.train or evaluates(job.settings.values) or job["do_predict"] or job["tokenized_path"]):
        # With a tokenized_path it would prepare the data.
        cure = f"set {'do_eval' if job.evaluation else 'do_train'}: true"
        sure = job.installation is not None
        yield sure, "none of do_train, do_eval and do_predict is true, so LLaMA-Factory would do nothing", cure


def _benchmark(job: _Job) -> Iterator[_Said]:
    """Source: evaluation_args.py and evaluator.py of 0.9.3, launcher.py of 0.9.4."""
    works = job.installation.benchmarks if job.installation else None
    cure = "evaluate with do_eval: true and an eval_dataset instead of `task:`"
    if works is False:
        yield True, f"{job.name} no longer has `llamafactory-cli eval`, which alone takes `task:`", cure
    elif works is None:
        yield False, "`task:` needs `llamafactory-cli eval`, which LLaMA-Factory dropped with 0.9.4", cure
    if job["model_name_or_path"] is None:
        yield True, "model_name_or_path is missing", "name the model to evaluate"
    save_dir, task = job.text("save_dir"), job.text("task")
    if save_dir and os.path.exists(job.file(save_dir)):
        sure = job.has("`save_dir` already exists") and all(other.output_dir for other in job.ahead)
        yield sure, f"save_dir {save_dir} exists, where LLaMA-Factory takes a new one only", "name another or move it"
    if task and "_" not in task:
        yield False, f"task {_short(task)} does not name a split", f"write it as {_short(task)}_test, say"
    if not os.path.isdir(job.file(job.text("task_dir"))):
        yield False, f"task_dir {_short(job['task_dir'])} is not in {job.folder}", "give the path of that folder"


def _at_once(job: _Job) -> Iterator[_Said]:
    zero3 = is_zero3(job.file(job.text("deepspeed")))
    yield from refusals(job.settings.values, job.installation, zero3=zero3)


def _choices(job: _Job) -> Iterator[_Said]:
    for key in ("eval_strategy", "logging_strategy", "save_strategy"):
        if job.settings.values.get(key, "no") in (None, False):
            fact = f"{key} is read as {'nothing' if job[key] is None else 'false'}, which is none of its values"
            yield True, fact, f'write {key}: "no", in quotes'
    for key in ("finetuning_type", "stage"):
        kind = (job.installation.keys or {}).get(key, "") if job.installation else ""
        known = re.findall(r"""["'](\w+)["']""", kind) if "Literal" in kind else []
        # A fork may know a word in its checks and have forgotten this list.
        if known and job.text(key) and job[key] not in known and not job.has(f'"{job[key]}"'):
            yield True, f"{key} {_short(job[key])} is none that {job.name} has", f"choose one of {', '.join(known)}"


def _yaml(job: _Job) -> Iterator[_Said]:
    import yaml

    plain = job.installation.plain_yaml if job.installation else None
    kinds = (job.installation.keys if job.installation else None) or {}
    node = yaml.compose(job.data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    quoted: dict[str, bool] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in quoted and key.tag != "tag:yaml.org,2002:merge":
            if plain is False:
                yield True, f"{_short(key.value)} is given twice, which {job.name} refuses", "remove one of them"
            else:
                later = "" if plain else " up to LLaMA-Factory 0.9.3, while later ones refuse the file"
                yield False, f"{_short(key.value)} is given twice: the last one counts{later}", "remove the other"
        quoted[key.value] = isinstance(value, yaml.ScalarNode) and bool(value.style)
    for name, value in job.settings.values.items():
        fatal, in_quotes = _FATAL_AS_TEXT.fullmatch(name) is not None, quoted.get(name, False)
        kind = kinds.get(name, "float" if fatal else "")
        if not isinstance(value, str) or "str" in kind or not re.search(r"\b(float|int)\b", kind):
            continue
        if not _NUMBER.fullmatch(value.strip()) or (plain is False and not in_quotes):
            continue
        reader = job.name if plain or in_quotes else "LLaMA-Factory up to 0.9.3"
        sure = job.train and fatal and (plain is True or in_quotes)
        yield sure, f"{name}: {_short(value)} is text to {reader}, not a number", f"write {_as_number(value, kind)}"


def _as_number(text: str, kind: str) -> str:
    """Write a number so that every version reads it as one: YAML 1.1 wants a point and the sign of the exponent."""
    value = float(text)
    if re.search(r"\bint\b", kind) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    mantissa, exponential, exponent = text.strip().lower().partition("e")
    mantissa += "" if "." in mantissa else ".0"
    return f"{mantissa}e{exponent if exponent[:1] in '+-' else f'+{exponent}'}" if exponential else mantissa


def _output(job: _Job) -> Iterator[_Said]:
    folder = resolve_folder(job.settings.output_dir, job.folder)
    real = os.path.realpath(folder)
    shared = [f"job {job_id}" for other, job_id in _folders_ahead(job) if other == real]
    if shared:
        yield False, f"output_dir {folder} is also that of {', '.join(shared[:3])}, ahead of it", "give each its own"
    if not job.resumes or job["overwrite_output_dir"] or job["resume_from_checkpoint"] is not None:
        return
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if any(_CHECKPOINT.fullmatch(name) and os.path.isdir(os.path.join(folder, name)) for name in names):
        if "trainer_state.json" in names and _is_at_its_end(job, folder):
            fact = (
                f"output_dir {folder} holds a finished run of this training, which LLaMA-Factory resumes at its end: "
            )
            fact += "it trains no further and reports success and a false loss"
            yield False, fact, "set overwrite_output_dir: true to train from the start, or name a new output_dir"
    elif any(_WEIGHTS.fullmatch(name) and os.path.isfile(os.path.join(folder, name)) for name in names):
        may_change = shared or any(not other.output_dir for other in job.ahead)
        yield (
            job.has("Output directory already exists and is not empty") and not may_change,
            f"output_dir {folder} holds the final weights of a run and no checkpoint, which LLaMA-Factory refuses",
            "name a new output_dir, or move that folder away, or set overwrite_output_dir: true to train over it",
        )


def _is_at_its_end(job: _Job, folder: str) -> bool:
    """Whether a finished run came as far as this config goes: who wants to go on with it raises that end."""
    with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
        state = json.load(file)
    end, reached = ("max_steps", "global_step") if job["max_steps"] > 0 else ("num_train_epochs", "num_train_epochs")
    return bool(math.ceil(job[end]) <= state[reached])


def _data(job: _Job) -> Iterator[_Said]:
    """Source: data/parser.py and data/loader.py of 0.9.3 and 0.9.4."""
    tokenized, folder = job.text("tokenized_path"), job.text("dataset_dir")
    if tokenized and os.path.isdir(job.file(tokenized)) and os.listdir(job.file(tokenized)):
        return
    names = dict.fromkeys(job.names("dataset") + job.names("eval_dataset"))
    if not names or not folder or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    path = os.path.join(job.file(folder), "dataset_info.json")
    try:
        with open(path, encoding="utf-8") as file:
            known = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        cure = "" if os.path.isabs(folder) else f"submit from the folder that has {folder}, or "
        sure = job.installation is not None and job.misses("Cannot open")
        yield sure, f"{path} is not there", f"{cure}give dataset_dir as an absolute path"
        return
    except json.JSONDecodeError as error:
        yield job.misses("Cannot open"), f"{path} is not valid JSON: {error}", "mend it"
        return
    for name in names:
        if name not in known:
            sure = job.misses("Undefined dataset")
            yield sure, f"data set {_short(name)} is not in {path}{_like(name, list(known))}", "add it, or correct it"
        elif isinstance(known[name], dict):
            yield from _data_set(job, name, known[name], os.path.dirname(path))


def _data_set(job: _Job, name: str, entry: Mapping[str, Any], folder: str) -> Iterator[_Said]:
    ranking, stage = entry.get("ranking", False), job["stage"]
    if isinstance(ranking, bool) and ranking is not (stage in ("rm", "dpo")):
        has = "is for preferences (`ranking: true`)" if ranking else "has no `ranking: true`"
        sure = job.misses("The dataset is not applicable in the current training stage")
        yield sure, f"data set {name} {has}, so it does not fit stage {stage}", "choose another data set or stage"
    file_name = entry.get("file_name")
    if any(key in entry for key in _NOT_LOCAL) or not isinstance(file_name, str):
        return
    path = os.path.join(folder, file_name)
    files = os.listdir(path) if os.path.isdir(path) else [path]
    endings = {os.path.splitext(part)[1][1:] for part in files}
    if not files or not os.path.exists(path):
        sure = job.misses("File {local_path} not found")
        yield sure, f"data set {name} has no file at {path}", "put it there, or correct file_name in dataset_info.json"
    elif len(endings) > 1 or not endings.issubset(_DATA_ENDINGS):
        yield False, f"data set {name} must be files of one kind out of {', '.join(_DATA_ENDINGS)}", f"look at {path}"


def _files(job: _Job) -> Iterator[_Said]:
    deepspeed, resume = job.text("deepspeed"), job.text("resume_from_checkpoint")
    if deepspeed and not deepspeed.lstrip().startswith("{") and not os.path.exists(job.file(deepspeed)):
        # JSON in base64 is taken as well, which has neither a point nor a slash.
        sure = job.misses("") and ("." in deepspeed or "/" in deepspeed)
        yield sure, f"the deepspeed config {job.file(deepspeed)} is not there", "correct the path"
    if deepspeed and not job.enabled("FORCE_TORCHRUN", "1") and len(job.devices) < 2:
        yield False, "deepspeed needs FORCE_TORCHRUN=1", "submit without --env FORCE_TORCHRUN"
    if resume and job.resumes and not os.path.isdir(job.file(resume)):
        yield job.misses(""), f"resume_from_checkpoint {job.file(resume)} is not there", "correct it"


def _models(job: _Job) -> Iterator[_Said]:
    given = [(key, job.text(key)) for key in _MODELS if key != "reward_model" or job["reward_model_type"] != "api"]
    given += [(key, name) for key in _ADAPTERS for name in job.names(key)]
    for key, name in given:
        if os.path.exists(job.file(name)):
            continue
        real = os.path.realpath(job.file(name)) + "/"
        maker = next((job_id for other, job_id in _folders_ahead(job) if real.startswith(f"{other}/")), None)
        fact = f"{key} {_short(name)} is not there"
        if maker is not None:
            yield False, f"{fact} yet: job {maker}, ahead of it, will have to make it", ""
        elif name.startswith("~"):
            yield False, f"{fact}: LLaMA-Factory does not expand `~` in it", "write the path out"
        elif name.startswith(("/", ".")) or name.count("/") > 1 or os.path.isdir(job.file(name.split("/")[0])):
            yield False, fact, "correct the path, unless it will be there by then"


def _folders_ahead(job: _Job) -> list[tuple[str, int]]:
    """The real output_dir of each job ahead, and its id. Thousands may wait: parents, which they share, are kept."""
    parents: dict[str, str] = {}
    found = []
    for other in job.ahead:
        if other.output_dir:
            parent, name = os.path.split(other.output_dir)
            parents[parent] = parents.get(parent) or os.path.realpath(parent)
            path = os.path.join(parents[parent], name)
            found.append((os.path.realpath(path) if os.path.islink(path) else path, other.job_id))
    return found


def _unknown(job: _Job) -> Iterator[_Said]:
    known = job.installation
    keys = (known.benchmark_keys if job.settings.is_benchmark else known.keys) if known else None
    unknown = [key for key in job.settings.values if keys and key not in keys]
    if keys and unknown and not any(map(job.enabled, ("ALLOW_EXTRA_ARGS", "USE_MCA", "USE_V1"))):
        shown = ", ".join(_short(key) + _like(key, list(keys)) for key in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        yield False, f"{job.name} refuses keys that it does not know: {shown}{more}", "correct or remove them"
    template, templates = job.text("template"), known.templates if known else None
    if template and templates and template not in templates:
        like = _like(template, sorted(templates))
        yield False, f"{job.name} has no template {_short(template)}{like}", "correct it, unless something else adds it"
    if not job.train and job["template"] is None and job["stage"] != "pt":
        yield False, "it has no template: that of the tokenizer is taken, or none", "name that of its training"


def _devices(job: _Job) -> Iterator[_Said]:
    processes, count = job.environment.get("NPROC_PER_NODE", ""), len(job.devices)
    if count and processes.isdecimal() and int(processes) != count:
        listed = ",".join(map(str, job.devices))
        yield False, f"NPROC_PER_NODE={processes} does not fit @{listed}", f"give --env NPROC_PER_NODE={count}"


_OF_TRAININGS = (_prefix, _at_once, _choices, _yaml, _output, _data, _files, _models, _unknown, _devices)
_OF_BENCHMARKS: tuple[Callable[[_Job], Iterator[_Said]], ...] = (_benchmark, _yaml, _models, _unknown, _devices)
