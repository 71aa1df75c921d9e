"""What accelerators a machine has: outputs of the vendors' tools as people reported them, device files, groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lfsvc.client import accelerators
from lfsvc.client.accelerators import Credentials, Device, DeviceFile

# https://github.com/1Panel-dev/1Panel/issues/9472, word for word
NPU_24_1_1 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.1                   Version: 24.1.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 88.2        30                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          26838/ 32768         |
+===========================+===============+====================================================+
| 1     910B4               | OK            | 87.0        30                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          29356/ 32768         |
+===========================+===============+====================================================+
"""

# https://github.com/vllm-project/vllm-ascend/issues/12980: two chips a card, numbered by Phy-ID
NPU_26_0 = """\
+------------------------------------------------------------------------------------------------------------------+
| npu-smi 26.0.rc2                            Version: 26.0.rc2                                                    |
+---------------------------+---------------+----------------------------------------------------------------------+
| NPU   Name                | Health        | Power(W)             Temp(C)                 Hugepages-Usage(page)   |
| Chip  Phy-ID              | Bus-Id        | AICore(%)            Memory-Usage(MB)        HBM-Usage(MB)           |
+===========================+===============+======================================================================+
| 0     Ascend910           | OK            | 162.6                34                      0    / 0                |
| 0     0                   | 0000:9D:00.0  | 0                    0    / 0                3419 / 65536            |
+------------------------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -                    34                      0    / 0                |
| 1     1                   | 0000:9F:00.0  | 0                    0    / 0                2874 / 65536            |
+===========================+===============+======================================================================+
"""

# README of the Speech-Transformer sample in Ascend's ModelZoo: no HBM, a Device column, other widths
NPU_22_0 = """\
+--------------------------------------------------------------------------------------------+
| npu-smi 22.0.0                       Version: 22.0.2                                       |
+-------------------+-----------------+------------------------------------------------------+
| NPU     Name      | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device    | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===================+=================+======================================================+
| 0       310P3     | OK              | 17.0         56                0    / 0              |
| 0       0         | 0000:AF:00.0    | 0            934  / 23054                            |
+===================+=================+======================================================+
"""

