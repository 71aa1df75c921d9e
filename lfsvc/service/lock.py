"""One service for one state folder: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os

from lfsvc import paths
from lfsvc.config import Config
from lfsvc.errors import Internal, InvalidConfig
from lfsvc.files import make_private

# File systems on which SQLite's WAL is not safe and two machines would share a queue.
# Source: https://www.sqlite.org/wal.html ("WAL does not work over a network filesystem").
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "9p",
        "pvfs2", "orangefs", "ocfs2", "gfs2", "panfs", "wekafs", "virtiofs", "fuse.glusterfs", "fuse.sshfs",
        "fuse.ceph", "fuse.juicefs", "fuse.s3fs", "fuse.beegfs", "fuse.lustre",
    }
)  # fmt: skip


def file_system(path: str, mounts: str = "/proc/self/mountinfo") -> str:
    """The type of the file system that a path lies on (where it does not exist, its nearest parent).

    Source: proc(5), mountinfo: field 5 is the mount point, the first after the lone "-" the type.
    """
    path = os.path.realpath(path)
    best, kind = "", ""
    with open(mounts, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            point = _unescape(head.split()[4])
            inside = point == "/" or path == point or path.startswith(point + "/")
            # Of two mounts on one point the later one is seen.
            if inside and len(point) >= len(best):
                best, kind = point, tail.split()[0]
    return kind


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def refuse_network_file_system(folder: str, config_file: str) -> None:
    """Refuse a state folder that two machines could share.

    Raises:
        InvalidConfig: with the line to put into the config.
    """
    kind = file_system(folder)
    if kind in NETWORK_FILE_SYSTEMS:
        raise InvalidConfig(
            f"The state folder {folder} is on a network file system ({kind}), where a queue is not safe.",
            f"put `state_dir: /var/tmp/lfsvc-{os.getuid()}`, or another folder on a local disk, into {config_file}",
        )


class StateLock:
    """The lock on a state folder, held for as long as this object is open."""

    def __init__(self, folder: str) -> None:
        """Take the lock.

        Raises:
            Internal: another service holds it; the message says which process.
        """
        path = os.path.join(folder, "lock")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise Internal(
                f"A scheduler runs already for {folder}" + (f" (pid {holder})." if holder else "."),
                "lfsvc status shows it, lfsvc stop ends it; its jobs go on",
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._fd)


def make_private_state(config: Config) -> None:
    """Make the state folder.

    Raises:
        InvalidConfig, Internal: it is on a network file system, or cannot be made.
    """
    folder = config.state_folder
    refuse_network_file_system(folder, paths.config_file())
    try:
        make_private(folder)
    except OSError as error:
        raise Internal(
            f"The state folder {folder} cannot be used: {error.strerror or error}.",
            f"mend it, or put `state_dir: /another/folder` into {paths.config_file()}",
        ) from error
