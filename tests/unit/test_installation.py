"""Reading an installed LLaMA-Factory without importing it.

LFSVC_ORACLE names the python of an environment with the real one; what the scan of its source text finds must
then be what its own classes say (tried with 0.9.3 as installed, and with the source packages of 0.9.4 and 0.9.5:
328, 350 and 361 keys of `train`, not one too many or too few).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from lfsvc.llamafactory import installation
from lfsvc.llamafactory.installation import find

ORACLE = os.environ.get("LFSVC_ORACLE", "")

PARSER = """\
_TRAIN_ARGS = [ModelArguments, TrainingArguments]
_EVAL_ARGS = [ModelArguments, EvaluationArguments]
def read_args():
    return yaml.safe_load(text)
"""
MODEL = '''\
@dataclass
class BaseArguments:
    r"""Words: of a docstring.

    output: not a key
    """

    model: Optional[str] = field(
        default=None,
        metadata={"help": "A model: any"},
    )
    dtype: Optional[str] = field(
        default=None,
        init=False,
        metadata={"help": "Derived."},
    )

    def __post_init__(self):
        other: int = 1
        if self.model is None:
            raise ValueError("Please provide `model`.")
        # raise ValueError("An old check.")


@dataclass
class ModelArguments(
    BaseArguments,
    QuantArguments,
):
    trust: bool = False


@dataclass
class QuantArguments:
    stage: Literal["pt", "sft"] = field(default="sft")
'''
TRAINING = """\
from transformers import Seq2SeqTrainingArguments
if mca:
    from mcore import Seq2SeqTrainingArguments as McaArguments
    Base = McaArguments
else:
    Base = Seq2SeqTrainingArguments

@dataclass
class TrainingArguments(Base):
    ray: int = 1
