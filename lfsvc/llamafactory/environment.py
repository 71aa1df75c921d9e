"""The environment of a job, made of five layers; a later one wins."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping

from lfsvc.llamafactory import cli

# What systemd, this service or a shell keeps for itself; it would mislead a job.
BOOKKEEPING = frozenset(
    {
        "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID",
        "MANAGERPID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "FDSTORE", "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE", "DBUS_STARTER_ADDRESS", "DBUS_STARTER_BUS_TYPE", "OLDPWD", "_",
    }
)  # fmt: skip

# What the service's own launcher of a job must not inherit by accident, but a layer may set on purpose.
UNLESS_ON_PURPOSE = frozenset({"MASTER_PORT"})

DEFAULTS: dict[str, str] = {
    "FORCE_TORCHRUN": "1",
    "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    "SWANLAB_MODE": "disabled",
    "PYTHONUNBUFFERED": "1",
}


def job_environment(
    *,
    service: Mapping[str, str],
    file: Mapping[str, str],
    devices: tuple[int, ...],
    own: Mapping[str, str],
    work_folder: str,
) -> dict[str, str]:
    """Put the environment of a job together, all but LFSVC_JOB_ID.

    Args:
        service: what the service itself has.
        file: ~/.config/lfsvc/environment, {} where the service is not run as a unit.
        devices: of the task.
        own: what the submitter gave with --env.
        work_folder: the job's output_dir, or its state folder for a .sh.
    """
    result = {
        name: value for name, value in service.items() if name not in BOOKKEEPING and name not in UNLESS_ON_PURPOSE
    }
    result.update(file)
    for name, value in DEFAULTS.items():
        result.setdefault(name, value)
    result.setdefault("LLAMABOARD_WORKDIR", work_folder)
    result.setdefault("PATH", os.defpath)
    if not _utf8_locale(result):
        # llamafactory-cli 0.9.3 reads its YAML in the locale's encoding.
        result.setdefault("PYTHONUTF8", "1")
    if devices:
        numbers = ",".join(map(str, devices))
        result["ASCEND_RT_VISIBLE_DEVICES"] = numbers
        result["CUDA_VISIBLE_DEVICES"] = numbers
        # Without it CUDA counts the fastest card first, and 3 is not what nvidia-smi calls 3.
        result.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    result.update(own)
    program = cli.find_program(cli.PROGRAM, result["PATH"])
    folder = cli.interpreter_folder(program) if program else ""
    if folder and folder not in result["PATH"].split(os.pathsep):
        result["PATH"] += os.pathsep + folder
    return result


def is_enabled(environment: Mapping[str, str], name: str, default: str = "0") -> bool:
    """Whether a variable turns something on. Source: is_env_enabled of LLaMA-Factory 0.9.3."""
    return environment.get(name, default).lower() in ("1", "true", "y")


def _utf8_locale(environment: Mapping[str, str]) -> bool:
    locale = environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or ""
    try:
        return codecs.lookup(locale.partition(".")[2].partition("@")[0]).name == "utf-8"
    except LookupError:
        return False
