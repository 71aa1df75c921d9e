"""The state folder: whose it is, and on what it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfsvc.errors import Internal, InvalidConfig
from lfsvc.service import lock

MOUNTS = """\
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 21 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw
31 30 0:41 / /home/me/local\\040disk rw,relatime - xfs /dev/sdb1 rw
32 21 0:42 / /mnt rw - ext4 /dev/sdc1 rw
33 21 0:43 / /mnt rw - lustre mds@tcp:/scratch rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/nowhere/x", "ext4"),
        ("/home/me/.local/state/lfsvc", "nfs4"),
        ("/home/me/local disk/lfsvc", "xfs"),
        ("/homes/x", "ext4"),
        ("/mnt/x", "lustre"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_last_mount_above_it(tmp_path: Path, path: str, kind: str) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert lock.file_system(path, str(tmp_path / "mountinfo")) == kind


def test_a_network_file_system_is_refused_with_the_line_for_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "file_system", lambda folder: "nfs4")
    with pytest.raises(InvalidConfig) as caught:
        lock.refuse_network_file_system("/home/me/.local/state/lfsvc", "/home/me/.config/lfsvc/config.yaml")
    assert "is on a network file system (nfs4)" in str(caught.value)
    assert "put `state_dir: /var/tmp/lfsvc-" in caught.value.hint


def test_a_second_service_on_a_state_folder_learns_who_holds_it(tmp_path: Path) -> None:
    first = lock.StateLock(str(tmp_path))
    with pytest.raises(Internal, match=r"A scheduler runs already for .* \(pid \d+\)\."):
        lock.StateLock(str(tmp_path))
    first.close()
    lock.StateLock(str(tmp_path)).close()