"""
TEMPLATE = '''\
def register_template(name):
    r"""For example:

    register_template(
        name="custom",
    )
    """


register_template(
    name="qwen3",
    slots=["x"],
)
register_template("llama3")
'''
FILES = {
    "__init__.py": "raise SystemExit('imported')\n",
    "extras/env.py": 'VERSION = "0.9.3"\n',
    "cli.py": 'COMMAND_MAP = {"eval": run_eval}\n',
    "hparams/parser.py": PARSER,
    "hparams/model_args.py": MODEL,
    "hparams/training_args.py": TRAINING,
    "hparams/evaluation_args.py": "@dataclass\nclass EvaluationArguments:\n    task: str = field()\n",
    "data/template.py": TEMPLATE,
}
TRANSFORMERS = {
    "training_args.py": "@dataclass\nclass TrainingArguments:\n    output_dir: str = field(default=None)\n",
    "training_args_seq2seq.py": "@dataclass\nclass Seq2SeqTrainingArguments(TrainingArguments):\n    beams: int = 1\n",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def program(prefix: Path) -> str:
    """A console script of a virtual environment, as pip writes it."""
    path = prefix / "bin/llamafactory-cli"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{prefix}/bin/python\nfrom llamafactory.cli import main\n")
    return str(path)


def packages(prefix: Path) -> Path:
    return prefix / "lib/python3.11/site-packages"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(packages(tmp_path) / "llamafactory", FILES)
    write(packages(tmp_path) / "transformers", TRANSFORMERS)
    program(tmp_path)
    return tmp_path


def test_an_installation_is_read_without_running_it(prefix: Path) -> None:
    found = find(program(prefix), {})
    assert found is not None
    assert (found.version, found.name) == ("0.9.3", "LLaMA-Factory 0.9.3")
    assert found.keys == {
        "trust": "bool",
        "model": "Optional[str]",
        "stage": 'Literal["pt", "sft"]',
        "ray": "int",
        "output_dir": "str",
        "beams": "int",
    }
    assert found.benchmark_keys is not None and set(found.benchmark_keys) == {"trust", "model", "stage", "task"}
    assert found.templates == frozenset({"qwen3", "llama3"})
    assert (found.benchmarks, found.plain_yaml) == (True, True)
    assert found.says("Please provide `model`.") is True


def test_a_check_that_a_fork_commented_out_is_not_there(prefix: Path) -> None:
    found = find(program(prefix), {})
    assert found is not None and found.says("An old check.") is False


def test_a_newer_version_is_told_by_what_it_does(prefix: Path) -> None:
    newer = {
        "hparams/parser.py": PARSER.replace("yaml.safe_load(text)", "OmegaConf.load(path)"),
        "cli.py": "launch()\n",
        "launcher.py": 'raise NotImplementedError("Evaluation will be deprecated in the future.")\n',
    }
    write(packages(prefix) / "llamafactory", newer)
    found = find(program(prefix), {})
    assert found is not None and (found.benchmarks, found.plain_yaml) == (False, False)


@pytest.mark.parametrize(
    ("files", "unknown"),
    [
        ({"hparams/model_args.py": MODEL.replace("QuantArguments,", "elsewhere.Arguments,")}, "keys"),
        ({"hparams/parser.py": "_TRAIN_ARGS = load()\n"}, "keys"),
        ({"data/template.py": TEMPLATE + "register_template(name=own)\n"}, "templates"),
        ({"data/template.py": ""}, "templates"),
        ({"cli.py": "main()\n"}, "benchmarks"),
        ({"hparams/parser.py": "read()\n"}, "plain_yaml"),
    ],
)
def test_what_cannot_be_seen_whole_is_unknown(files: dict[str, str], unknown: str, prefix: Path) -> None:
    write(packages(prefix) / "llamafactory", files)
    found = find(program(prefix), {})
    assert found is not None and getattr(found, unknown) is None


def test_keys_are_unknown_without_transformers(prefix: Path) -> None:
    (packages(prefix) / "transformers/training_args.py").unlink()
    found = find(program(prefix), {})
    assert found is not None and found.keys is None and found.benchmark_keys is not None


def test_a_link_to_the_program_leads_to_its_installation(
    prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    link = tmp_path_factory.mktemp("bin") / "llamafactory-cli"
    link.symlink_to(program(prefix))
    assert find(str(link), {}) is find(program(prefix), {}) is not None


def test_an_editable_install_is_found_where_its_source_is(tmp_path: Path) -> None:
    write(tmp_path / "a fork/src/llamafactory", FILES)
    write(packages(tmp_path) / "transformers", TRANSFORMERS)
    info = {"url": f"file://{tmp_path}/a%20fork", "dir_info": {"editable": True}}
    write(packages(tmp_path) / "llamafactory-0.9.3.dist-info", {"direct_url.json": json.dumps(info)})
    found = find(program(tmp_path), {})
    assert found is not None and found.root == f"{tmp_path}/a fork/src/llamafactory"
    assert found.keys is not None and "beams" in found.keys


def test_nothing_is_guessed_where_no_or_another_installation_may_run(prefix: Path, tmp_path: Path) -> None:
    assert find(program(tmp_path / "empty"), {}) is None
    assert find("/nonexistent/llamafactory-cli", {}) is None
    write(tmp_path / "path/llamafactory", {"__init__.py": ""})
    assert find(program(prefix), {"PYTHONPATH": f"/x:{tmp_path}/path"}) is None
    assert find(program(prefix), {"PYTHONPATH": "/x"}) is not None
    write(prefix / "lib/python3.12/site-packages/llamafactory", FILES)
    assert find(program(prefix), {}) is None


def test_an_unchanged_installation_is_read_once_and_a_changed_one_again(prefix: Path) -> None:
    first = find(program(prefix), {})
    assert find(program(prefix), {}) is first
    template = packages(prefix) / "llamafactory/data/template.py"
    template.write_text(TEMPLATE + 'register_template(name="mine")\n')
    os.utime(template, ns=(1, 1))
    second = find(program(prefix), {})
    assert second is not None and second.templates == frozenset({"qwen3", "llama3", "mine"})


def test_every_rule_is_a_row_that_can_be_read() -> None:
    for words, condition, fact, cure in installation._RULES:
        assert words and condition
        assert bool(fact) is bool(cure)
        assert fact or len(condition.split()) >= 2


TRUTH = """
import dataclasses, json
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import parser
def keys(table):
    return sorted({field.name for kind in table for field in dataclasses.fields(kind) if field.init})
print(json.dumps([keys(parser._TRAIN_ARGS), keys(parser._EVAL_ARGS), sorted(TEMPLATES)]))
"""


@pytest.mark.skipif(not ORACLE, reason="LFSVC_ORACLE names no python with LLaMA-Factory 0.9.3")
def test_the_real_installation_knows_what_was_found_by_reading_it() -> None:
    done = subprocess.run([ORACLE, "-c", TRUTH], capture_output=True, text=True, check=True)
    found = find(os.path.join(os.path.dirname(ORACLE), "llamafactory-cli"), {})
    assert found is not None and found.keys is not None and found.benchmark_keys is not None
    read = [sorted(found.keys), sorted(found.benchmark_keys), sorted(found.templates or ())]
    assert read == json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not ORACLE, reason="LFSVC_ORACLE names no python with LLaMA-Factory 0.9.3")
def test_the_words_of_every_rule_but_two_of_later_versions_are_in_the_real_source() -> None:
    found = find(os.path.join(os.path.dirname(ORACLE), "llamafactory-cli"), {})
    assert found is not None
    newer = {"Please make sure eval_dataset be provided", "compatible with the LoRA or OFT method"}
    assert {words for words, *_ in installation._RULES if not found.says(words)} == newer
