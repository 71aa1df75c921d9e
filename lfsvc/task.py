"""The task grammar: `[train:|eval:]PATH.yaml[@D[,D…]][#no_eval]` or `PATH.sh` → Task.

Pure: looks at the text alone. Whether the file is there is the business of the checks at submit.
Suffixes are read from the right, so `@` and `#` may stand in folder names.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import NamedTuple

from lfsvc.errors import InvalidTask
from lfsvc.wording import is_utf8

# Device numbers beyond this are a typing mistake on any machine there is.
MAX_DEVICE = 4095
# PATH_MAX of Linux, with room for prefix, devices and flag.
MAX_TASK_BYTES = 8192

GRAMMAR = "[train:|eval:]PATH.yaml[@D[,D...]][#no_eval], or PATH.sh"


class Command(str, Enum):
    """What a job does; the word that users type and read."""

    TRAIN = "train"
    EVAL = "eval"
    SHELL = "shell"


# A NamedTuple, not a dataclass: the client imports this module, and dataclasses would cost it 5 ms.
class Task(NamedTuple):
    """A parsed task. `path` is as given: absolute over D-Bus, made absolute by the CLI."""

    command: Command
    path: str
    devices: tuple[int, ...] = ()
    evaluate: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The canonical text of this task; parsing it again gives an equal Task (but for warnings)."""
        if self.command is Command.SHELL:
            return self.path
        devices = "@" + ",".join(map(str, self.devices)) if self.devices else ""
        flag = "#no_eval" if self.command is Command.TRAIN and not self.evaluate else ""
        return f"{self.command.value}:{self.path}{devices}{flag}"


def split(text: str) -> tuple[str, str, str]:
    """Split a task into (prefix, path, suffix) so that the three joined give the text again.

    The prefix is "train:", "eval:" or "". The suffix is what follows the last extension that is
    followed by nothing, `@` or `#`. Where no such extension is found the suffix is empty and the
    path is all the rest: what is wrong with it is then said by `parse`.
    """
    prefix = next((p for p in ("train:", "eval:") if text.startswith(p)), "")
    rest = text[len(prefix) :]
    end = len(rest)
    while end > 0:
        # From the right: the first place where an extension ends is where the suffix begins.
        for extension in (".yaml", ".sh", ".yml"):
            if rest.endswith(extension, 0, end) and (end == len(rest) or rest[end] in "@#"):
                return prefix, rest[:end], rest[end:]
        end -= 1
        if rest[end] == "/":
            break
    return prefix, rest, ""


def make_absolute(text: str, folder: str) -> str:
    """Make the path of a task absolute: relative to `folder`, `~/` being the home.

    Raises:
        InvalidTask: the text begins with a prefix that does not exist.
    """
    prefix, path, suffix = split(text)
    if not prefix:
        _refuse_unknown_prefix(path)
    if path.startswith("~"):
        # `train:~/x.yaml`: the shell expands a tilde only where a word begins.
        path = os.path.expanduser(path)
    if path and not path.startswith("/"):
        path = os.path.join(folder, path.removeprefix("./"))
    return prefix + path + suffix


def parse(text: str) -> Task:
    """Parse a task as it comes over D-Bus.

    Raises:
        InvalidTask: it does not follow the grammar; the message says which part.
    """
    if not text or text.isspace():
        raise InvalidTask("The task is empty.", f"give {GRAMMAR}")
    if "\0" in text or "\n" in text or "\r" in text:
        raise InvalidTask("The task contains a line break or a NUL character, which no file name here may have.")
    if len(os.fsencode(_encodable(text))) > MAX_TASK_BYTES:
        raise InvalidTask(f"The task is longer than {MAX_TASK_BYTES} bytes.", f"give {GRAMMAR}")
    prefix, path, suffix = split(text)
    if not path:
        raise InvalidTask(f"The task {text!r} names no file.", f"give {GRAMMAR}")
    if not prefix:
        _refuse_unknown_prefix(path)
    if not suffix:
        _check_extension(path)
    if path.endswith(".yml"):
        raise InvalidTask(f"{path} ends in .yml; LLaMA-Factory takes .yaml only.", f"rename it to {path[:-4]}.yaml")
    if not path.startswith("/"):
        raise InvalidTask(
            f"The path {path!r} is not absolute.",
            "over D-Bus a task needs an absolute path; the CLI makes it so",
        )
    if path.endswith(".sh"):
        return _parse_shell(prefix, path, suffix)
    devices, evaluate = _parse_suffix(suffix)
    command = Command.EVAL if prefix == "eval:" else Command.TRAIN
    warnings: tuple[str, ...] = ()
    if command is Command.EVAL and not evaluate:
        warnings = ("#no_eval on an evaluation has no effect: there is no further evaluation to leave out.",)
        evaluate = True
    return Task(
        command=command,
        path=path,
        devices=devices,
        evaluate=evaluate and command is Command.TRAIN,
        warnings=warnings,
    )


