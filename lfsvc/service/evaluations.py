"""What the end of a training queues: its evaluations, each with a YAML that can be submitted again by hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from lfsvc.config import Config
from lfsvc.errors import InvalidConfig
from lfsvc.files import numbered, read_json, replace_file, write_fresh
from lfsvc.job import Job, State, StepState
from lfsvc.llamafactory import evaluation, settings
from lfsvc.llamafactory.evaluation import Model
from lfsvc.llamafactory.merge import ADAPTER_TYPES, adapters_of, finetuning_type
from lfsvc.service.database import snapshot_name
from lfsvc.service.verdict import Verdict
from lfsvc.task import Command, Task
from lfsvc.wording import is_utf8

# In a folder of results that lfsvc made: which training it belongs to.
OWNER = "lfsvc_run.json"


def is_due(job: Job, verdict: Verdict) -> bool:
    """Whether this end of a job is that of a training to be evaluated: one that was not killed.

    A merge that failed leaves the adapter, which is evaluated on its base.
    """
    if job.task.command is not Command.TRAIN or not job.task.evaluate:
        return False
    if not any(step.name == "train" and step.state is StepState.SUCCEEDED for step in verdict.steps):
        return False
    return verdict.state is State.SUCCEEDED or (verdict.state is State.FAILED and verdict.failed_step == "merge")


def read_template(path: str) -> tuple[bytes, dict[str, Any]]:
    """Read a template of the user's: its bytes and its values.

    Raises:
        InvalidConfig: it cannot be used; the message says which and why.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(settings.MAX_YAML_BYTES)
        values = settings.parse(data, path)
    except OSError as error:
        raise InvalidConfig(f"the evaluation template {path} cannot be read: {error.strerror}") from error
    except InvalidConfig as error:
        raise InvalidConfig(f"the evaluation template cannot be used: {error}") from error
    if values.get("do_train"):
        raise InvalidConfig(f"the evaluation template {path} has do_train: true, so it is no evaluation")
    if not evaluation.kind_of(values):
        raise InvalidConfig(
            f"the evaluation template {path} has none of do_eval, do_predict and task, so it evaluates nothing"
        )
    return data, values


def no_evaluation(
    values: Mapping[str, Any], templates: tuple[str, ...], *, output_dir: str, working_directory: str
) -> list[str]:
    """The warnings about the evaluation of a training that is being submitted."""
    reason = evaluation.none_because(values, has_template=bool(templates))
    if not reason and finetuning_type(values) in ADAPTER_TYPES:
        reason = adapters_of(values, output_dir, working_directory)[1]
    if reason:
        return [f"no evaluation will follow: {reason}"]
    problems = []
    for template in templates:
        try:
            read_template(template)
        except InvalidConfig as error:
            problems.append(str(error))
    return problems


def follow_ups(job: Job, folder: str, *, model: str, config: Config) -> tuple[list[tuple[Job, bytes]], list[str]]:
    """Make the evaluations of a training that has ended: jobs with their snapshots, and warnings.

    Args:
        job: the training.
        folder: its folder, with the snapshot.
        model: the merged model, "" where none was made.
        config: the settings in force.
    """
    try:
        with open(os.path.join(folder, snapshot_name(job.task.command)), "rb") as file:
            values = settings.parse(file.read(settings.MAX_YAML_BYTES), job.task.path)
    except (OSError, InvalidConfig) as error:
        return [], [f"no evaluation was queued: {error}"]
    templates = config.evaluation_template
    if not values.get("do_train") or evaluation.none_because(values, has_template=bool(templates)):
        return [], []
    try:
        trained = evaluation.model_of(values, job.output_dir, merged=model, working_directory=job.working_directory)
    except InvalidConfig as error:
        return [], [f"no evaluation was queued: {error}"]
    found: list[tuple[Job, bytes]] = []
    warnings: list[str] = []
    for template in templates or ("",):
        try:
            found.append(_follow_up(job, folder, values, trained, template, config))
        except InvalidConfig as error:
            warnings.append(f"no evaluation was queued: {error}")
        except OSError as error:
            warnings.append(
                f"no evaluation was queued: results_root {config.results_folder} cannot be written to: "
                f"{error.strerror}; mend that and submit the evaluation by hand"
            )
    return found, warnings


