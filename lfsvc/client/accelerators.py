"""Which accelerators this machine has, and whether a process may open their device files."""

from __future__ import annotations

import glob
import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lfsvc.llamafactory.cli import find_program

_T = TypeVar("_T")

# nvidia-smi and npu-smi hang where the driver does.
TOOL_SECONDS = 5.0

# Where the tools are, beside PATH: npu-smi lies in an sbin folder that users do not have on theirs.
TOOL_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/usr/lib/wsl/lib")

_NUMBER = re.compile(r"\d+")
_USED_OF_TOTAL = re.compile(r"(\d+)\s*/\s*(\d+)")
_NPU_AND_NAME = re.compile(r"(\d+)\s+(\S+)")
_CHIP_AND_ID = re.compile(r"\d+(?:\s+(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator. `index` is what `@devices` calls it; memory is None where the tool does not tell."""

    index: int
    name: str
    total_mib: int | None = None
    used_mib: int | None = None
    health: str = "OK"


def parse_nvidia(text: str) -> tuple[Device, ...]:
    """Read `nvidia-smi --query-gpu=index,name,memory.total,memory.used --format=csv,noheader,nounits`.

    A value may be `[N/A]`, `[Not Supported]`, `N/A` or `[Unknown Error]`; other lines are passed over.
    """
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 4 and _NUMBER.fullmatch(fields[0]):
            total, used = (int(field) if _NUMBER.fullmatch(field) else None for field in fields[-2:])
            name = ", ".join(fields[1:-2])
            found.append(Device(index=int(fields[0]), name=name, total_mib=total, used_mib=used))
    return tuple(found)


def parse_ascend(text: str) -> tuple[Device, ...]:
    """Read the table of `npu-smi info`: a pair of lines for each chip, of three columns each.

    The columns' widths and what stands in the first one differ by version and product (seen: 22.0 to 26.0;
    310P, 910A, 910B, 910C). The memory is the last `used / total` that is not of 0: HBM where there is some.
    """
    found: list[Device] = []
    upper: list[str] = []
    within = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "Bus-Id" in line:
            within = True
        elif "Process id" in line:
            # The second table: who uses them.
            break
        elif within and line.lstrip().startswith("|") and len(cells) == 3:
            if not upper:
                upper = cells
                continue
            device = _ascend_device(upper, cells, len(found))
            found += [device] if device else []
            upper = []
    return tuple(found)


def _ascend_device(upper: list[str], lower: list[str], number: int) -> Device | None:
    head, chip = _NPU_AND_NAME.match(upper[0]), _CHIP_AND_ID.fullmatch(lower[0])
    if not head or not chip:
        return None
    used, total = 0, 0
    for pair in _USED_OF_TOTAL.findall(lower[2]):
        if int(pair[1]):
            used, total = int(pair[0]), int(pair[1])
    return Device(
        # Without a column of its own (Phy-ID, Device) a device is called by its place, not by its NPU's number.
        index=int(chip.group(1)) if chip.group(1) else number,
        name=head.group(2),
        total_mib=total or None,
        used_mib=used if total else None,
        health=upper[1],
    )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A make of accelerators. Patterns are of files in /dev; the first one is numbered by device."""

    name: str
    numbered: str
    shared: tuple[str, ...]
    tool: tuple[str, ...] = ()
    parse: Callable[[str], tuple[Device, ...]] = parse_nvidia


# Source: NVIDIA's driver README ("How and when are the NVIDIA device files created?"); the device files that
# containers of CANN are given; ROCm's "Set permissions for GPU access".
KINDS = (
    Kind(
        name="Ascend",
        numbered="davinci[0-9]*",
        shared=("davinci_manager", "devmm_svm", "hisi_hdc"),
        tool=("npu-smi", "info"),
        parse=parse_ascend,
    ),
    Kind(
        name="NVIDIA",
        numbered="nvidia[0-9]*",
        shared=("nvidiactl", "nvidia-uvm"),
        tool=("nvidia-smi", "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"),
    ),
    Kind(name="AMD", numbered="kfd", shared=("dri/renderD[0-9]*",)),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Accelerators of one make: `files` are their device files, `problem` why the tool tells nothing of them."""

    kind: str
    devices: tuple[Device, ...]
    files: tuple[str, ...]
    numbered: int
    problem: str = ""

    @property
    def sick(self) -> list[str]:
        """What is wrong with which device, by its own account."""
        return [f"{self.kind} {device.index} is {device.health}" for device in self.devices if device.health != "OK"]

    @property
    def text(self) -> str:
        """Number, names and memory: `8 x Ascend 910B3, 64 GiB each`."""
        if not self.devices:
            return self.kind if self.kind == "AMD" else f"{self.numbered} x {self.kind}"
        groups: dict[tuple[str, int | None], int] = {}
        for device in self.devices:
            # The driver calls some of its own devices "NVIDIA A100", others "Tesla T4".
            name = device.name if device.name.startswith(self.kind) else f"{self.kind} {device.name}"
            groups[name, device.total_mib] = groups.get((name, device.total_mib), 0) + 1
        return "; ".join(_group_text(name, total, count) for (name, total), count in groups.items())


def _group_text(name: str, total_mib: int | None, count: int) -> str:
    memory = "memory unknown" if total_mib is None else f"{total_mib / 1024:.0f} GiB"
    return f"{count} x {name}, {memory}" + (" each" if count > 1 and total_mib is not None else "")


def find(
    environment: Mapping[str, str],
    *,
    dev: str = "/dev",
    proc: str = "/proc",
    folders: Iterable[str] = TOOL_FOLDERS,
    seconds: float = TOOL_SECONDS,
) -> tuple[Found, ...]:
    """Look for accelerators: by their device files, and by what their tool says. Takes up to `seconds` for each."""
    path = os.pathsep.join([environment.get("PATH", ""), *folders])
    found = []
    for kind in KINDS:
        numbered = sorted(glob.glob(os.path.join(dev, kind.numbered)))
        shared = [file for pattern in kind.shared for file in sorted(glob.glob(os.path.join(dev, pattern)))]
        tool = find_program(kind.tool[0], path) if kind.tool else ""
        if not numbered and not tool:
            continue
        devices: tuple[Device, ...] = ()
        problem = ""
        if tool:
            text, problem = ask([tool, *kind.tool[1:]], environment, seconds)
            devices = kind.parse(text)
            problem = "" if devices else problem or f"{kind.tool[0]} lists no device"
        if not devices and not numbered:
            # A tool without devices: a driver package on a machine that has none.
            continue
        if not devices and kind.name == "NVIDIA":
            devices = _from_proc(proc, len(numbered))
        files = tuple(numbered + shared)
        found.append(Found(kind=kind.name, devices=devices, files=files, numbered=len(numbered), problem=problem))
    return tuple(found)


def _from_proc(proc: str, number: int) -> tuple[Device, ...]:
    """The names from the driver itself, where a container has no nvidia-smi; () where they do not fit."""
    names = []
    for path in sorted(glob.glob(os.path.join(proc, "driver/nvidia/gpus/*/information"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            names += [line.partition(":")[2].strip() for line in file if line.startswith("Model:")]
    # A container sees all of the host's here, and its own ones in /dev.
    return tuple(Device(index=i, name=name) for i, name in enumerate(names)) if len(names) == number else ()


def ask(argv: list[str], environment: Mapping[str, str], seconds: float) -> tuple[str, str]:
    """Run a program for at most `seconds`; give what it printed, and the problem in a few words or ""."""
    name = os.path.basename(argv[0])
    try:
        process = subprocess.Popen(
            argv,
            env={**environment, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return "", f"{name} cannot be run: {error.strerror}"
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        _abandon(process)
        return "", f"{name} has not answered within {seconds:g} s"
    if process.returncode == 0:
        return text, ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return text, f"{name} failed: {lines[-1] if lines else f'exit status {process.returncode}'}"


def _abandon(process: subprocess.Popen[str]) -> None:
    """Kill a program that hangs, and do not wait for it for long: within the driver it cannot be killed."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        pass
    if process.stdout is not None:
        process.stdout.close()


def within(seconds: float, ask_for: Callable[[], _T], default: _T) -> _T:
    """What a function gives or raises; `default` where it has not returned by then: its thread is left behind."""
    answers: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask_for())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return answers[0] if answers else default


# -- who may open them -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What decides what a process may open."""

    uid: int
    groups: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class DeviceFile:
    """A device file. `opens_here` says whether this very process may open it, which an ACL may allow."""

    path: str
    uid: int
    gid: int
    group: str
    mode: int
    opens_here: bool


def parse_credentials(status: str) -> Credentials:
    """Read /proc/<pid>/status: the fourth number of Uid and Gid is what counts for files. Source: proc(5)."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    groups = {int(number) for number in fields["Groups"].split()}
    return Credentials(uid=int(fields["Uid"].split()[3]), groups=frozenset(groups | {int(fields["Gid"].split()[3])}))


def credentials_of(pid: int | str, proc: str = "/proc") -> Credentials | None:
    """The credentials of a process; None where it is gone."""
    try:
        with open(os.path.join(proc, str(pid), "status"), encoding="utf-8", errors="replace") as file:
            return parse_credentials(file.read())
    except (OSError, KeyError, ValueError, IndexError):
        return None


def manager_pid(proc: str = "/proc") -> int:
    """The PID of this user's systemd, whose groups all it starts has; 0 where none runs."""
    for path in glob.glob(os.path.join(proc, "[0-9]*")):
        try:
            with open(os.path.join(path, "cmdline"), "rb") as file:
                words = file.read().split(b"\0")
            if words[0].endswith(b"systemd") and b"--user" in words and os.stat(path).st_uid == os.getuid():
                return int(os.path.basename(path))
        except OSError:
            # It is gone.
            continue
    return 0


def look_at(files: Iterable[str]) -> tuple[DeviceFile, ...]:
    """Owner, group and mode of device files; one that is gone is left out."""
    found = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append(
            DeviceFile(
                path=path,
                uid=status.st_uid,
                gid=status.st_gid,
                group=_group_name(status.st_gid),
                mode=stat.S_IMODE(status.st_mode),
                opens_here=os.access(path, os.R_OK | os.W_OK),
            )
        )
    return tuple(found)


def _group_name(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def may_open(file: DeviceFile, credentials: Credentials) -> bool:
    """Whether owner, group and mode let a process read and write. Source: path_resolution(7)."""
    if credentials.uid == 0:
        return True
    if file.uid == credentials.uid:
        return file.mode & 0o600 == 0o600
    if file.gid in credentials.groups:
        return file.mode & 0o060 == 0o060
    return file.mode & 0o006 == 0o006


def closed_files(files: Iterable[DeviceFile], theirs: Credentials, ours: Credentials) -> list[DeviceFile]:
    """The device files that a process may not open.

    What this process may open in spite of owner, group and mode, an ACL allows; udev grants those to a
    user, so they hold for the other process, too.
    """
    return [file for file in files if not may_open(file, theirs) and not (file.opens_here and not may_open(file, ours))]