# https://github.com/vllm-project/vllm-ascend/issues/1047 (the first two of eight): both kinds of memory, and
# the table of processes
NPU_24_1_0 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.0                   Version: 24.1.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910ProB             | OK            | 78.0        38                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           2387 / 13553      18   / 32768         |
+===========================+===============+====================================================+
| 1     910ProB             | OK            | 75.8        38                0    / 0             |
| 0                         | 0000:81:00.0  | 0           1840 / 15665      8    / 32768         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
| No running processes found in NPU 1                                                            |
+===========================+===============+====================================================+
"""

# https://github.com/vllm-project/vllm-ascend/issues/2698
NPU_REFUSED = """\
DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)
dcmi module initialize failed. ret is -8005
"""


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        (
            NPU_24_1_1,
            [
                Device(index=0, name="910B4", total_mib=32768, used_mib=26838),
                Device(index=1, name="910B4", total_mib=32768, used_mib=29356),
            ],
        ),
        (
            NPU_26_0,
            [
                Device(index=0, name="Ascend910", total_mib=65536, used_mib=3419),
                Device(index=1, name="Ascend910", total_mib=65536, used_mib=2874),
            ],
        ),
        (NPU_22_0, [Device(index=0, name="310P3", total_mib=23054, used_mib=934)]),
        (
            NPU_24_1_0,
            [
                Device(index=0, name="910ProB", total_mib=32768, used_mib=18),
                Device(index=1, name="910ProB", total_mib=32768, used_mib=8),
            ],
        ),
        (NPU_REFUSED, []),
        ("", []),
        # The table is cut, as by a tool that died.
        (NPU_24_1_1[:900], [Device(index=0, name="910B4", total_mib=32768, used_mib=26838)]),
    ],
)
def test_the_table_of_npu_smi_is_read_in_every_version(text: str, devices: list[Device]) -> None:
    assert list(accelerators.parse_ascend(text)) == devices


def test_the_health_of_an_npu_is_kept() -> None:
    sick = accelerators.parse_ascend(NPU_24_1_1.replace("| OK            | 87.0", "| Critical      | 87.0"))
    found = accelerators.Found(kind="Ascend", devices=sick, files=(), numbered=2)
    assert found.sick == ["Ascend 1 is Critical"]


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        (
            # Names and totals: https://github.com/modal-labs/modal-client/pull/2797
            "0, NVIDIA H100 80GB HBM3, 81559, 1024\n1, NVIDIA H100 80GB HBM3, 81559, 0\n",
            [
                Device(index=0, name="NVIDIA H100 80GB HBM3", total_mib=81559, used_mib=1024),
                Device(index=1, name="NVIDIA H100 80GB HBM3", total_mib=81559, used_mib=0),
            ],
        ),
        # `[N/A]` for both: https://github.com/mostlygeek/llama-swap/issues/782
        ("0, NVIDIA GB10, [N/A], [N/A]\n", [Device(index=0, name="NVIDIA GB10")]),
        # The older word: https://github.com/enkore/i3pystatus/pull/776
        ("0, GeForce GTX 770, 2004, [Not Supported]\n", [Device(index=0, name="GeForce GTX 770", total_mib=2004)]),
        ("No devices were found\n", []),
        # https://github.com/anderskm/gputil/issues/55
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n", []),
        # A lost card among good ones: https://github.com/NVIDIA/dcgm-exporter/issues/604
        (
            "Unable to determine the device handle for GPU 000:BA:80.0: Unknown Error\n0, Tesla T4, 15360, 3\n",
            [Device(index=0, name="Tesla T4", total_mib=15360, used_mib=3)],
        ),
    ],
)
def test_the_csv_of_nvidia_smi_is_read(text: str, devices: list[Device]) -> None:
    assert list(accelerators.parse_nvidia(text)) == devices


# -- looking -----------------------------------------------------------------------------------------


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for name in ("dev", "proc", "bin"):
        (tmp_path / name).mkdir()
    return tmp_path


def look(machine: Path, seconds: float = 30.0) -> tuple[accelerators.Found, ...]:
    environment = {"PATH": f"{machine}/bin:/usr/bin:/bin"}
    return accelerators.find(
        environment, dev=str(machine / "dev"), proc=str(machine / "proc"), folders=(), seconds=seconds
    )


def files(machine: Path, *names: str) -> None:
    for name in names:
        (machine / "dev" / name).touch()


def test_a_machine_without_accelerators_has_none(machine: Path) -> None:
    assert look(machine) == ()
    # A driver package without a card.
    tool(machine / "bin", "nvidia-smi", "echo No devices were found; exit 6\n")
    assert look(machine) == ()


def test_accelerators_are_counted_with_their_memory(machine: Path) -> None:
    files(machine, "davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc")
    tool(machine / "bin", "npu-smi", f"[ $1 = info ] && cat <<'E'\n{NPU_24_1_1}E\n")
    (found,) = look(machine)
    assert (found.kind, found.problem, found.text) == ("Ascend", "", "2 x Ascend 910B4, 32 GiB each")
    assert [os.path.basename(path) for path in found.files] == [
        "davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc"
    ]  # fmt: skip


def test_different_cards_are_told_apart(machine: Path) -> None:
    files(machine, "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")
    tool(machine / "bin", "nvidia-smi", "echo 0, NVIDIA A10, 23028, 0; echo 1, Tesla T4, 15360, 0\n")
    (found,) = look(machine)
    assert found.text == "1 x NVIDIA A10, 22 GiB; 1 x NVIDIA Tesla T4, 15 GiB"


def test_without_nvidia_smi_the_driver_names_the_cards(machine: Path) -> None:
    files(machine, "nvidia0", "nvidiactl")
    folder = machine / "proc/driver/nvidia/gpus/0000:04:00.0"
    folder.mkdir(parents=True)
    # https://github.com/canonical/lxd/issues/3950
    (folder / "information").write_text(
        "Model:           GeForce GTX 650\nIRQ:             44\nBus Type:        PCIe\n"
    )
    (found,) = look(machine)
    assert found.text == "1 x NVIDIA GeForce GTX 650, memory unknown"
    # A container: two of the host's cards are not its own.
    files(machine, "nvidia3")
    assert look(machine)[0].text == "2 x NVIDIA"


def test_a_tool_that_fails_is_quoted(machine: Path) -> None:
    files(machine, "davinci0", "davinci_manager")
    tool(machine / "bin", "npu-smi", f"cat <<'E'\n{NPU_REFUSED}E\nexit 1\n")
    (found,) = look(machine)
    assert found.problem == "npu-smi failed: dcmi module initialize failed. ret is -8005"
    assert found.text == "1 x Ascend"


def test_a_tool_that_hangs_is_left_alone(machine: Path) -> None:
    files(machine, "nvidia0")
    tool(machine / "bin", "nvidia-smi", "sleep 98765 & wait\n")
    (found,) = look(machine, seconds=0.2)
    assert found.problem == "nvidia-smi has not answered within 0.2 s"


def test_an_amd_card_is_mentioned(machine: Path) -> None:
    files(machine, "kfd")
    assert look(machine)[0].text == "AMD"


def test_what_hangs_gives_the_default_and_what_fails_raises() -> None:
    import threading

    release = threading.Event()
    assert accelerators.within(0.05, release.wait, "nothing") == "nothing"
    release.set()
    assert accelerators.within(30, lambda: 5, 0) == 5
    with pytest.raises(ZeroDivisionError):
        accelerators.within(30, lambda: 1 / 0, 0)


# -- who may open them -------------------------------------------------------------------------------

STATUS = "Name:\tpython3\nUid:\t1001\t1001\t1001\t1001\nGid:\t1001\t1001\t1001\t1001\nGroups:\t44 1001 \n"


def device(mode: int, *, uid: int = 1000, gid: int = 1000, here: bool = False) -> DeviceFile:
    return DeviceFile(path="/dev/davinci0", uid=uid, gid=gid, group="HwHiAiUser", mode=mode, opens_here=here)


def test_the_credentials_of_a_process_are_read() -> None:
    assert accelerators.parse_credentials(STATUS) == Credentials(uid=1001, groups=frozenset({44, 1001}))
    ours = accelerators.credentials_of("self")
    assert ours is not None and ours.uid == os.geteuid() and os.getegid() in ours.groups
    assert accelerators.credentials_of(2**22 + 1) is None


@pytest.mark.parametrize(
    ("file", "uid", "groups", "may"),
    [
        (device(0o660), 1001, {1001}, False),
        (device(0o660), 1001, {1001, 1000}, True),
        (device(0o666), 1001, {1001}, True),
        (device(0o600), 1001, {1000}, False),
        (device(0o600), 1000, set(), True),
        (device(0o600), 0, set(), True),
        # Reading alone is not enough; and to a member of the group what others may is nothing.
        (device(0o664), 1001, {1001}, False),
        (device(0o606), 1001, {1000}, False),
    ],
)
def test_owner_group_and_mode_decide(file: DeviceFile, uid: int, groups: set[int], may: bool) -> None:
    assert accelerators.may_open(file, Credentials(uid=uid, groups=frozenset(groups))) is may


def test_what_an_acl_opens_here_is_open_to_the_service_too() -> None:
    theirs = ours = Credentials(uid=1001, groups=frozenset({1001}))
    assert accelerators.closed_files([device(0o660, here=True)], theirs, ours) == []
    # But not where it is a group of this shell's that opens it.
    ours = Credentials(uid=1001, groups=frozenset({1001, 1000}))
    assert len(accelerators.closed_files([device(0o660, here=True)], theirs, ours)) == 1


def test_device_files_are_looked_at_and_gone_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "davinci0").touch(mode=0o600)
    (found,) = accelerators.look_at([str(tmp_path / "davinci0"), str(tmp_path / "davinci1")])
    assert (found.uid, found.mode, found.opens_here) == (os.getuid(), 0o600, True)