def _follow_up(
    job: Job, folder: str, values: Mapping[str, Any], model: Model, template: str, config: Config
) -> tuple[Job, bytes]:
    if not is_utf8(config.results_folder):
        raise InvalidConfig(
            f"results_root {config.results_folder!r} is not UTF-8, which neither YAML nor D-Bus can carry"
        )
    run = os.path.basename(job.output_dir)
    stem = os.path.basename(job.task.path).removesuffix(".yaml")
    if template:
        data, of_template = read_template(template)
        mode = os.path.basename(template).removesuffix(".yaml")
        benchmark = evaluation.kind_of(of_template) == "benchmark"
        output = _output_folder(config.results_folder, f"{run}_{mode}", job, template, fresh=benchmark)
        changes, removed = evaluation.fill_in(of_template, values, model, output)
        data = settings.with_changes(data, changes, removed)
        stem += f"_{mode}"
    else:
        import yaml

        mode, benchmark = "eval", False
        output = _output_folder(config.results_folder, f"{run}_{mode}", job, template, fresh=False)
        derived = evaluation.derive(values, model, output, working_directory=job.working_directory)
        data = yaml.safe_dump(derived, sort_keys=False, allow_unicode=True).encode()
    described = evaluation.Description(run=run, mode=mode, type=finetuning_type(values), model=model.name, path=output)
    title = f"# The evaluation of {job.output_dir}, trained by job {job.id}; written by lfsvc.\n"
    data = title.encode("utf-8", "surrogateescape") + evaluation.header(described) + data
    path = _write(job, folder, f"eval_{stem}_{time.strftime('%Y%m%d_%H%M%S')}", data)
    task = Task(command=Command.EVAL, path=path, devices=job.task.devices, evaluate=False)
    devices = "@" + ",".join(map(str, task.devices)) if task.devices else ""
    queued = Job(
        id=0,
        task=task,
        text=f"eval:{path}{devices}",
        working_directory=job.working_directory,
        output_dir="" if benchmark else output,
        name=job.name,
        environment=job.environment,
        umask=job.umask,
        requeue=job.requeue,
        queued_at=time.time_ns() // 1000,
        parent=job.id,
    )
    return queued, data


def _output_folder(root: str, name: str, job: Job, template: str, *, fresh: bool) -> str:
    """The folder of an evaluation's results: the same for the same training, another for one of the same name.

    `fresh`: for a benchmark, which refuses a folder that is there, so that it is reserved by a file beside.
    """
    owner = {"training": job.output_dir, "template": template}
    os.makedirs(root, exist_ok=True)
    for folder in numbered(os.path.join(root, name)):
        if fresh:
            if not os.path.lexists(folder) and _reserve(os.path.join(root, f".{os.path.basename(folder)}.{OWNER}")):
                return folder
        elif not os.path.lexists(folder):
            os.mkdir(folder)
            os.chmod(folder, 0o777 & ~job.umask)
            replace_file(os.path.join(folder, OWNER), json.dumps(owner).encode(), durable=False)
            return folder
        elif read_json(os.path.join(folder, OWNER)) == owner:
            return folder
    raise AssertionError("numbers do not end")


def _reserve(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True


def _write(job: Job, folder: str, stem: str, data: bytes) -> str:
    """Write a generated YAML into output_dir; where that takes nothing (a full disk), beside the job's documents."""
    try:
        return _write_into(job.output_dir, stem, data, 0o666 & ~job.umask)
    except OSError:
        return _write_into(folder, stem, data, 0o600)


def _write_into(folder: str, stem: str, data: bytes, mode: int) -> str:
    path = write_fresh(folder, stem, ".yaml", data, mode)
    # The service's own umask is stricter than the submitter's.
    os.chmod(path, mode)
    return path