def _encodable(text: str) -> str:
    if not is_utf8(text):
        raise InvalidTask("The task contains bytes that are not UTF-8.", "rename the file")
    return text


def _refuse_unknown_prefix(path: str) -> None:
    word, colon, _ = path.partition(":")
    if colon and word.isidentifier():
        raise InvalidTask(
            f"The prefix {word}: is unknown.",
            f"the prefixes are train: and eval:; write ./{path} for a file of that name",
        )


def _check_extension(path: str) -> None:
    if path.endswith((".yaml", ".sh", ".yml")):
        return
    name = path.rsplit("/", 1)[-1]
    for extension in (".yaml", ".sh", ".yml"):
        base, found, suffix = name.rpartition(extension)
        if found and base and suffix:
            raise InvalidTask(
                f"After {extension} comes {suffix!r}, which is neither @devices nor #no_eval.",
                f"give {GRAMMAR}",
            )
    raise InvalidTask(f"{path} is neither a .yaml nor a .sh file.", f"give {GRAMMAR}")


def _parse_shell(prefix: str, path: str, suffix: str) -> Task:
    if prefix:
        raise InvalidTask(f"{prefix} does not go with a .sh file.", f"give {path} alone")
    if suffix.startswith("@"):
        raise InvalidTask(
            "@devices does not go with a .sh file.",
            "set CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES in the script, or with --env",
        )
    if suffix:
        raise InvalidTask(f"{suffix} does not go with a .sh file.", f"give {path} alone")
    return Task(command=Command.SHELL, path=path, evaluate=False)


def _parse_suffix(suffix: str) -> tuple[tuple[int, ...], bool]:
    """Read `[@D[,D…]][#no_eval]`."""
    devices_text, hash_mark, flag = suffix.partition("#")
    if hash_mark and "@" in flag:
        raise InvalidTask(f"In {suffix!r} the flag comes before the devices.", "write the devices first: @0,1#no_eval")
    if hash_mark and flag != "no_eval":
        raise InvalidTask(f"The flag #{flag} is unknown.", "the only flag is #no_eval")
    if not devices_text:
        return (), not hash_mark
    return _parse_devices(devices_text[1:]), not hash_mark


def _parse_devices(text: str) -> tuple[int, ...]:
    devices: list[int] = []
    for word in text.split(","):
        if not text:
            raise InvalidTask("No device follows the @.", "leave it out, or give numbers, such as @0,1,2,3")
        if not word:
            raise InvalidTask(f"A device is empty in @{text}.", "give numbers, such as @0,1,2,3")
        # Not int(): that takes " 1", "+1", "1_0" and digits of other scripts.
        if not (word.isascii() and word.isdigit()):
            raise InvalidTask(f"{word!r} in @{text} is not a device number.", "give numbers, such as @0,1,2,3")
        device = int(word) if len(word) <= 9 else MAX_DEVICE + 1
        if device > MAX_DEVICE:
            raise InvalidTask(
                f"Device {word} in @{text} is over {MAX_DEVICE}.",
                "give the numbers that npu-smi or nvidia-smi shows",
            )
        if device in devices:
            raise InvalidTask(f"Device {device} is repeated in @{text}.", "name each device once")
        devices.append(device)
    return tuple(devices)
