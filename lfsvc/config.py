"""config.yaml → Config. A field of Config is the whole of a setting: key, default, check and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfsvc import paths
from lfsvc.errors import InvalidConfig

if TYPE_CHECKING:
    from lfsvc.notify import Target

Check = Callable[[object], Any]


class _Refused(Exception):
    """What a value should have been, to go after "must be"."""


class _Wrong(Exception):
    """A whole sentence about a value that must not be shown."""


def _absolute_path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise _Refused("an absolute path")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Refused("true or false")
    return value


def _seconds(low: float, high: float) -> Check:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _Refused(f"a number of seconds from {low:g} to {high:g}")
        return float(value)

    return check


def _paths(value: object) -> tuple[str, ...]:
    """One file or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path.startswith("/") and path.endswith(".yaml") for path in values):
        raise _Refused("an absolute path of a .yaml file, or a list of such paths")
    return tuple(values)


def _one_of(*words: str) -> Check:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise _Refused("one of " + ", ".join(words))
        return value

    return check


def _notify(value: object) -> tuple[Target, ...]:
    # Imported here: most readers of the config have no `notify:`.
    from lfsvc.notify import parse_notify

    try:
        return parse_notify(value)
    except ValueError as error:
        raise _Wrong(str(error)) from None


def _setting(default: Any, check: Check, help_text: str, *, section: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"check": check, "help": help_text, "section": section})


def key_of(field: dataclasses.Field[Any]) -> str:
    """How config.yaml and messages call a setting: `kill_grace`, `merge.device`."""
    section = field.metadata["section"]
    return f"{section}.{field.name.removeprefix(section + '_')}" if section else field.name


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings. A path that is "" means the default that its help names."""

    state_dir: str = _setting(
        "", _absolute_path, "queue and job folders, on a local disk (default $XDG_STATE_HOME/lfsvc)"
    )
    working_directory: str = _setting(
        "", _absolute_path, "where jobs run whose submitter names no folder (default: the folder of the file)"
    )
    kill_grace: float = _setting(10.0, _seconds(0, 3600), "seconds from SIGTERM to SIGKILL when a job is killed")
    requeue: bool = _setting(True, _boolean, "queue a YAML job again, once, that the machine's end interrupted")
    launcher: str = _setting(
        "auto",
        _one_of("auto", "systemd", "process"),
        "systemd: a unit for each job; process: without systemd",
    )

    results_root: str = _setting(
        "", _absolute_path, "where evaluations and summary.csv go (default $XDG_DATA_HOME/lfsvc/eval_results)"
    )
    merge_enabled: bool = _setting(
        True, _boolean, "merge a LoRA adapter into its base model after a training", section="merge"
    )
    merge_device: str = _setting(
        "cpu", _one_of("cpu", "auto"), "cpu: in host memory; auto: on the job's devices", section="merge"
    )
    merge_delete_checkpoints: bool = _setting(
        False, _boolean, "delete checkpoint-* of a training once its merged model is complete", section="merge"
    )
    evaluation_template: tuple[str, ...] = _setting(
        (),
        _paths,
        "evaluation YAML(s) that every training is evaluated with (default: its own data)",
        section="evaluation",
    )
    evaluation_position: str = _setting(
        "back", _one_of("back", "front"), "where a training's evaluation joins the queue", section="evaluation"
    )

    notify: tuple[Target, ...] = _setting(
        (), _notify, "whom to tell when jobs end: a list of entries with desktop, command or webhook"
    )

    @property
    def state_folder(self) -> str:
        """The state folder in force."""
        return self.state_dir or paths.state_dir()

    @property
    def results_folder(self) -> str:
        """The folder of the evaluations in force."""
        return self.results_root or paths.results_root()


def parse(text: bytes, path: str) -> Config:
    """Parse the content of config.yaml; an empty one gives the defaults.

    Raises:
        InvalidConfig: names the file, the key or line, and what would be right.
    """
    import yaml

    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InvalidConfig(f"{path} is not valid YAML: {yaml_problem(error)}.", "mend it, or move it away") from error
    if document is None:
        return Config()
    if not isinstance(document, dict):
        raise InvalidConfig(f"{path} must hold `key: value` lines.", "mend it, or move it away")
    settings = {key_of(field): field for field in dataclasses.fields(Config)}
    sections = {field.metadata["section"] for field in settings.values()}
    values: dict[str, Any] = {}
    for key, value in _flat(document, sections):
        field = settings.get(key) if isinstance(key, str) else None
        if field is None:
            raise InvalidConfig(f"{path}: the key {key!r} is unknown.", "the keys are " + ", ".join(settings))
        try:
            values[field.name] = field.metadata["check"](value)
        except _Wrong as wrong:
            raise InvalidConfig(f"{path}: {wrong}.", "mend the entry; `lfsvc notify test` tries it") from None
        except _Refused as refused:
            raise InvalidConfig(f"{path}: {key} must be {refused}, not {value!r}.", "mend the line") from None
    return Config(**values)


def _flat(document: dict[object, object], sections: set[str]) -> Iterator[tuple[object, object]]:
    """The keys with their values; those of a section as `section.key`."""
    for key, value in document.items():
        if key in sections and isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield key, value


def load(path: str = "") -> Config:
    """Read config.yaml; a missing one gives the defaults.

    Raises:
        InvalidConfig: it cannot be read or does not hold.
    """
    path = path or paths.config_file()
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}.", "mend it, or move it away") from error
    return parse(text, path)


def yaml_problem(error: Exception) -> str:
    """Put what a YAML parser complains of into one line, with the line's number where it is known."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem
