"""Reading a user's YAML: the keys that decide what lfsvc does with it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lfsvc.errors import InvalidConfig
from lfsvc.files import read_json
from lfsvc.llamafactory.environment import is_enabled

# No config of LLaMA-Factory comes near; a model file given by mistake does.
MAX_YAML_BYTES = 1024 * 1024

# A line as PyYAML counts them, with its end.
_LINE = re.compile(r"[^\r\n\x85\u2028\u2029]*(?:\r\n|[\r\n\x85\u2028\u2029])|[^\r\n\x85\u2028\u2029]+")

_NAME_A_FOLDER = "add a line such as `output_dir: saves/my_run`"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What lfsvc reads out of a training or evaluation YAML."""

    values: dict[str, Any]
    output_dir: str
    """As written; "" for a benchmark, which has a `save_dir` that must not exist before."""

    @property
    def is_benchmark(self) -> bool:
        """Whether this is a config of `llamafactory-cli eval`, which alone takes `task:`."""
        return "task" in self.values


def parse(data: bytes, path: str) -> dict[str, Any]:
    """Parse the YAML of a config; `path` is for the messages.

    Raises:
        InvalidConfig: not YAML, or not a mapping.
    """
    import yaml

    from lfsvc.config import yaml_problem

    try:
        if b"\t" in data:
            # The quick parser takes a tab in places where LLaMA-Factory's refuses it.
            yaml.compose(data, Loader=yaml.SafeLoader)
        # As llamafactory-cli up to 0.9.3 reads it. A BOM is no error there either.
        values = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe loaders
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path} is not valid YAML: {yaml_problem(error)}.", "mend that line") from error
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {_kind(values)}"
        raise InvalidConfig(f"{path} must be a mapping of `key: value` lines; it is {found}.", "give a config")
    return {str(key): value for key, value in values.items()}


def read(data: bytes, path: str) -> Settings:
    """Read the YAML of a training or evaluation; `path` is for the messages.

    Raises:
        InvalidConfig: not YAML, not a mapping, or without a usable folder for its output.
    """
    values = parse(data, path)
    key = "save_dir" if "task" in values else "output_dir"
    folder = values.get(key)
    if folder is None:
        raise InvalidConfig(f"{path} has no {key}.", _NAME_A_FOLDER.replace("output_dir", key))
    if not isinstance(folder, str) or not folder.strip() or "\0" in folder or "\n" in folder:
        raise InvalidConfig(
            f"{path}: {key} must be a folder, not {folder!r}.", _NAME_A_FOLDER.replace("output_dir", key)
        )
    return Settings(values=values, output_dir="" if key == "save_dir" else folder)


def _kind(value: object) -> str:
    return {list: "list", str: "text", int: "number", float: "number", bool: "truth value"}.get(type(value), "value")


def number(value: object) -> float | int | None:
    """A number of a YAML, also one that PyYAML reads as text (`1e-4`, a number from LLaMA-Factory 0.9.4 on)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def with_changes(data: bytes, changes: Mapping[str, Any], removed: Collection[str] = ()) -> bytes:
    """A YAML with other values for some keys of its mapping; all other bytes are the user's own where that goes.

    Raises:
        InvalidConfig: it is not the YAML of a mapping.
    """
    import yaml

    text = data.decode("utf-8-sig", "surrogateescape")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"It is not valid YAML: {error}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InvalidConfig("It is not a mapping of `key: value` lines.")
    kept = {key: value for key, value in (values or {}).items() if key not in changes and key not in removed}
    wanted = {**kept, **changes}
    if root is None or not root.flow_style:
        changed = _replaced(text, root, changes, removed)
        try:
            if yaml.safe_load(changed) == wanted:
                return changed.encode("utf-8", "surrogateescape")
        except (yaml.YAMLError, ValueError, RecursionError):
            pass
    # An indented mapping, an anchor in what was taken out: right matters more than as it was written.
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogateescape")


def _replaced(text: str, root: Any, changes: Mapping[str, Any], removed: Collection[str]) -> str:
    """The lines of a block mapping, without those of some keys and with new ones at the end."""
    import yaml

    lines = [line for line in _LINE.findall(text) if line.rstrip() != "..."]
    for key, value in reversed(root.value if root is not None else []):
        if key.value in changes or key.value in removed:
            first = key.start_mark.line
            # A block ends where the next key starts, so comments between belong to that one.
            last = value.end_mark.line + (1 if value.end_mark.column else 0)
            while last > first + 1 and lines[last - 1].strip()[:1] in ("", "#"):
                last -= 1
            del lines[first : max(last, first + 1)]
    body = "".join(lines)
    if body and not body.endswith("\n"):
        body += "\n"
    return body + str(yaml.safe_dump(dict(changes), sort_keys=False, allow_unicode=True))


def is_zero3(path: str) -> bool:
    """Whether a deepspeed config is ZeRO-3, the only one under which LLaMA-Factory evaluates."""
    config = read_json(path)
    try:
        return bool(config["zero_optimization"]["stage"] == 3)
    except (LookupError, TypeError):
        return False


def torchrun_conflict(settings: Settings, environment: Mapping[str, str]) -> str:
    """Say which setting cannot run under torchrun, as a warning with its cure; "" where all can.

    Source: tried with LLaMA-Factory 0.9.3: layer-wise GaLore and BAdam fail even with one process.
    """
    if not is_enabled(environment, "FORCE_TORCHRUN", "1"):
        return ""
    values = settings.values
    conflict = ""
    if values.get("use_galore") and values.get("galore_layerwise"):
        conflict = "galore_layerwise"
    elif values.get("use_apollo") and values.get("apollo_layerwise"):
        conflict = "apollo_layerwise"
    elif values.get("use_badam") and str(values.get("badam_mode", "layer")) == "layer":
        conflict = "use_badam"
    elif is_enabled(environment, "USE_RAY"):
        conflict = "USE_RAY=1"
    elif is_enabled(environment, "USE_KT"):
        conflict = "USE_KT=1"
    if not conflict:
        return ""
    return (
        f"{conflict} does not go with FORCE_TORCHRUN=1, which jobs have by default: submit with --env FORCE_TORCHRUN=0"
    )


def resolve_folder(folder: str, working_directory: str) -> str:
    """Give an output_dir as the absolute path that LLaMA-Factory will use.

    `~` is the home there: tried with 0.9.3, whose TrainingArguments expand it in output_dir alone.
    """
    return os.path.normpath(os.path.join(working_directory, os.path.expanduser(folder)))
